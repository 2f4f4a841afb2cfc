"""The list of sessions as SQL: what is read of a shard or segment, and what is put together from that.

A part has up to four rows per session, each from a query over the kinds of events that it is about. Chunks of tokens are most of the
events, and only counted: read with the others, each of them would be asked for the twenty columns that it has not. Ends and first words
have their own because a query that looks at its events twice keeps a copy of all their columns, which took longer than all the rest.
"""

from __future__ import annotations

_FIRST = (
    "regexp_extract(list_filter(request_submitted.content.messages, lambda m: m.role = 'user')[1].body, "
    r"""'(?:"(?:content|text)"\s*:\s*|^\s*)"((?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u]){1,200})', 1)"""
)  # the beginning of what a user said first, as JSON text: whole bodies of every session would not fit into memory
_ADDED = "list_concat(session_opened.tags, session_annotated.tags_added)"

_HEAD = ("kind", "session_id", "tenant")
_SHOWN = (
    "max({'place': \"offset\", 'visibility': session_annotated.visibility, 'by': actor}) FILTER (session_annotated.visibility IS NOT NULL)"
)

PART = f"""
    SELECT session_id, any_value(tenant) AS tenant,
        epoch_us(min(recorded_at)) AS first_at, epoch_us(max(recorded_at)) AS last_at,
        count(*) AS events, count(access_logged) AS looks, count(request_submitted) AS requests, count(generation_failed) AS failures,
        count(request_edited) AS edits, count(breakpoint_hit) AS stops, count(replay_started) AS replays,
        CAST(NULL AS BIGINT) AS ended, CAST(NULL AS BIGINT) AS tokens, CAST(NULL AS STRUCT(place BIGINT, "text" VARCHAR)) AS first_said,
        any_value(actor) FILTER (kind = 'session_opened') AS opened_by, any_value(actor) AS actor,
        any_value(session_opened."user") AS "user",
        any_value(session_opened.workflow) AS workflow, any_value(session_opened.purpose) AS purpose,
        any_value(session_opened.client) AS client, any_value(session_opened.content.title) AS title,
        list(DISTINCT request_submitted.model) FILTER (request_submitted.model IS NOT NULL) AS models,
        list({{'place': "offset" * 2 + 1, 'tags': {_ADDED}, 'there': true}}) FILTER (len({_ADDED}) > 0) AS added,
        list({{'place': "offset" * 2, 'tags': session_annotated.tags_removed, 'there': false}})
            FILTER (len(session_annotated.tags_removed) > 0) AS removed,
        {_SHOWN} AS shown
    FROM events GROUP BY session_id"""
PART_OF_ENDS = """
    SELECT session_id, CAST(sum(tokens) AS BIGINT) AS tokens, count(*) FILTER (ended) AS ended FROM (
        SELECT session_id, greatest(coalesce(sum(sequence_finished.tokens), 0), coalesce(max(generation_failed.position), 0)) AS tokens,
            bool_or(kind <> 'sequence_finished') AS ended,
            coalesce(sequence_finished.generation_id, generation_failed.generation_id, generation_finished.generation_id) AS generation
        FROM events GROUP BY session_id, generation
    ) GROUP BY session_id"""
PART_OF_WORDS = f"""
    SELECT session_id, min({{'place': place, 'text': said}}) AS first_said FROM (
        WITH first AS MATERIALIZED (SELECT session_id, "offset" AS place, {_FIRST} AS said FROM events) SELECT * FROM first
    ) WHERE len(said) > 0 GROUP BY session_id"""
PART_OF_CHUNKS = """
    SELECT session_id, any_value(tenant) AS tenant, epoch_us(min(recorded_at)) AS first_at, epoch_us(max(recorded_at)) AS last_at,
        count(*) AS events, 0 AS looks, 0 AS requests, 0 AS failures, 0 AS edits, 0 AS stops, 0 AS replays, any_value(actor) AS actor
    FROM events GROUP BY session_id"""
NEWS = f"SELECT session_id, {_SHOWN} AS shown FROM events GROUP BY session_id HAVING shown IS NOT NULL"
NEWS_COLUMNS = (*_HEAD, "actor", "offset", "session_annotated")
REPLAYS = """
    SELECT coalesce(replay_started.replay_id, sequence_compared.replay_id, replay_finished.replay_id) AS replay,
        any_value(session_id) AS session, any_value(replay_started.subject_session) AS subject, any_value(replay_started.engine) AS engine,
        any_value(replay_started.mode) AS mode, any_value(replay_finished.verdict) AS verdict, any_value(replay_finished.reason) AS reason,
        any_value(replay_finished.tokens) AS scored, max(sequence_compared.drift_max) AS drift_max,
        max(sequence_compared.noise_floor) AS noise_floor, epoch_us(min(recorded_at)) AS begun_at, epoch_us(max(recorded_at)) AS moment
    FROM events GROUP BY ALL"""
