"""Recorded runs of engines as commands and the API look at them: which there are, steps over time, who shared one, the KV connector."""

from __future__ import annotations

from typing import Any

from replay.kv import Call, Report, report
from replay.words import uuid
from schemas.enginerun.sessions import steps_session
from schemas.errors import UnknownName
from store.views import literal
from tokentape.installation import Installation

RUNS = """
    WITH steps AS (
        SELECT engine_run, count(*) AS steps, min(recorded_at) AS began, max(recorded_at) AS ended, sum(preempted) AS preempted,
            max(running) AS running_max
        FROM engine_steps GROUP BY engine_run
    ), stepped AS (
        SELECT uuid_text(session_id) AS run, count(DISTINCT request_submitted.generation_id) AS generations,
            any_value(request_submitted.model) AS model
        FROM events WHERE kind = 'request_submitted' AND source = 'engine' GROUP BY session_id
    )
    SELECT s.engine_run, s.began, s.ended, coalesce(t.generations, 0) AS generations, s.steps, s.running_max, s.preempted, t.model
    FROM steps s LEFT JOIN stepped t ON t.run = s.engine_run ORDER BY s.began DESC"""
_STEPS = "(SELECT * FROM engine_steps WHERE session_id = {session})"
OVERVIEW = """
    SELECT step // {every} * {every} AS step, epoch_us(min(recorded_at)) AS at, count(*) AS steps, sum(duration_ms) AS duration_ms,
        avg(len(entries)) AS batch, max(len(entries)) AS batch_max, max(waiting) AS waiting, max(running) AS running,
        max(kv_used) AS kv_used, sum(preempted) AS preempted,
        CAST(sum(list_sum(list_transform(entries, lambda x: x.tokens))) AS BIGINT) AS tokens
    FROM {steps} GROUP BY ALL ORDER BY 1"""
WINDOW = """
    SELECT step, epoch_us(recorded_at) AS at, duration_ms, waiting, running, preempted, kv_used, entries
    FROM {steps} WHERE step >= {first} ORDER BY step LIMIT {limit}"""
ASKED = """
    SELECT uuid_text(request_submitted.generation_id) AS generation_id, uuid_text(session_id) AS session_id, source
    FROM events WHERE kind = 'request_submitted' AND uuid_text(request_submitted.generation_id) IN ({ids}) ORDER BY source = 'engine'"""
POINTS = 500
"""Steps of an overview: a longer run is told in stretches of several."""

SESSIONS = """
    SELECT DISTINCT session_id FROM kv_operations WHERE session_id = {session} OR generation_id IN (
        SELECT uuid_text(request_submitted.generation_id) FROM events
        WHERE kind = 'request_submitted' AND uuid_text(session_id) = {session})
    UNION
    SELECT uuid_text(session_id) FROM events WHERE kind = 'session_opened' AND uuid_text(session_opened.parent_session) = {session}
        AND session_opened.purpose = 'kv operations'"""
"""Sessions of KV operations that belong to an engine run, to a client's session, or are the one that was named."""
CALLS = "SELECT * FROM kv_operations WHERE session_id IN ({sessions}) ORDER BY recorded_at"
PROMPTS = """
    SELECT uuid_text(generation_started.generation_id) AS generation_id, generation_started.content.prompt_token_ids AS ids
    FROM events WHERE kind = 'generation_started' AND source = 'engine' AND uuid_text(generation_started.generation_id) IN (
        SELECT generation_id FROM kv_operations WHERE session_id IN ({sessions}) AND operation = 'lookup')"""
OWN = """
    SELECT DISTINCT uuid_text(request_submitted.generation_id) AS id FROM events
    WHERE kind = 'request_submitted' AND uuid_text(session_id) = {session}"""


def overview(installation: Installation, engine_run: bytes, tenant: str | None = None) -> dict[str, Any]:
    """A whole run in at most `POINTS` stretches of equally many steps, column by column; times are µs since the epoch.

    Raises:
        UnknownName: no step of this run is on the tape, or none that this tenant may see.
    """
    steps = _STEPS.format(session=literal(uuid(steps_session(engine_run))))
    last = _rows(installation, f"SELECT max(step) AS last FROM {steps}", tenant)[0]["last"]
    if last is None:
        hint = "`tokentape engine-runs` lists them; engine.capture = on records one"
        raise UnknownName(f"no engine run {uuid(engine_run)}", operation="engine run", hint=hint)
    every = 1 + int(last) // POINTS
    found = _rows(installation, OVERVIEW.format(every=every, steps=steps), tenant)
    return {"engine_run": uuid(engine_run), "every": every, "last": int(last), **{name: [row[name] for row in found] for name in found[0]}}


def window(installation: Installation, engine_run: bytes, first: int, limit: int, tenant: str | None = None) -> dict[str, Any]:
    """Steps from one on, each with who was in it and with how many tokens; and whose session each generation is."""
    steps = _STEPS.format(session=literal(uuid(steps_session(engine_run))))
    found = _rows(installation, WINDOW.format(steps=steps, first=first, limit=limit), tenant)
    ids = {entry["generation_id"] for row in found for entry in row["entries"]}
    asked = _rows(installation, ASKED.format(ids=", ".join(map(literal, sorted(ids)))), tenant) if ids else []
    sessions: dict[str, str] = {}
    for row in asked:
        sessions.setdefault(row["generation_id"], row["session_id"])
    return {"engine_run": uuid(engine_run), "steps": found, "sessions": sessions}


def kv_report(installation: Installation, session: str, tenant: str | None = None) -> Report:
    """What the KV connector of an engine run, or of the engines behind a client's session, found and why not.

    Raises:
        UnknownSession: no connector was recorded.
    """
    sessions = ", ".join(literal(row["session_id"]) for row in _rows(installation, SESSIONS.format(session=literal(session)), tenant))
    if not sessions:
        return report([], {})
    calls = [Call.of(row) for row in _rows(installation, CALLS.format(sessions=sessions), tenant)]
    prompts = {row["generation_id"]: row["ids"] or [] for row in _rows(installation, PROMPTS.format(sessions=sessions), tenant)}
    own = {row["id"] for row in _rows(installation, OWN.format(session=literal(session)), tenant)}
    return report(calls, prompts, own or None)


def _rows(installation: Installation, statement: str, tenant: str | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = installation.sql.query(statement, tenant=tenant).table.to_pylist()
    return rows
