"""A session at one moment: what the fold of its events up to there knows.

All of it is immutable and shares what it can with the state before, so that keeping a state per event is cheap. Times
named `at` are wall clock in µs since the epoch; `offset_us` counts from the moment the request was forwarded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import ConfigDict

from replay.persistent import Map, Vector
from schemas import events as e
from schemas.patch import apply_patch
from schemas.requests import join

Status = Literal["submitted", "paused", "streaming", "finished", "failed"]

# Dataclasses of the state name their bytes as base64, as the events' own models do.
_JSON = ConfigDict(val_json_bytes="base64")


S = TypeVar("S")


def evolve(value: S, **changes: Any) -> S:
    """A copy of one of this module's records with some fields changed: `dataclasses.replace` at a fifth of its time.

    It copies the instance's dictionary, which is why these classes have no slots and MUST NOT cache anything on themselves.
    """
    new = object.__new__(type(value))
    new.__dict__.update(value.__dict__)
    new.__dict__.update(changes)
    return new


class Entry(NamedTuple):
    """One token, or one delta where the upstream gave no ids: unknown parts are None, `text` is None once erased.

    `alternatives` is what else it might have been, where the client asked for that.
    """

    position: int
    channel: str
    offset_us: int
    token_id: int | None
    logprob: float | None
    text: str | None
    alternatives: tuple[e.Alternative, ...] = ()


@dataclass(frozen=True)
class Place:
    """An event's id and where it stood in the log."""

    event_id: bytes
    partition: int
    offset: int
    at: int


@dataclass(frozen=True)
class Anomaly:
    """An event that the fold did not expect.

    `what` is one of: unknown (no rule for its kind), unreadable (its rule failed), foreign (another session's), repeated
    (its producer's sequence number was folded already), again (what happens once happened twice), early (before what it belongs
    to), late (after its end), gap and overlap (positions of tokens), miscount (an end that counts otherwise), unheld (a message
    body that the session never had), mismatched (an edit that does not apply).
    """

    what: str
    kind: str
    text: str
    place: Place | None


@dataclass(frozen=True)
class Chunk:
    """Consecutive entries of a sequence as one event brought them; without content once erased."""

    position: int
    channel: str
    offsets_us: tuple[int, ...]
    token_ids: tuple[int, ...] = ()
    text: str | None = None
    lengths: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    alternatives: e.ChunkAlternatives | None = None

    def entries(self) -> Iterator[Entry]:
        """The entries, as many as there are offsets."""
        count, at = len(self.offsets_us), 0
        lengths = self.lengths if len(self.lengths) == count else (len(self.text or ""), *(0,) * (count - 1))
        ids: tuple[int | None, ...] = self.token_ids if len(self.token_ids) == count else (None,) * count
        logprobs: tuple[float | None, ...] = self.logprobs if len(self.logprobs) == count else (None,) * count
        others = self.alternatives.by_entry(count) if self.alternatives is not None else ((),) * count
        for i, offset_us in enumerate(self.offsets_us):
            text = None if self.text is None else self.text[at : at + lengths[i]]
            at += lengths[i]
            yield Entry(self.position + i, self.channel, offset_us, ids[i], logprobs[i], text, others[i])


@dataclass(frozen=True)
class Sequence:
    """One of the n sequences of a generation, as one source recorded it."""

    index: int
    role: str | None = None
    started_us: int | None = None
    chunks: Vector[Chunk] = field(default_factory=Vector)
    in_order: bool = True
    next_position: int = 0
    calls: Vector[e.ToolCall] = field(default_factory=Vector)
    finished: e.SequenceFinished | None = None

    def ordered(self) -> list[Chunk]:
        """The chunks by position, whatever order they came in."""
        chunks = list(self.chunks)
        return chunks if self.in_order else sorted(chunks, key=lambda chunk: chunk.position)

    def entries(self) -> list[Entry]:
        """All entries by position; of two at one position the first recorded one."""
        entries = [entry for chunk in self.ordered() for entry in chunk.entries()]
        if self.in_order:
            return entries
        return sorted({entry.position: entry for entry in reversed(entries)}.values())

    @property
    def tokens(self) -> int:
        """Entries recorded so far."""
        return self.next_position if self.in_order else len(self.entries())

    def text(self, channel: str = "content") -> str:
        """What stands in one channel so far: content, reasoning, refusal or tool."""
        if self.in_order:
            return "".join(chunk.text or "" for chunk in self.chunks if chunk.channel == channel)
        return "".join(entry.text or "" for entry in self.entries() if entry.channel == channel)

    @property
    def erased(self) -> bool:
        """Whether content of this sequence is gone."""
        return any(chunk.text is None for chunk in self.chunks)


