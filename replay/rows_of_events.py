"""From a session's events to the timeline's rows: one small function per kind, and the runs of tokens beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from replay.runs import STALL_US_MIN, runs
from replay.state import Generation, Recording, Sequence, SessionState
from replay.words import content_text, count, duration, short_id
from schemas import events as e
from store.rows import StoredEvent

Fields = dict[str, Any]
"""The arguments of a `timeline.Row`."""

MESSAGE_CHARACTERS = 300
"""Characters of a message that a row keeps; the view shortens further to its width."""


PACED_US_MIN = 50_000
"""A run shorter than this is one or two packets: its tokens per second would be the network's."""


class Context:
    """What rows need to know beyond their event: the whole session, and a short number for each generation."""

    def __init__(self, state: SessionState) -> None:
        self.state = state
        self.numbers = {generation: i + 1 for i, generation in enumerate(state.generations)}
        self.shown: set[bytes] = set()

    def generation(self, generation_id: bytes) -> Generation:
        """The generation as it stands at the end of the session."""
        return self.state.generations.get(generation_id) or Generation(generation_id)

    def lane(self, generation_id: bytes, index: int | None = None) -> str:
        """The generation's number and, where it has several sequences, the sequence's index."""
        number = self.numbers.get(generation_id, 0)
        generation = self.state.generations.get(generation_id)
        several = generation is not None and len(generation.sequences) > 1
        return f"{number}.{index}" if several and index is not None else f"{number}"


def rows_of_event(context: Context, stored: StoredEvent) -> list[Fields]:
    """The rows of one event; none where the tokens' runs or another row tell it."""
    event = stored.event
    payload: Any = event.payload
    if event.kind in _TOLD_BY_RUNS:
        return []
    generation = context.state.generations.get(getattr(payload, "generation_id", b"") or b"")
    if generation and event.kind in _RECORDED and generation.recording and event.source != generation.recording.source:
        return []  # another source recorded the same; views use one of them
    rule = _RULES.get(event.kind)
    if rule is None:
        found = [{"who": event.source, "what": "event", "text": event.kind.replace("_", " "), "level": "dim"}]
    else:
        found = rule(context, stored, payload)
    common: Fields = {"at": event.recorded_at, "event_id": event.event_id}
    if generation:
        common |= {"generation": generation.generation_id, "lane": context.lane(generation.generation_id)}
    return [{**common, **fields} for fields in found]


def _who(stored: StoredEvent, otherwise: str) -> str:
    return stored.event.actor or otherwise


# session


def _opened(context: Context, stored: StoredEvent, payload: e.SessionOpened) -> list[Fields]:
    facts = [
        payload.client,
        payload.user if payload.user != stored.event.actor else None,
        payload.workflow,
        payload.purpose,
        *(f"#{tag}" for tag in payload.tags),
    ]
    text = " · ".join(fact for fact in facts if fact) or f"tenant {stored.event.tenant}"
    return [{"who": _who(stored, "client"), "what": "session", "text": f"opened · {text}"}]


def _annotated(context: Context, stored: StoredEvent, payload: e.SessionAnnotated) -> list[Fields]:
    facts = [*(f"+{tag}" for tag in payload.tags_added), *(f"-{tag}" for tag in payload.tags_removed)]
    facts += [f"visibility {payload.visibility}"] if payload.visibility else []
    note = payload.content.note if payload.content else None
    return [{"who": _who(stored, stored.event.source), "what": "note", "text": " ".join(facts), "quote": note}]


def _closed(context: Context, stored: StoredEvent, payload: e.SessionClosed) -> list[Fields]:
    return [{"who": _who(stored, stored.event.source), "what": "session", "text": f"closed · {payload.reason}"}]


