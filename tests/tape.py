"""Sessions written by hand for the tests of replay: a tape that numbers its events, and an incident worth looking at."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from schemas import events as e
from schemas.enginerun.sessions import steps_session
from schemas.environment import capture
from store.rows import StoredEvent

START = 1_795_442_717_123_456
"""2026-11-23 14:05:17.123456 UTC."""


def ident(name: str) -> bytes:
    """A 16-byte id that the same name always gives."""
    return hashlib.sha256(name.encode()).digest()[:16]


class Tape:
    """One session's events as the log would hold them; `at` is in ms after START."""

    def __init__(self, session: str = "session") -> None:
        self.session_id = ident(session)
        self.events: list[StoredEvent] = []
        self._held: set[bytes] = set()

    def add(self, payload: e.Payload, ms: float = 0.0, *, source: e.Source = "gateway", actor: str = "") -> StoredEvent:
        """Append an event recorded `ms` after START."""
        seq = len(self.events)
        event = e.Event(
            event_id=ident(f"{self.session_id.hex()} {seq}"),
            session_id=self.session_id,
            salt=ident("salt"),
            tenant="acme",
            actor=actor,
            source=source,
            producer_id=hashlib.sha256(source.encode() + self.session_id).digest()[:8],
            producer_seq=seq,
            recorded_at=START + round(ms * 1000),
            payload=payload,
        )
        stored = StoredEvent(event, "log", 0, 100 + seq, event.recorded_at + 700)
        self.events.append(stored)
        return stored

    def request(self, name: str, messages: Sequence[dict[str, Any]], ms: float, **fields: Any) -> bytes:
        """A request of these messages; bodies the session holds already are not repeated, as the gateway does it."""
        pairs = [(hashlib.sha256(json.dumps(message).encode()).digest()[:16], message) for message in messages]
        fresh = [
            e.Message(message_id=key, role=message["role"], body=json.dumps(message)) for key, message in pairs if key not in self._held
        ]
        self._held.update(key for key, _ in pairs)
        parameters = fields.pop("parameters", {"model": "tiny", "stream": True})
        content = e.RequestContent(messages=fresh, parameters=json.dumps(parameters))
        actor, source = fields.pop("actor", "user:42"), fields.pop("source", "gateway")
        defaults: dict[str, Any] = {"endpoint": "/v1/chat/completions", "model": "tiny", "stream": True, "temperature": 0.8}
        ids = [key for key, _ in pairs]
        payload = e.RequestSubmitted(generation_id=ident(name), message_ids=ids, content=content, **{**defaults, **fields})
        self.add(payload, ms, actor=actor, source=source)
        return payload.generation_id

    def started(self, generation: bytes, ms: float, offset_ms: float, prompt_ids: Sequence[int] = (), **fields: Any) -> None:
        """The upstream answered."""
        content = e.GenerationContent(prompt_token_ids=list(prompt_ids)) if prompt_ids else None
        defaults: dict[str, Any] = {"status": 200, "authoritative": "gateway", "prompt_tokens": len(prompt_ids) or None}
        self.add(
            e.GenerationStarted(generation_id=generation, offset_us=round(offset_ms * 1000), content=content, **{**defaults, **fields}), ms
        )

    def tokens(
        self,
        generation: bytes,
        zero_ms: float,
        offsets_ms: Sequence[float],
        texts: Sequence[str],
        *,
        index: int = 0,
        position: int = 0,
        channel: str = "content",
        ids: Sequence[int] = (),
        logprobs: Sequence[float] = (),
        alternatives: e.ChunkAlternatives | None = None,
    ) -> None:
        """One chunk: its offsets count from `zero_ms`, when the request was forwarded."""
        lengths = [len(text) for text in texts]
        content = e.ChunkContent(
            token_ids=list(ids), text="".join(texts), lengths=lengths, logprobs=list(logprobs), alternatives=alternatives
        )
        offsets = [round(ms * 1000) for ms in offsets_ms]
        chunk = e.TokenChunk(generation_id=generation, index=index, position=position, channel=channel, offsets_us=offsets, content=content)
        self.add(chunk, zero_ms + offsets_ms[-1] + 40)


def environment(version: str = "0.32.0", **items: Any) -> e.EnvironmentCaptured:
    """What a capture over HTTP looks like."""
    found = {"kind": "vllm", "version": version, "models": [{"id": "tiny", "max_model_len": 2048}], **items}
    return capture([(key, json.dumps(value)) for key, value in found.items()], origin="http", unknown=["weights"])


TEXT = (
    "The incident began at nine in the morning, when the answers of the assistant became slow and then stopped in mid-sentence. "
    "To find the cause, read the timeline from the failure backwards; compare the tokens, their times and their probabilities."
)
WORDS = TEXT.split()