@dataclass(frozen=True)
class Failure:
    """How a generation failed; the message is None once erased."""

    at: int
    event: e.GenerationFailed

    @property
    def message(self) -> str | None:
        """What the failing side said."""
        return self.event.content.message if self.event.content else None


@dataclass(frozen=True)
class Recording:
    """What one source recorded of one attempt at a generation; `zero_at` is the wall clock at offset 0."""

    source: str
    attempt: int = 1
    zero_at: int | None = None
    started: e.GenerationStarted | None = None
    prompt_token_ids: tuple[int, ...] = ()
    sequences: Map[int, Sequence] = field(default_factory=Map)
    finished: e.GenerationFinished | None = None
    finished_at: int | None = None
    failures: Vector[Failure] = field(default_factory=Vector)
    starts: int = 1
    """How often it was said to start: an engine says so for each of several prompts, of which only the first is kept."""

    @property
    def lanes(self) -> list[Sequence]:
        """The sequences by index."""
        return sorted(self.sequences.values(), key=lambda sequence: sequence.index)

    @property
    def first_token_us(self) -> int | None:
        """Time of the first entry of any sequence, in µs after the request was forwarded."""
        firsts = [chunk.offsets_us[0] for sequence in self.sequences.values() for chunk in _first(sequence) if chunk.offsets_us]
        return min(firsts, default=None)

    @property
    def tokens(self) -> int:
        """Entries of all sequences so far."""
        return sum(sequence.tokens for sequence in self.sequences.values())


def _first(sequence: Sequence) -> list[Chunk]:
    return [sequence.chunks[0]] if sequence.in_order and len(sequence.chunks) else list(sequence.chunks)


@dataclass(frozen=True)
class Edit:
    """One edit of a stopped request; the patch is None once erased."""

    at: int
    actor: str
    event: e.RequestEdited

    @property
    def patch(self) -> str | None:
        """RFC 6902 JSON text."""
        return self.event.content.patch if self.event.content else None


@dataclass(frozen=True)
class Pause:
    """A stop at a breakpoint, and its release once there was one."""

    hit_at: int
    hit: e.BreakpointHit
    released_at: int | None = None
    released_by: str = ""
    released: e.BreakpointReleased | None = None