def _environment(context: Context, stored: StoredEvent, payload: e.EnvironmentCaptured) -> list[Fields]:
    seen = [environment.event for environment in context.state.environments]
    before = next((env for env in reversed(seen[: seen.index(payload)]) if env.origin == payload.origin), None) if payload in seen else None
    text = " · ".join([*environment_facts(payload), f"id {payload.environment_id.hex()[:8]}"])
    if before is None:
        return [{"who": stored.event.source, "what": "env", "text": text}]
    if before.environment_id == payload.environment_id:
        return [{"who": stored.event.source, "what": "env", "text": f"unchanged · {text}", "level": "dim"}]
    changed = changed_keys(before, payload)
    what = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
    return [{"who": stored.event.source, "what": "env", "text": f"CHANGED: {what} · {text}", "level": "warn"}]


def changed_keys(before: e.EnvironmentCaptured, after: e.EnvironmentCaptured) -> list[str]:
    """Names of the items that differ between two captures."""
    old, new = ({pair.key: pair.value for pair in environment.items} for environment in (before, after))
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def environment_facts(environment: e.EnvironmentCaptured) -> list[str]:
    """The few facts that name an environment: kind and version, models."""
    items = {pair.key: _json(pair.value) for pair in environment.items}
    name = " ".join(str(items[key]) for key in ("kind", "version") if items.get(key))
    models = items.get("models")
    ids = [str(model.get("id")) for model in models if isinstance(model, dict)] if isinstance(models, list) else []
    return [fact for fact in (name or environment.origin, ", ".join(ids)) if fact]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# generation


def _submitted(context: Context, stored: StoredEvent, payload: e.RequestSubmitted) -> list[Fields]:
    generation = context.generation(payload.generation_id)
    messages = context.state.messages_of(generation)
    fresh = [message for message in messages if message.message_id not in context.shown]
    context.shown.update(payload.message_ids)
    settings = [
        f"{name}={value:g}"
        for name, value in (("n", payload.n if payload.n != 1 else None), ("T", payload.temperature), ("max", payload.max_tokens))
        if value is not None
    ]
    held = f" ({len(fresh)} new)" if 0 < len(fresh) < len(messages) else ""
    facts = [
        payload.model or "",
        count(len(messages), "message") + held,
        " ".join(settings),
        count(payload.tools, "tool") if payload.tools else "",
    ]
    facts += [f"redacted {pair.count}× {pair.key}" for pair in payload.redactions]
    quote = _said(messages[-1]) if messages else None
    who = stored.event.actor or payload.api_key_id or "client"
    return [{"who": who, "what": "request", "text": " · ".join(fact for fact in facts if fact), "quote": quote}]


def _said(message: e.Message) -> str:
    if message.body is None:
        where = f"[in blob {message.blob.blob_id.hex()[:8]}]" if message.blob else "[not held]"
        return f"{message.role}: {where}"
    body = _json(message.body)
    said = content_text(body.get("content")) if isinstance(body, dict) else str(body)
    return f"{message.role}: {said}"[:MESSAGE_CHARACTERS]


def _hit(context: Context, stored: StoredEvent, payload: e.BreakpointHit) -> list[Fields]:
    limit = f" · {payload.default_action or 'as_is'} after {duration(payload.deadline_us)}" if payload.deadline_us else ""
    return [{"who": stored.event.source, "what": "stopped", "text": f"at breakpoint {payload.breakpoint_id}{limit}", "level": "warn"}]


def _edited(context: Context, stored: StoredEvent, payload: e.RequestEdited) -> list[Fields]:
    patch = _json(payload.content.patch) if payload.content else None
    if patch is None:
        text = f"content {context.state.gone}"
    elif isinstance(patch, list):
        text = ", ".join(_operation(operation) for operation in patch[:3]) + (f" and {len(patch) - 3} more" if len(patch) > 3 else "")
    else:
        text = "patch unreadable"
    undo = f"undo of {short_id(payload.undo_of)}: " if payload.undo_of else ""
    reason = payload.content.reason if payload.content else None
    return [{"who": _who(stored, "somebody"), "what": "edited", "text": undo + text, "quote": reason, "level": "warn"}]


def _operation(operation: Any) -> str:
    if not isinstance(operation, dict):
        return "?"
    value = f" = {json.dumps(operation['value'], ensure_ascii=False)[:60]}" if "value" in operation else ""
    return f"{operation.get('op')} {operation.get('path')}{value}"


