"""Recorded runs of engines as commands and the API look at them: which there are, steps over time, who shared one, the KV connector."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from replay.kv import Call, Report, report
from replay.words import uuid
from schemas.enginerun.sessions import steps_session
from schemas.errors import UnknownName
from store.reader import blob
from store.views import literal
from tokentape.installation import Installation

RUNS = """
    WITH steps AS (
        SELECT engine_run, count(*) AS steps, min(recorded_at) AS began, max(recorded_at) AS last, sum(preempted) AS preempted,
            max(running) AS running_max
        FROM engine_steps GROUP BY engine_run
    ), stepped AS (
        SELECT uuid_text(session_id) AS run, count(DISTINCT request_submitted.generation_id) AS generations,
            any_value(request_submitted.model) AS model
        FROM events WHERE kind = 'request_submitted' AND source = 'engine' GROUP BY session_id
    ), opened AS (
        SELECT session_id, uuid_text(session_opened.parent_session) AS run FROM events
        WHERE kind = 'session_opened' AND session_opened.purpose = 'engine steps'
    ), closed AS (
        SELECT run, any_value(session_closed.reason) AS reason FROM events JOIN opened USING (session_id)
        WHERE kind = 'session_closed' GROUP BY run
    )
    SELECT s.engine_run, CASE c.reason WHEN 'engine ended' THEN 'ended' WHEN 'engine was cut off' THEN 'cut off' ELSE
            coalesce(c.reason, 'recording') END AS state,
        s.began, CASE WHEN c.reason IS NOT NULL THEN s.last END AS ended, coalesce(t.generations, 0) AS generations, s.steps,
        s.running_max, s.preempted, t.model
    FROM steps s LEFT JOIN stepped t ON t.run = s.engine_run LEFT JOIN closed c ON c.run = s.engine_run ORDER BY s.began DESC"""
OVERVIEW = """
    SELECT engine_step.step // {every} * {every} AS step, epoch_us(min(recorded_at)) AS at, count(*) AS steps,
        sum(engine_step.duration_us) / 1000 AS duration_ms, max(len(engine_step.entries)) AS batch_max,
        max(engine_step.waiting) AS waiting, max(engine_step.running) AS running, max(engine_step.kv_used) AS kv_used,
        CAST(sum(engine_step.preempted) AS BIGINT) AS preempted,
        CAST(sum(list_sum(list_transform(engine_step.entries, lambda x: x.tokens))) AS BIGINT) AS tokens
    FROM events GROUP BY ALL ORDER BY 1"""
WINDOW = """
    SELECT engine_step.step AS step, epoch_us(recorded_at) AS at, engine_step.duration_us / 1000 AS duration_ms,
        engine_step.waiting AS waiting, engine_step.running AS running, engine_step.preempted AS preempted,
        engine_step.kv_used AS kv_used, list_transform(engine_step.entries, lambda x: {{'generation_id':
            CAST(CAST(x.generation_id AS UUID) AS VARCHAR), 'index': x."index", 'tokens': x.tokens}}) AS entries
    FROM events WHERE engine_step.step >= {first} ORDER BY 1 LIMIT {limit}"""
ASKED = """
    SELECT CAST(CAST(request_submitted.generation_id AS UUID) AS VARCHAR) AS generation_id,
        CAST(CAST(session_id AS UUID) AS VARCHAR) AS session_id
    FROM events WHERE hex(request_submitted.generation_id) IN ({ids}) ORDER BY source = 'engine'"""
ASKED_US = 3_600_000_000
"""A request whose steps are shown is looked for among what was recorded within an hour of them."""
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
    last = _steps(installation, engine_run, "SELECT max(engine_step.step) AS last FROM events", tenant)[0]["last"]
    if last is None:
        hint = "`tokentape engine-runs` lists them; engine.capture = on records one"
        raise UnknownName(f"no engine run {uuid(engine_run)}", operation="engine run", hint=hint)
    every = 1 + int(last) // POINTS
    found = _steps(installation, engine_run, OVERVIEW.format(every=every), tenant)
    return {"engine_run": uuid(engine_run), "every": every, "last": int(last), **{name: [row[name] for row in found] for name in found[0]}}


def window(installation: Installation, engine_run: bytes, first: int, limit: int, tenant: str | None = None) -> dict[str, Any]:
    """Steps from one on, each with who was in it and with how many tokens; and whose session each generation is."""
    found = _steps(installation, engine_run, WINDOW.format(first=first, limit=limit), tenant)
    ids = sorted({entry["generation_id"] for row in found for entry in row["entries"]})
    sessions: dict[str, str] = {}
    if ids:
        near = installation.catalog.snapshot(time=(found[0]["at"] - ASKED_US, found[-1]["at"] + ASKED_US))
        statement = ASKED.format(ids=", ".join(literal(UUID(each).hex.upper()) for each in ids))
        only = ("kind", "session_id", "source", "tenant", "request_submitted")
        for row in installation.reader.ask(near, statement, _of("kind = 'request_submitted'", tenant), only).to_pylist():
            sessions.setdefault(row["generation_id"], row["session_id"])
    return {"engine_run": uuid(engine_run), "steps": found, "sessions": sessions}


def _steps(installation: Installation, engine_run: bytes, statement: str, tenant: str | None) -> list[dict[str, Any]]:
    """What a statement over the steps of one run gives. They stand in one session, so that little else is read."""
    session = steps_session(engine_run)
    where = f"kind = 'engine_step' AND session_id BETWEEN {blob(session)} AND {blob(session)}"
    only = ("kind", "session_id", "tenant", "recorded_at", "engine_step")
    found = installation.reader.ask(installation.catalog.snapshot(session=session), statement, _of(where, tenant), only)
    rows: list[dict[str, Any]] = found.to_pylist()
    return rows


def _of(where: str, tenant: str | None) -> str:
    return where if tenant is None else f"{where} AND tenant = {literal(tenant)}"


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