@dataclass(frozen=True)
class Generation:
    """One request and all that came of it. `request` stands without its content: messages and parameters are beside it."""

    generation_id: bytes
    submitted_at: int | None = None
    actor: str = ""
    source: str = ""
    request: e.RequestSubmitted | None = None
    parameters: str | None = None
    edits: Vector[Edit] = field(default_factory=Vector)
    pauses: Vector[Pause] = field(default_factory=Vector)
    recordings: tuple[Recording, ...] = ()
    authoritative: str | None = None

    @property
    def recording(self) -> Recording | None:
        """What views use: the last attempt as the authoritative source recorded it, else as the first source did."""
        named = [recording for recording in self.recordings if recording.source == self.authoritative]
        if named:
            return named[-1]
        return next((r for r in reversed(self.recordings) if r.source == self.recordings[0].source), None)

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences of the recording that views use, by index."""
        return self.recording.lanes if self.recording else []

    @property
    def paused(self) -> bool:
        """Whether a breakpoint still holds the request."""
        return any(pause.released is None for pause in self.pauses)

    @property
    def status(self) -> Status:
        """How far the generation is."""
        recording = self.recording
        if recording and len(recording.failures):
            return "failed"
        if recording and recording.finished:
            return "finished"
        if self.paused:
            return "paused"
        return "streaming" if recording else "submitted"


@dataclass(frozen=True)
class Environment:
    """What was asked about the producing environment, and when."""

    at: int
    source: str
    event: e.EnvironmentCaptured


@dataclass(frozen=True)
class Annotation:
    """Labels or a note that somebody put on the session."""

    at: int
    actor: str
    event: e.SessionAnnotated


@dataclass(frozen=True)
class Replay:
    """A replay that this session records."""

    started_at: int
    started: e.ReplayStarted | None = None
    compared: Vector[e.SequenceCompared] = field(default_factory=Vector)
    finished: e.ReplayFinished | None = None


@dataclass(frozen=True)
class SessionState:
    """A session at one moment. `events` counts what was folded, anomalies included; `producers` are high-water marks."""

    __pydantic_config__ = _JSON

    session_id: bytes | None = None
    tenant: str = ""
    retention_class: str = ""
    opened: e.SessionOpened | None = None
    opened_by: str = ""
    closed: e.SessionClosed | None = None
    closed_at: int | None = None
    tags: tuple[str, ...] = ()
    visibility: str | None = None
    annotations: Vector[Annotation] = field(default_factory=Vector)
    environments: Vector[Environment] = field(default_factory=Vector)
    messages: Map[bytes, e.Message] = field(default_factory=Map)
    generations: Map[bytes, Generation] = field(default_factory=Map)
    replays: Map[bytes, Replay] = field(default_factory=Map)
    operations: Vector[e.KvOperation] = field(default_factory=Vector)
    lost: int = 0
    erased: int = 0
    counts: Map[str, int] = field(default_factory=Map)
    producers: Map[tuple[bytes, int], int] = field(default_factory=Map)
    anomalies: Vector[Anomaly] = field(default_factory=Vector)
    events: int = 0
    first_at: int | None = None
    last_at: int | None = None
    last: Place | None = None

    @property
    def open_breakpoints(self) -> list[Pause]:
        """Stops that nobody released yet."""
        return [pause for generation in self.generations.values() for pause in generation.pauses if pause.released is None]

    @property
    def gone(self) -> str:
        """What to say where content is missing."""
        return "erased" if self.erased else "not recorded"

    @property
    def tokens(self) -> int:
        """Entries of all generations so far, as their authoritative sources recorded them."""
        return sum(generation.recording.tokens for generation in self.generations.values() if generation.recording)

    def environment_of(self, generation: Generation) -> Environment | None:
        """The environment that a generation names, where it started or else where it was asked for; None where it is not known which.

        Where no generation of the session says which is its own, it is the last one captured.
        """
        if not any(any(_answered_by(each)) for each in self.generations.values()):
            return self.environments[-1] if len(self.environments) else None
        _, named = _answered_by(generation)
        found = (each for each in reversed(list(self.environments)) if each.event.environment_id == named)
        return next(found, None)

    def messages_of(self, generation: Generation) -> list[e.Message]:
        """The messages of a request in order, bodies resolved from earlier requests; role "?" where the session never had one."""
        ids = generation.request.message_ids if generation.request else []
        return [self.messages.get(message_id) or e.Message(message_id=message_id, role="?") for message_id in ids]

    def submitted(self, generation: Generation) -> dict[str, Any] | None:
        """The request's document as submitted; None where it is unknown, erased or in a blob."""
        if generation.parameters is None:
            return None
        try:
            parameters = json.loads(generation.parameters or "{}")
        except ValueError:
            return None
        if not isinstance(parameters, dict):
            return None
        if generation.request and generation.request.message_ids:
            return join(generation.request.endpoint, parameters, [body_of(message) for message in self.messages_of(generation)])
        return parameters

    def edited(self, generation: Generation) -> dict[str, Any] | None:
        """The request's document after its edits; None where that cannot be told."""
        document: Any = self.submitted(generation)
        for edit in generation.edits:
            if document is None or edit.patch is None:
                return None
            try:
                document = apply_patch(document, json.loads(edit.patch))
            except ValueError:
                return None
        return document if isinstance(document, dict) else None


def _answered_by(generation: Generation) -> tuple[str | None, bytes | None]:
    """The other upstream that answered, None where it was the one asked, and the environment that the generation names."""
    named = generation.request.environment_id if generation.request else None
    started = generation.recording.started if generation.recording else None
    if started is None:
        return None, named
    return started.upstream, started.environment_id if started.upstream else started.environment_id or named


def body_of(message: e.Message) -> Any:
    """A message's JSON document as sent; where the body is elsewhere or gone, what is known of it."""
    if message.body is None:
        where = f"blob {message.blob.blob_id.hex()[:12]}, {message.blob.size} bytes" if message.blob else "not held"
        return {"role": message.role, "content": f"[{where}]"}
    try:
        return json.loads(message.body)
    except ValueError:
        return {"role": message.role, "content": message.body}


EMPTY = SessionState()
"""The state before the first event."""