def _released(context: Context, stored: StoredEvent, payload: e.BreakpointReleased) -> list[Fields]:
    generation = context.generation(payload.generation_id)
    held = next((p for p in generation.pauses if p.released == payload and p.released_at is not None), None)
    waited = f" after {duration(stored.event.recorded_at - held.hit_at)}" if held else ""
    reason = payload.content.reason if payload.content else None
    level = "plain" if payload.action in ("as_is", "edited") else "warn"
    text = f"{payload.action.replace('_', ' ')}{waited}"
    return [{"who": _who(stored, stored.event.source), "what": "released", "text": text, "quote": reason, "level": level}]


def _started(context: Context, stored: StoredEvent, payload: e.GenerationStarted) -> list[Fields]:
    answered = f"status {payload.status} " if payload.status else ""
    facts = [f"{answered}after {duration(payload.offset_us)}", f"attempt {payload.attempt}" if payload.attempt > 1 else ""]
    facts += [count(payload.prompt_tokens, "prompt token") if payload.prompt_tokens else "", payload.upstream_id or ""]
    return [{"who": "upstream", "what": "answered", "text": " · ".join(fact for fact in facts if fact)}]


def _tool_call(context: Context, stored: StoredEvent, payload: e.ToolCall) -> list[Fields]:
    content = payload.content
    text = (content.name or "unnamed") if content else f"content {context.state.gone}"
    lane = context.lane(payload.generation_id, payload.index)
    return [{"who": "upstream", "what": "tool call", "text": text, "quote": content.arguments if content else None, "lane": lane}]


def _sequence_finished(context: Context, stored: StoredEvent, payload: e.SequenceFinished) -> list[Fields]:
    generation = context.generation(payload.generation_id)
    if len(generation.sequences) < 2:
        return []  # the generation's own end tells it
    lane = context.lane(payload.generation_id, payload.index)
    text = f"{payload.finish_reason or 'no reason given'} · {count(payload.tokens, 'token')}"
    return [{"who": "upstream", "what": "ended", "text": text, "lane": lane, "index": payload.index, "level": "dim"}]


def _finished(context: Context, stored: StoredEvent, payload: e.GenerationFinished) -> list[Fields]:
    generation = context.generation(payload.generation_id)
    ends = [s.finished.finish_reason or "no reason given" for s in generation.sequences if s.finished]
    facts = [
        ends[0] if len(generation.sequences) == 1 and ends else "",
        count(payload.tokens_recorded, "token"),
        f"in {duration(payload.offset_us)}",
    ]
    said = payload.completion_tokens
    differs = said is not None and said != payload.tokens_recorded
    facts += [f"upstream counted {said:,}" if differs else "", f"{payload.cached_tokens:,} cached" if payload.cached_tokens else ""]
    return [{"who": "upstream", "what": "finished", "text": " · ".join(fact for fact in facts if fact), "level": "good"}]


def _failed(context: Context, stored: StoredEvent, payload: e.GenerationFailed) -> list[Fields]:
    generation = context.generation(payload.generation_id)
    facts = [payload.error_type.replace("_", " "), f"status {payload.status}" if payload.status else ""]
    facts += [
        f"after {count(payload.position, 'token')}" if payload.position else "before the first token",
        _silence(generation.recording, payload),
    ]
    facts += ["may be retried" if payload.retryable else ""]
    message = payload.content.message if payload.content else None
    return [{"who": payload.origin, "what": "FAILED", "text": " · ".join(f for f in facts if f), "quote": message, "level": "bad"}]


def _silence(recording: Recording | None, payload: e.GenerationFailed) -> str:
    """How long nothing had come when it failed, where that was long."""
    ends = [chunk.offsets_us[-1] for sequence in (recording.lanes if recording else []) for chunk in sequence.chunks if chunk.offsets_us]
    silent = payload.offset_us - max(ends, default=0)
    return f"silent for {duration(silent)}" if silent > STALL_US_MIN else ""


