"""What SQL sees: one view `events` over hot and cold, and typed views on top of it.

`events` has a row per event: `kind`, `log_id`, `partition`, `offset`, `appended_at`, `schema`, the envelope, and one STRUCT column
per kind, of which the one of the row's kind is not NULL. Ids there are BLOBs. The views on top give ids as lowercase
UUID text, digests as hex, times as UTC timestamps and durations in milliseconds:

=============== =================================================================================================
sessions        one row per session of a customer: who, when, how many requests, tokens and failures; looks alone are none
generations     one row per generation: model, parameters, time to first token, tokens/s, outcome
messages        one row per request and message in it, with the body where the session held it
edits           one row per edit a person made to a stopped request
tokens          one row per token: position, id, text piece, logprob, time, gap to the token before, alternatives
tool_calls      one row per complete tool call
failures        one row per failed generation
environments    one row per environment that produced tokens
replays         one row per replay, with its verdict
engine_steps    one row per scheduler step of an engine
kv_operations   one row per call of a KV connector
custody         one row per hold, retention, erasure, sealed segment, verification and access
=============== =================================================================================================

Where gateway and engine both recorded a generation, only the events of its authoritative source count. Two macros help:
`uuid_text(blob)` and `uuid_blob(text)`; a look-up in `events` is fast with `session_id = uuid_blob('…')`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

import duckdb

from store.columns import current_columns

MACROS = (
    "CREATE MACRO uuid_text(id) AS CAST(CAST(id AS UUID) AS VARCHAR)",
    "CREATE MACRO uuid_blob(id) AS CAST(CAST(id AS UUID) AS BLOB)",
)

# The source whose events count, by generation; the earliest start decides should two differ.
_AUTHORITY = """
    SELECT generation_started.generation_id AS generation, arg_min(generation_started.authoritative, "offset") AS authoritative
    FROM events WHERE kind = 'generation_started' GROUP BY ALL"""

SPOKEN = """
    SELECT session_id, CAST(sum(tokens) AS BIGINT) AS tokens FROM (
        SELECT session_id, coalesce(sequence_finished.generation_id, generation_failed.generation_id) AS generation,
            greatest(coalesce(sum(sequence_finished.tokens), 0), coalesce(max(generation_failed.position), 0)) AS tokens
        FROM events WHERE kind IN ('sequence_finished', 'generation_failed') GROUP BY ALL
    ) GROUP BY session_id"""
"""Tokens of each session; a generation that failed counts as far as it came."""

# A tag is there if the last that was said of it is that it was added; within one event removing counts.
_SESSIONS = f"""
    WITH told AS (
        SELECT session_id, "offset" AS place, unnest(list_concat(session_opened.tags, session_annotated.tags_added)) AS tag, true AS there
        FROM events WHERE kind IN ('session_opened', 'session_annotated')
        UNION ALL BY NAME
        SELECT session_id, "offset" AS place, unnest(session_annotated.tags_removed) AS tag, false AS there
        FROM events WHERE kind = 'session_annotated'
    ), tagged AS (
        SELECT session_id, tag, arg_max(there, place * 2 + CASE WHEN there THEN 0 ELSE 1 END) AS there FROM told GROUP BY ALL
    ), labels AS (
        SELECT session_id AS session, list(tag ORDER BY tag) AS tags FROM tagged WHERE there GROUP BY ALL
    ), summed AS (
        SELECT session_id AS session, uuid_text(session_id) AS session_id, any_value(tenant) AS tenant,
        any_value(retention_class) AS retention_class,
        min(recorded_at) AS started_at, max(recorded_at) AS last_event_at,
        epoch_us(max(recorded_at) - min(recorded_at)) / 1000 AS duration_ms,
        any_value(actor) AS actor, any_value(session_opened.client) AS client, any_value(session_opened."user") AS "user",
        any_value(session_opened.workflow) AS workflow, any_value(session_opened.purpose) AS purpose,
        any_value(session_opened.content.title) AS title,
        CAST(NULL AS VARCHAR[]) AS tags,
        count(*) AS events, count(request_submitted) AS requests, count(generation_failed) AS failures, count(request_edited) AS edits,
        CAST(NULL AS BIGINT) AS tokens, count(replay_started) AS replays,
        uuid_text(any_value(session_opened.parent_session)) AS parent_session_id, any_value(session_closed.reason) AS closed
        FROM events WHERE tenant <> '_platform' GROUP BY events.session_id HAVING count(*) > count(access_logged)
    )
    SELECT s.* EXCLUDE (session) REPLACE (coalesce(l.tags, []) AS tags, coalesce(t.tokens, 0) AS tokens)
    FROM summed s LEFT JOIN labels l ON l.session = s.session LEFT JOIN ({SPOKEN}) t ON t.session_id = s.session"""

_GENERATION_KINDS = (
    *("request_submitted", "generation_started", "sequence_started", "token_chunk", "sequence_finished"),
    *("generation_finished", "generation_failed"),
)
_GENERATION_ID = f"coalesce({', '.join(f'{kind}.generation_id' for kind in _GENERATION_KINDS)})"
_GENERATION_LIST = ", ".join(f"'{kind}'" for kind in _GENERATION_KINDS)

# A failure that only the other source saw (a client that hung up) still counts when the authoritative one saw no end.
_GENERATIONS = f"""
    WITH parts AS (
        SELECT e.*, {_GENERATION_ID} AS generation, coalesce(a.authoritative, e.source) = e.source AS counts, a.authoritative
        FROM events e LEFT JOIN _authority a ON a.generation = {_GENERATION_ID}
        WHERE e.kind IN ({_GENERATION_LIST})
    ), joined AS (
        SELECT generation, coalesce(any_value(session_id) FILTER (counts), any_value(session_id)) AS session,
            coalesce(any_value(tenant) FILTER (counts), any_value(tenant)) AS tenant,
            coalesce(any_value(actor) FILTER (counts), any_value(actor)) AS actor,
            any_value(authoritative) AS source, min(recorded_at) AS submitted_at,
            coalesce(any_value(request_submitted) FILTER (counts), any_value(request_submitted)) AS asked,
            any_value(generation_started) FILTER (counts) AS started,
            max(generation_started.attempt) AS attempts, any_value(generation_finished) FILTER (counts) AS finished,
            coalesce(any_value(generation_failed) FILTER (counts), any_value(generation_failed)) AS failed,
            count(sequence_started) FILTER (counts) AS sequences,
            CAST(sum(len(token_chunk.offsets_us)) FILTER (counts) AS BIGINT) AS tokens,
            min(token_chunk.offsets_us[1]) FILTER (counts) AS first_us, max(token_chunk.offsets_us[-1]) FILTER (counts) AS last_us,
            list(sequence_finished.finish_reason ORDER BY sequence_finished."index")
                FILTER (counts AND kind = 'sequence_finished') AS finish_reasons
        FROM parts GROUP BY generation
    )
    SELECT uuid_text(session) AS session_id, uuid_text(generation) AS generation_id, tenant, actor, submitted_at,
        CASE WHEN finished IS NOT NULL THEN 'finished' WHEN failed IS NOT NULL THEN 'failed' ELSE 'open' END AS outcome,
        failed.error_type AS error_type, asked.endpoint AS endpoint, asked.model AS model, started.model AS model_served,
        asked.stream AS stream, asked.n AS n, asked.seed AS seed, asked.temperature AS temperature, asked.max_tokens AS max_tokens,
        coalesce(finished.prompt_tokens, started.prompt_tokens) AS prompt_tokens, finished.completion_tokens AS completion_tokens,
        finished.cached_tokens AS cached_tokens, coalesce(tokens, 0) AS tokens, sequences, finish_reasons,
        coalesce(finished.first_token_us, first_us) / 1000 AS first_token_ms,
        coalesce(finished.offset_us, failed.offset_us, last_us) / 1000 AS duration_ms,
        tokens / nullif(last_us - first_us, 0) * 1e6 AS tokens_per_s,
        coalesce(attempts, 0) AS attempts, source, started.status AS status,
        coalesce(started.upstream, asked.upstream) AS upstream, started.queued_us / 1000 AS queued_ms, asked.priority AS priority,
        started.upstream_id AS upstream_id, asked.trace_id AS trace_id, asked.client_request_id AS client_request_id,
        asked.api_key_id AS api_key_id, asked.client_address AS client_address,
        lower(hex(CASE WHEN started.upstream IS NULL THEN coalesce(started.environment_id, asked.environment_id)
            ELSE started.environment_id END)) AS environment_id,
        uuid_text(asked.parent_generation) AS parent_generation_id
    FROM joined"""

# A request lists the messages since the one that it continues; following it back takes log2 of the turns.
_MESSAGES = """
    WITH RECURSIVE asked AS (
        SELECT session_id, tenant, recorded_at, request_submitted.generation_id AS generation,
            request_submitted.message_ids AS ids, request_submitted.history_generation AS before,
            request_submitted.history_messages AS kept
        FROM events WHERE kind = 'request_submitted'
    ), once AS (
        SELECT session_id, generation, arg_max({'ids': ids, 'before': before, 'kept': kept}, len(ids)) AS said FROM asked GROUP BY ALL
    ), whole AS (
        SELECT session_id, generation, said.ids AS ids FROM once WHERE said.before IS NULL
        UNION ALL
        SELECT o.session_id, o.generation, list_concat(w.ids[:o.said.kept], o.said.ids)
        FROM once o JOIN whole w ON o.session_id = w.session_id AND o.said.before = w.generation
    ), resolved AS (
        SELECT a.*, CASE WHEN a.before IS NOT NULL THEN w.ids END AS found
        FROM asked a LEFT JOIN whole w ON w.session_id = a.session_id AND w.generation = a.generation
    ), requests AS (
        SELECT session_id, tenant, recorded_at, generation, unnest(coalesce(found, ids)) AS message,
            generate_subscripts(coalesce(found, ids), 1) + CASE WHEN found IS NULL THEN coalesce(kept, 0) ELSE 0 END AS place
        FROM resolved
    ), listed AS (
        SELECT session_id, unnest(request_submitted.content.messages) AS body FROM events WHERE kind = 'request_submitted'
    ), bodies AS (
        SELECT session_id, body.message_id AS message, any_value(body) AS body FROM listed GROUP BY ALL
    )
    SELECT uuid_text(r.session_id) AS session_id, uuid_text(r.generation) AS generation_id, r.tenant, r.recorded_at AS submitted_at,
        r.place AS position, uuid_text(r.message) AS message_id, b.body.role AS role, b.body.body AS body,
        lower(hex(b.body.blob.blob_id)) AS blob_id,
        regexp_extract_all(b.body.body, 'tokentape-blob:([0-9a-f]{64}):[0-9]+', 1) AS attachments
    FROM requests r LEFT JOIN bodies b ON b.session_id = r.session_id AND b.message = r.message"""

_EDITS = """
    SELECT uuid_text(session_id) AS session_id, uuid_text(request_edited.generation_id) AS generation_id, tenant, actor, recorded_at,
        uuid_text(request_edited.edit_id) AS edit_id, uuid_text(request_edited.undo_of) AS undo_of,
        request_edited.content.patch AS patch, request_edited.content.reason AS reason,
        lower(hex(request_edited.digest_before)) AS digest_before, lower(hex(request_edited.digest_after)) AS digest_after
    FROM events WHERE kind = 'request_edited'"""

# The gap across chunks needs a window over chunks only, of which there are many times fewer than tokens.
_TOKENS = """
    WITH chunks AS (
        SELECT e.session_id, e.tenant, e.recorded_at, e.token_chunk AS c,
            lag(e.token_chunk.offsets_us[-1]) OVER (PARTITION BY e.token_chunk.generation_id, e.token_chunk."index"
                ORDER BY e.token_chunk."position") AS before_us
        FROM events e LEFT JOIN _authority a ON a.generation = e.token_chunk.generation_id
        WHERE e.kind = 'token_chunk' AND coalesce(a.authoritative, e.source) = e.source
    ), entries AS (
        SELECT *, unnest(range(1, 1 + len(c.offsets_us))) AS i FROM chunks
    )
    SELECT uuid_text(session_id) AS session_id, uuid_text(c.generation_id) AS generation_id, tenant, c."index" AS "index",
        c."position" + i - 1 AS "position", c.channel AS channel, c.content.token_ids[i] AS token_id,
        substring(c.content.text, 1 + CAST(coalesce(list_sum(c.content.lengths[:i - 1]), 0) AS BIGINT), c.content.lengths[i]) AS text,
        c.content.logprobs[i] AS logprob, c.offsets_us[i] / 1000 AS offset_ms,
        (c.offsets_us[i] - CASE WHEN i = 1 THEN before_us ELSE c.offsets_us[i - 1] END) / 1000 AS gap_ms, recorded_at,
        list_transform(range(
            1 + CAST(coalesce(list_sum(c.content.alternatives.counts[:i - 1]), 0) AS BIGINT),
            1 + CAST(list_sum(c.content.alternatives.counts[:i]) AS BIGINT)
        ), lambda k: {'token_id': c.content.alternatives.token_ids[k], 'text': c.content.alternatives.texts[k],
            'logprob': c.content.alternatives.logprobs[k]}) AS alternatives
    FROM entries"""

_TOOL_CALLS = """
    SELECT uuid_text(e.session_id) AS session_id, uuid_text(e.tool_call.generation_id) AS generation_id, e.tenant, e.recorded_at,
        e.tool_call."index" AS "index", e.tool_call.call_index AS call_index, e.tool_call.content.call_id AS call_id,
        e.tool_call.content.name AS name, e.tool_call.content.arguments AS arguments, e.tool_call.offset_us / 1000 AS offset_ms
    FROM events e LEFT JOIN _authority a ON a.generation = e.tool_call.generation_id
    WHERE e.kind = 'tool_call' AND coalesce(a.authoritative, e.source) = e.source"""

_FAILURES = """
    SELECT uuid_text(session_id) AS session_id, uuid_text(generation_failed.generation_id) AS generation_id, tenant, actor,
        recorded_at, source, generation_failed.error_type AS error_type, generation_failed.origin AS origin,
        generation_failed.status AS status, generation_failed.content.message AS message,
        generation_failed."position" AS "position", generation_failed.retryable AS retryable,
        generation_failed.offset_us / 1000 AS offset_ms
    FROM events WHERE kind = 'generation_failed'"""

_ENVIRONMENTS = """
    SELECT lower(hex(environment_captured.environment_id)) AS environment_id, any_value(tenant) AS tenant,
        any_value(environment_captured.origin) AS origin, min(recorded_at) AS first_seen, max(recorded_at) AS last_seen,
        count(*) AS captures, lower(hex(any_value(environment_captured.semantic))) AS semantic,
        lower(hex(any_value(environment_captured.numeric))) AS numeric,
        lower(hex(any_value(environment_captured.scheduling))) AS scheduling, any_value(environment_captured.items) AS items,
        any_value(environment_captured.unknown) AS unknown
    FROM events WHERE kind = 'environment_captured' GROUP BY environment_captured.environment_id"""

_REPLAYS = """
    WITH parts AS (
        SELECT *, coalesce(replay_started.replay_id, sequence_compared.replay_id, replay_finished.replay_id) AS replay
        FROM events WHERE kind IN ('replay_started', 'sequence_compared', 'replay_finished')
    ), joined AS (
        SELECT replay, any_value(session_id) AS session, any_value(tenant) AS tenant, any_value(actor) AS actor,
            min(recorded_at) AS started_at, any_value(replay_started) AS started, any_value(replay_finished) AS finished,
            max(sequence_compared.drift_max) AS drift_max, max(sequence_compared.noise_floor) AS noise_floor
        FROM parts GROUP BY replay
    )
    SELECT uuid_text(replay) AS replay_id, uuid_text(session) AS session_id, tenant, actor, started_at,
        uuid_text(started.subject_session) AS subject_session_id, started.mode AS mode, started.engine AS engine,
        started.strict AS strict, finished.verdict AS verdict, finished.reason AS reason, finished.generations AS generations,
        finished.sequences AS sequences, finished.tokens AS tokens, finished.duration_us / 1000 AS duration_ms,
        drift_max, noise_floor, started.differences AS differences
    FROM joined"""

_ENGINE_STEPS = """
    SELECT uuid_text(session_id) AS session_id, recorded_at, uuid_text(engine_step.engine_run) AS engine_run,
        engine_step.step AS step, engine_step.duration_us / 1000 AS duration_ms, engine_step.waiting AS waiting,
        engine_step.running AS running, engine_step.preempted AS preempted, engine_step.kv_used AS kv_used,
        list_transform(engine_step.entries,
            lambda x: {'generation_id': uuid_text(x.generation_id), 'index': x."index", 'tokens': x.tokens}) AS entries
    FROM events WHERE kind = 'engine_step'"""

_KV_OPERATIONS = """
    SELECT uuid_text(session_id) AS session_id, uuid_text(kv_operation.generation_id) AS generation_id, tenant, recorded_at,
        kv_operation.operation AS operation, kv_operation.role AS role, kv_operation.connector AS connector,
        kv_operation.tokens_asked AS tokens_asked, kv_operation.tokens_matched AS tokens_matched, kv_operation.blocks AS blocks,
        kv_operation.duration_us / 1000 AS duration_ms, kv_operation.outcome AS outcome, kv_operation.content.error AS error,
        kv_operation.request AS request, kv_operation.tokens_local AS tokens_local, kv_operation.bytes AS bytes,
        coalesce(kv_operation.calls, 1) AS calls, kv_operation.memory_bytes AS memory_bytes,
        kv_operation.content.block_hashes AS block_hashes
    FROM events WHERE kind = 'kv_operation'"""

_CUSTODY_KINDS = {
    "segment_sealed": ("segment_sealed.segment", "segment_sealed.events", "segment_sealed.ledger_entry"),
    "hold_placed": ("uuid_text(hold_placed.hold_id)", "NULL", "hold_placed.ledger_entry"),
    "hold_released": ("uuid_text(hold_released.hold_id)", "NULL", "hold_released.ledger_entry"),
    "retention_applied": ("retention_applied.policy", "retention_applied.events", "retention_applied.ledger_entry"),
    "erasure_applied": ("uuid_text(erasure_applied.erasure_id)", "erasure_applied.events", "erasure_applied.ledger_entry"),
    "verification_finished": ("verification_finished.scope", "verification_finished.events", "NULL"),
    "access_logged": ("access_logged.operation", "access_logged.rows", "NULL"),
}
"""By kind: what it was about, how many events, which ledger entry."""


def _by_kind(column: int) -> str:
    return " ".join(f"WHEN '{kind}' THEN {parts[column]}" for kind, parts in _CUSTODY_KINDS.items())


_CUSTODY = f"""
    SELECT recorded_at, kind, actor, tenant, CASE kind {_by_kind(0)} END AS subject, CASE kind {_by_kind(1)} END AS events,
        coalesce(verification_finished.outcome, access_logged.outcome) AS outcome,
        coalesce(hold_placed.selector, retention_applied.selector) AS selector,
        coalesce(hold_placed.content.reason, hold_released.content.reason, erasure_applied.content.reason) AS reason,
        access_logged.content.statement AS statement, CASE kind {_by_kind(2)} END AS ledger_entry, uuid_text(session_id) AS session_id
    FROM events WHERE kind IN ({", ".join(f"'{kind}'" for kind in _CUSTODY_KINDS)})"""

_VIEWS = {
    "sessions": ("one row per session of a customer", _SESSIONS),
    "generations": ("one row per generation, with tokens/s, time to first token and outcome", _GENERATIONS),
    "messages": ("one row per request and message in it", _MESSAGES),
    "edits": ("one row per edit of a stopped request", _EDITS),
    "tokens": ("one row per token, with logprob and the gap before it", _TOKENS),
    "tool_calls": ("one row per complete tool call", _TOOL_CALLS),
    "failures": ("one row per failed generation", _FAILURES),
    "environments": ("one row per environment that produced tokens", _ENVIRONMENTS),
    "replays": ("one row per replay, with its verdict", _REPLAYS),
    "engine_steps": ("one row per scheduler step of an engine", _ENGINE_STEPS),
    "kv_operations": ("one row per call of a KV connector", _KV_OPERATIONS),
    "custody": ("one row per act of custody: holds, retention, erasure, verification, access", _CUSTODY),
}

NAMES = frozenset(_VIEWS) | {"events"}
"""The views that callers may name."""


@dataclass(frozen=True)
class ViewHelp:
    """What one view holds: its purpose in a line, its columns as (name, DuckDB type)."""

    name: str
    purpose: str
    columns: tuple[tuple[str, str], ...]


def create(connection: duckdb.DuckDBPyConnection) -> None:
    """Create macros and views over an empty `events`; `fill` puts the real one in its place.

    A view looks its tables up when it is used, so only `events` has to open files, and all else can be done ahead.
    """
    for statement in MACROS:
        connection.execute(statement)
    fill(connection)
    connection.execute(f"CREATE VIEW _authority AS {_AUTHORITY}")
    for name, (_, body) in _VIEWS.items():
        connection.execute(f"CREATE VIEW {name} AS {body}")


def fill(
    connection: duckdb.DuckDBPyConnection, *, shards: Sequence[str] = (), segments: Sequence[str] = (), tenant: str | None = None
) -> None:
    """Let `events` show attached databases (`shards`: their names) and Parquet files (`segments`: paths or URLs), of one tenant or all."""
    connection.execute(f"CREATE OR REPLACE VIEW events AS {events_sql(shards, segments, tenant=tenant)}")


def events_sql(
    shards: Sequence[str], segments: Sequence[str], *, where: str = "", tenant: str | None = None, only: Collection[str] | None = None
) -> str:
    """`events` as one SELECT. An empty head fixes names, order and types, so that older files show new fields as NULL.

    `where` is put at each source: a filter above a union is not pushed into Parquet row groups in every case. `only`
    names the columns to read: each of the 180 that a shard has in its structs costs time in every look-up.
    """
    clauses = [clause for clause in (where, f"tenant = {literal(tenant)}" if tenant is not None else "") if clause]
    condition = f" WHERE {' AND '.join(clauses)}" if clauses else ""
    head = ", ".join(f'CAST(NULL AS {kind}) AS "{name}"' for name, kind in current_columns().items() if only is None or name in only)
    # A shard of an older version may lack some of them, which COLUMNS takes and a list of names does not.
    what = "*" if only is None else f"COLUMNS(lambda c: c IN ({', '.join(map(literal, only))}))"
    parts = [f"SELECT {head} WHERE false"]
    parts += [f"SELECT {what} FROM {shard}.events{condition}" for shard in shards]
    if segments:
        files = ", ".join(literal(url) for url in segments)
        # Keys hold `tenant=…/day=…`, which are not columns; without union_by_name newer columns would be dropped in silence.
        parts.append(f"SELECT {what} FROM read_parquet([{files}], hive_partitioning = false, union_by_name = true){condition}")
    return " UNION ALL BY NAME ".join(parts)


def literal(text: str) -> str:
    """A SQL string. A NUL, at which DuckDB's parser would end the statement, is put together from its number."""
    quoted = ["'" + part.replace("'", "''") + "'" for part in text.split("\0")]
    return quoted[0] if len(quoted) == 1 else f"({' || chr(0) || '.join(quoted)})"


@cache
def describe() -> tuple[ViewHelp, ...]:
    """Every view with its purpose and columns, for help texts."""
    connection = duckdb.connect(":memory:")
    try:
        create(connection)
        purposes = {"events": "one row per event, as it stands in the log", **{name: view[0] for name, view in _VIEWS.items()}}
        return tuple(ViewHelp(name, purpose, _columns_of(connection, name)) for name, purpose in purposes.items())
    finally:
        connection.close()


def _columns_of(connection: duckdb.DuckDBPyConnection, view: str) -> tuple[tuple[str, str], ...]:
    return tuple((row[0], row[1]) for row in connection.execute(f"DESCRIBE {view}").fetchall())