_COUNTED = (
    "recorded_at", "actor", "offset", "session_opened", "session_annotated", "request_submitted", "generation_failed", "request_edited",
    "breakpoint_hit", "replay_started", "access_logged",
)  # fmt: skip
_ENDS, _REPLAYS = (
    ("sequence_finished", "generation_failed", "generation_finished"),
    ("replay_started", "sequence_compared", "replay_finished"),
)
READ = (
    ("part", PART, "kind <> 'token_chunk'", (*_HEAD, *_COUNTED)),
    ("part", PART_OF_CHUNKS, "kind = 'token_chunk'", (*_HEAD, "recorded_at", "actor")),
    ("part", PART_OF_ENDS, f"kind IN {_ENDS}", (*_HEAD, *_ENDS)),
    ("part", PART_OF_WORDS, "kind = 'request_submitted'", (*_HEAD, "offset", "request_submitted")),
    ("replay", REPLAYS, f"kind IN {_REPLAYS}", (*_HEAD, "recorded_at", *_REPLAYS)),
)
"""What is read of a shard or segment: into which table, by which query, over which events, and which columns they need."""
REPLAYED = """
    SELECT replay, any_value(session) AS session, any_value(subject) AS subject, any_value(engine) AS engine, any_value(mode) AS mode,
        any_value(verdict) AS verdict, any_value(reason) AS reason, any_value(scored) AS scored, max(drift_max) AS drift_max,
        max(noise_floor) AS noise_floor, min(begun_at) AS begun_at, max(moment) AS moment
    FROM replay GROUP BY replay"""
OF_RUN = """
    SELECT r.*, s.workflow AS run FROM replayed r JOIN session s ON s.session_id = r.session
    WHERE r.session IN (SELECT session_id FROM session WHERE {may}) AND r.subject IN (SELECT session_id FROM session WHERE {may})"""
SEVERITY = ("model_differs", "sampling_differs", "inconclusive", "numeric_drift", "identical")

# Within one event a tag that is both added and removed is gone, as in the view `sessions`: the added one has the smaller place there.
SESSIONS = """
    WITH told AS (
        SELECT session_id, list_sort(flatten(list(list_concat(coalesce(added, []), coalesce(removed, []))))) AS said
        FROM {part} GROUP BY ALL
    ), each AS (
        SELECT session_id, unnest(said) AS one FROM told
    ), flat AS (
        SELECT session_id, one.place AS place, one.there AS there, unnest(one.tags) AS tag FROM each
    ), tagged AS (
        SELECT session_id, tag, arg_max(there, CASE WHEN there THEN place - 1 ELSE place + 1 END) AS there FROM flat GROUP BY ALL
    ), labels AS (
        SELECT session_id, list(tag ORDER BY tag) AS tags FROM tagged WHERE there GROUP BY ALL
    ), verdicts AS (
        SELECT subject AS session_id, arg_max(verdict, moment) AS verdict, count(*) AS replayed
        FROM replayed WHERE subject IS NOT NULL GROUP BY subject
    ), summed AS (
        SELECT session_id, any_value(tenant) AS tenant, min(first_at) AS first_at, max(last_at) AS last_at,
            CAST(sum(events) AS BIGINT) AS events, CAST(sum(requests) AS BIGINT) AS requests, CAST(sum(failures) AS BIGINT) AS failures,
            CAST(sum(edits) AS BIGINT) AS edits, CAST(sum(stops) AS BIGINT) AS stops, CAST(sum(replays) AS BIGINT) AS replays,
            CAST(greatest(0, sum(requests) - coalesce(sum(ended), 0)) AS BIGINT) AS under_way, min(first_said) AS first_said,
            CAST(coalesce(sum(tokens), 0) AS BIGINT) AS tokens,
            coalesce(any_value(opened_by), any_value(actor)) AS owner, any_value("user") AS "user", any_value(workflow) AS workflow,
            any_value(purpose) AS purpose, any_value(client) AS client, any_value(title) AS title,
            list_sort(list_distinct(flatten(list(coalesce(models, []))))) AS models, max(shown) AS shown
        FROM {part} GROUP BY session_id HAVING sum(events) > sum(looks)
    )
    SELECT s.* EXCLUDE (shown, first_said), s.first_said.text AS first_message,
        coalesce(s.shown.visibility, 'team') AS visibility, s.shown.by AS shown_by, s.shown.place AS shown_at,
        coalesce(l.tags, []) AS tags, v.verdict AS verdict, coalesce(v.replayed, 0) AS replayed
    FROM summed s LEFT JOIN labels l USING (session_id) LEFT JOIN verdicts v USING (session_id)"""