def _kv(context: Context, stored: StoredEvent, payload: e.KvOperation) -> list[Fields]:
    text = f"{payload.operation} {payload.connector} · {payload.outcome}"
    return [{"who": stored.event.source, "what": "kv", "text": text, "level": "dim" if payload.outcome == "ok" else "warn"}]


def _lost(context: Context, stored: StoredEvent, payload: e.RecordsLost) -> list[Fields]:
    kinds = ", ".join(f"{pair.count:,} {pair.key}" for pair in payload.kinds)
    text = f"{count(payload.count, 'event')} lost: {payload.reason}" + (f" · {kinds}" if kinds else "")
    return [{"who": "recorder", "what": "LOST", "text": text, "level": "bad"}]


# replay and custody


def _replay_started(context: Context, stored: StoredEvent, payload: e.ReplayStarted) -> list[Fields]:
    facts = [payload.mode, f"of session …{short_id(payload.subject_session)}", payload.engine, "strict" if payload.strict else ""]
    differing = [difference.key for difference in payload.differences]
    facts += [f"{count(len(differing), 'environment difference')}: {', '.join(differing[:4])}" if differing else "same environment"]
    return [
        {
            "who": _who(stored, "replay"),
            "what": "replay",
            "text": " · ".join(f for f in facts if f),
            "level": "warn" if differing else "plain",
        }
    ]


def _compared(context: Context, stored: StoredEvent, payload: e.SequenceCompared) -> list[Fields]:
    facts = [payload.verdict.replace("_", " "), f"{payload.tokens_scored} of {payload.tokens} tokens scored", payload.reason or ""]
    who = f"…{short_id(payload.generation_id)}.{payload.index}"
    return [
        {"who": "engine", "what": "compared", "text": " · ".join([who, *(f for f in facts if f)]), "level": verdict_level(payload.verdict)}
    ]


def _replay_finished(context: Context, stored: StoredEvent, payload: e.ReplayFinished) -> list[Fields]:
    facts = [payload.verdict.replace("_", " ").upper(), payload.reason or "", f"in {duration(payload.duration_us)}"]
    return [{"who": "replay", "what": "verdict", "text": " · ".join(f for f in facts if f), "level": verdict_level(payload.verdict)}]


def verdict_level(verdict: str) -> str:
    """How a verdict is coloured."""
    return {"identical": "good", "numeric_drift": "good", "inconclusive": "warn"}.get(verdict, "bad")


def _access(context: Context, stored: StoredEvent, payload: e.AccessLogged) -> list[Fields]:
    text = f"{payload.operation} · {payload.outcome}"
    return [{"who": _who(stored, stored.event.source), "what": "access", "text": text, "level": "dim"}]


_TOLD_BY_RUNS = frozenset({"sequence_started", "token_chunk"})
"""Kinds without rows of their own; they are most of a session's events."""

_RECORDED = frozenset({"generation_started", "tool_call", "sequence_finished", "generation_finished"})
"""Kinds that two sources may both record of one generation."""

_RULES: dict[str, Callable[[Context, StoredEvent, Any], list[Fields]]] = {
    "session_opened": _opened,
    "session_annotated": _annotated,
    "session_closed": _closed,
    "environment_captured": _environment,
    "request_submitted": _submitted,
    "breakpoint_hit": _hit,
    "request_edited": _edited,
    "breakpoint_released": _released,
    "generation_started": _started,
    "tool_call": _tool_call,
    "sequence_finished": _sequence_finished,
    "generation_finished": _finished,
    "generation_failed": _failed,
    "kv_operation": _kv,
    "records_lost": _lost,
    "replay_started": _replay_started,
    "sequence_compared": _compared,
    "replay_finished": _replay_finished,
    "access_logged": _access,
}


# tokens


def rows_of_tokens(context: Context, generation: Generation) -> list[Fields]:
    """First token, runs and stalls of a generation's sequences."""
    recording = generation.recording
    zero = recording_zero(generation)
    if recording is None or zero is None:
        return []
    found: list[Fields] = []
    first_us = recording.first_token_us
    if first_us is not None:
        common = {"generation": generation.generation_id, "lane": context.lane(generation.generation_id), "who": "upstream"}
        found.append({**common, "at": zero + first_us, "what": "1st token", "text": f"after {duration(first_us)}", "events": 0})
    for sequence in recording.lanes:
        found += _rows_of_sequence(context, generation, sequence, zero)
    return found