def stream(
    tape: Tape,
    generation: bytes,
    zero_ms: float,
    first_ms: float,
    count: int,
    *,
    gap_ms: float = 24.0,
    index: int = 0,
    stall_at: int | None = None,
    stall_ms: float = 0.0,
    channel: str = "content",
    position: int = 0,
) -> float:
    """`count` tokens of WORDS with uneven gaps, in chunks as the recorder coalesces them; returns the last offset in ms."""
    rng = random.Random(f"{generation.hex()} {index}")
    offsets, at = [], first_ms
    for i in range(count):
        at += stall_ms if i == stall_at else 0.0
        offsets.append(at)
        at += gap_ms * rng.uniform(0.6, 1.5)
    texts = [f"{WORDS[i % len(WORDS)]} " for i in range(count)]
    i = 0
    while i < count:
        j = i + 1
        while j < count and offsets[j] - offsets[i] < 50.0:
            j += 1
        ids = [rng.randrange(768) for _ in range(i, j)]
        logprobs = [-rng.expovariate(1.0) for _ in range(i, j)]
        tape.tokens(
            generation,
            zero_ms,
            offsets[i:j],
            texts[i:j],
            index=index,
            position=position + i,
            ids=ids,
            logprobs=logprobs,
            channel=channel,
            alternatives=_others(texts[i:j], logprobs) if i else None,
        )
        i = j
    return offsets[-1]


def _others(texts: Sequence[str], logprobs: Sequence[float]) -> e.ChunkAlternatives:
    """Each token and two that might have come in its place, as a client gets them that asks for three."""
    found = [(word, logprob - k) for text, logprob in zip(texts, logprobs, strict=True) for k, word in enumerate((text, "or ", "\ufffd"))]
    return e.ChunkAlternatives(counts=[3] * len(texts), texts=[word for word, _ in found], logprobs=[logprob for _, logprob in found])


def finish(tape: Tape, generation: bytes, zero_ms: float, tokens: Sequence[int], offset_ms: float, reason: str = "stop") -> None:
    """The ends of a generation's sequences and of itself."""
    us = round(offset_ms * 1000)
    for index, count in enumerate(tokens):
        tape.add(
            e.SequenceFinished(generation_id=generation, index=index, tokens=count, finish_reason=reason, offset_us=us), zero_ms + offset_ms
        )
    total = sum(tokens)
    ended = e.GenerationFinished(
        generation_id=generation, sequences=len(tokens), tokens_recorded=total, completion_tokens=total, offset_us=us
    )
    tape.add(ended, zero_ms + offset_ms)


SYSTEM = {"role": "system", "content": "You are the assistant of the incident desk. Answer briefly and name your sources."}
QUESTION = {"role": "user", "content": "What happened to the answers this morning?\nPlease be exact about times."}
FOLLOW_UP = {"role": "user", "content": "Which weather is it in Lisbon? Use the tool."}
EVIL = {"role": "user", "content": "Now print \x1b[31mred\x1b[0m and \u202eesrever\u202c and 東京 🦊 please, and go on for a while."}


def incident() -> Tape:
    """A session with everything a responder meets: n=2, an edit at a breakpoint, a tool call, a stall, a hang-up, a dead upstream."""
    tape = Tape("incident")
    content = e.SessionContent(title="Morning slowness, ticket 4711")
    tape.add(
        e.SessionOpened(client="openai-python/2.8.0", user="user:42", workflow="incident-desk", tags=["prod", "eu"], content=content), 0
    )
    first = environment()
    tape.add(first, 3)
    _two_answers(tape, first.environment_id)
    _edited_with_tool(tape)
    tape.add(environment("0.32.1", dtype="bfloat16"), 31_000)
    _hang_up(tape)
    _dead_upstream(tape)
    note = e.AnnotationContent(note="customer saw a frozen answer; see the stall in generation 1")
    tape.add(e.SessionAnnotated(tags_added=["incident"], content=note), 75_000, actor="oncall:ada")
    return tape


def _two_answers(tape: Tape, environment_id: bytes) -> None:
    g = tape.request("g1", [SYSTEM, QUESTION], 7, n=2, max_tokens=64, environment_id=environment_id)
    tape.started(g, 69, 60, range(31))
    for index in (0, 1):
        tape.add(e.SequenceStarted(generation_id=g, index=index, role="assistant", offset_us=80_000), 90)
    ends = [stream(tape, g, 9, 82 + 3 * i, 64, index=i, stall_at=40 if i == 0 else None, stall_ms=1_812) for i in (0, 1)]
    tape.events.sort(key=lambda stored: stored.event.recorded_at)
    _renumber(tape)
    finish(tape, g, 9, [64, 64], max(ends) + 5, "length")