def recording_zero(generation: Generation) -> int | None:
    """The wall clock at offset 0 of what views use."""
    recording = generation.recording
    return recording.zero_at if recording and recording.zero_at is not None else generation.submitted_at


def _rows_of_sequence(context: Context, generation: Generation, sequence: Sequence, zero: int) -> list[Fields]:
    lane = context.lane(generation.generation_id, sequence.index)
    common: Fields = {"generation": generation.generation_id, "index": sequence.index, "lane": lane, "who": "upstream"}
    found: list[Fields] = []
    for run in runs(sequence):
        if run.stall_us is not None:
            medians = f" · {run.stall_medians:,}× median gap" if run.stall_medians else ""
            at = zero + run.start_us - run.stall_us
            text = f"{duration(run.stall_us)} after token {run.first - 1}{medians}"
            found.append({**common, "at": at, "until": zero + run.start_us, "what": "stall", "text": text, "level": "warn", "events": 0})
        channel = "" if run.channel == "content" else f"{run.channel} "
        span = f"{run.first}–{run.last}" if run.tokens > 1 else f"{run.first}"
        took_us = run.end_us - run.start_us
        took = f"in {duration(took_us)}" if took_us else "at once" if run.tokens > 1 else ""
        pace = f"{run.rate:,.1f}/s" if run.rate and took_us >= PACED_US_MIN else ""
        gap = f"gap ≤ {duration(run.gap_us_max)}" if run.tokens > 2 and took_us else ""
        facts = [f"{channel}{span} {took}".strip(), pace, gap]
        text = " · ".join(fact for fact in facts if fact)
        times = {"at": zero + run.start_us, "until": zero + run.end_us, "events": run.tokens, "pace": run.pace}
        found.append({**common, **times, "what": "tokens", "text": text, "quote": "[erased]" if run.text is None else run.text})
    return found


def open_row(context: Context, generation: Generation) -> Fields:
    """What was still open when the session's events end."""
    at = context.state.last_at or 0
    since = f" for {duration(at - generation.submitted_at)}" if generation.submitted_at is not None else ""
    common = {"generation": generation.generation_id, "lane": context.lane(generation.generation_id), "at": at, "events": 0}
    return {**common, "who": "", "what": "open", "text": f"{generation.status}{since} when the record ends", "level": "warn"}


def silence_row(context: Context, start: int, end: int) -> Fields:
    """A stretch of time without an event: idle, or somebody was kept waiting."""
    text, common = duration(end - start), {"at": start + 1, "until": end, "who": "", "events": 0}
    waiting = [g for g in context.state.generations.values() if _open_during(g, start, end)]
    if not waiting:
        return {**common, "what": "quiet", "text": f"{text} without a request under way", "level": "dim"}
    lane = context.lane(waiting[0].generation_id) if len(waiting) == 1 else ""
    if all(_paused_during(generation, start, end) for generation in waiting):
        return {**common, "what": "quiet", "lane": lane, "text": f"{text} stopped at a breakpoint", "level": "dim"}
    return {
        **common,
        "what": "SILENCE",
        "lane": lane,
        "text": f"{text} with {count(len(waiting), 'generation')} under way",
        "level": "warn",
    }


def _open_during(generation: Generation, start: int, end: int) -> bool:
    """Whether a generation was under way from start to end."""
    recording = generation.recording
    failed = recording.failures[0].at if recording and len(recording.failures) else None
    ended = failed if failed is not None else recording.finished_at if recording else None
    return generation.submitted_at is not None and generation.submitted_at <= start and (ended is None or ended >= end)


def _paused_during(generation: Generation, start: int, end: int) -> bool:
    return any(pause.hit_at <= start and (pause.released_at is None or pause.released_at >= end) for pause in generation.pauses)