def _edited_with_tool(tape: Tape) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    answer = {"role": "assistant", "content": " ".join(WORDS[:20])}
    parameters = {"model": "tiny", "stream": True, "temperature": 0.8, "tools": tools}
    g = tape.request("g2", [SYSTEM, QUESTION, answer, FOLLOW_UP], 12_000, tools=1, max_tokens=48, parameters=parameters)
    tape.add(e.BreakpointHit(breakpoint_id="tools", generation_id=g, deadline_us=30_000_000, default_action="as_is"), 12_002)
    patch = json.dumps([{"op": "replace", "path": "/temperature", "value": 0.0}, {"op": "add", "path": "/max_tokens", "value": 48}])
    digests = {"digest_before": bytes(32), "digest_after": bytes(31) + b"\1"}
    edit = e.EditContent(patch=patch, reason="make the tool call repeatable")
    tape.add(e.RequestEdited(generation_id=g, edit_id=ident("e1"), **digests, content=edit), 21_400, actor="dev:bo")
    tape.add(e.BreakpointReleased(breakpoint_id="tools", generation_id=g, action="edited"), 22_000, actor="dev:bo")
    tape.started(g, 22_080, 75, range(92))
    end = stream(tape, g, 22_005, 130, 12, channel="reasoning")
    end = stream(tape, g, 22_005, end + 30, 18, channel="tool", position=12)
    call = e.ToolCallContent(call_id="call_1", name="get_weather", arguments='{"city": "Lisbon", "unit": "celsius"}')
    tape.add(e.ToolCall(generation_id=g, index=0, call_index=0, offset_us=round(end * 1000), content=call), 22_005 + end)
    finish(tape, g, 22_005, [30], end + 2, "tool_calls")


def _hang_up(tape: Tape) -> None:
    g = tape.request("g3", [SYSTEM, EVIL], 32_000, actor="")
    tape.started(g, 32_070, 66, range(40))
    end = stream(tape, g, 32_004, 95, 37)
    failed = e.FailureContent(message="the client closed its connection")
    offset = round((end + 12) * 1000)
    tape.add(
        e.GenerationFailed(
            generation_id=g, error_type="client_disconnected", origin="client", position=37, offset_us=offset, content=failed
        ),
        32_016 + end,
    )


def _dead_upstream(tape: Tape) -> None:
    g = tape.request("g4", [SYSTEM, QUESTION], 40_000, max_tokens=512)
    tape.started(g, 40_070, 66, range(31))
    stream(tape, g, 40_004, 95, 9)
    text = (
        "no byte from the upstream for 30 s: ServerTimeoutError('Timeout on reading data from socket') while reading "
        "http://10.2.0.7:8000/v1/chat/completions; the engine's last step was 812 ms before"
    )
    failed = e.FailureContent(message=text)
    tape.add(
        e.GenerationFailed(
            generation_id=g,
            error_type="upstream_timeout",
            origin="upstream",
            position=9,
            retryable=True,
            offset_us=30_312_000,
            content=failed,
        ),
        70_316,
    )


def _renumber(tape: Tape) -> None:
    """Sequence numbers and offsets after the order changed."""
    for i, stored in enumerate(tape.events):
        tape.events[i] = StoredEvent(stored.event.model_copy(update={"producer_seq": i}), "log", 0, 100 + i, stored.appended_at)


def engine_run(name: str = "engine run", *, steps: int = 240, tenant: str = "acme") -> list[e.Event]:
    """A run of an engine with a KV connector: four requests that join and leave, one preempted, a prompt that was found and one not."""
    owner = Tape(name)
    run, platform = owner.session_id, Tape(name)
    platform.session_id = steps_session(run)
    operations = Tape(f"{name} kv")
    owner.add(e.SessionOpened(client="vllm 0.32.0", purpose="engine run"), 0, source="engine")
    operations.add(e.SessionOpened(purpose="kv operations", parent_session=run), 0, source="engine")
    lives = {"e1": (0, steps * 3 // 4), "e2": (4, steps // 2), "e3": (steps // 4, steps), "e4": (steps // 2, steps)}
    ids = {each: owner.request(each, [QUESTION], at, source="engine") for each, (at, _) in lives.items()}
    for number, (each, generation) in enumerate(ids.items()):
        hashes = b"".join(bytes([1 if number in (0, 2) else number + 2]) * 8 for _ in range(3))
        looked = e.KvOperation(operation="lookup", role="scheduler", connector="tests:Example", generation_id=generation, request=each)
        found = {"tokens_asked": 48, "tokens_matched": 32 if number == 2 else 0, "tokens_local": 0, "duration_us": 800 + number}
        looked = looked.model_copy(update={**found, "content": e.KvContent(block_hashes=hashes)})
        operations.add(looked, lives[each][0], source="engine")
        saved = e.KvOperation(operation="save", role="worker", connector="tests:Example", bytes=49_152, duration_us=2_000)
        operations.add(saved, lives[each][0] + 1, source="engine")
    for step in range(steps):
        out = 100 <= step < 110
        inside = [each for each, (begins, ends) in lives.items() if begins <= step < ends and not (each == "e1" and out)]
        entries = [e.StepEntry(generation_id=ids[each], index=0, tokens=48 if step == lives[each][0] else 1) for each in inside]
        told = e.EngineStep(engine_run=run, step=step, duration_us=4_000 + 300 * len(inside), waiting=int(out), running=len(inside))
        used = {"preempted": int(step == 100), "kv_used": 0.1 + 0.8 * step / steps, "entries": entries}
        platform.add(told.model_copy(update=used), step * 5, source="engine")
    made = [stored.event for tape in (owner, operations, platform) for stored in tape.events]
    tenants = {run: tenant, operations.session_id: tenant, platform.session_id: e.PLATFORM_TENANT}
    return [event.model_copy(update={"tenant": tenants[event.session_id]}) for event in made]
