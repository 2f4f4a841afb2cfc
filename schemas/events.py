"""What an event is: the envelope, one payload model per kind, and what of each is content.

`event.avsc` is derived from these models (`schemas.avro.derive`), so every field is written once. Evolution rule: a new
field is appended, nullable, with default None; nothing is ever renamed, reused or retyped.
"""

from __future__ import annotations

import functools
import itertools
import math
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from schemas.errors import InvalidEvent

PLATFORM_TENANT = "_platform"
"""Tenant of events that belong to no customer: heartbeats, engine steps, custody."""

SOURCES = ("gateway", "engine", "sdk", "api", "replay", "lifecycle", "import")
"""Symbols of the `source` enum: which part recorded an event. Appending is compatible, reordering is not."""

Source = Literal["gateway", "engine", "sdk", "api", "replay", "lifecycle", "import"]


class Fixed:
    """Marks bytes of one length; in Avro a `fixed` of that size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, value: bytes) -> bytes:
        """The value; raises ValueError for another length."""
        if len(value) != self.size:
            raise ValueError(f"{len(value)} bytes, valid is exactly {self.size}")
        return value


class Float32:
    """Marks a 32-bit float."""


def floats32(values: Sequence[float]) -> list[float]:
    """The values as 32-bit floats hold them, -0.0 as 0.0, so that equal values have equal bytes; raises ValueError for NaN."""
    if any(map(math.isnan, values)):
        raise ValueError("NaN has no canonical bytes; leave the value out instead")
    return [value + 0.0 for value in array("f", values)]


def _text(value: str) -> str:
    return clean_text(value)


def clean_text(value: str) -> str:
    """Text without lone surrogates: each becomes U+FFFD, as no UTF-8 bytes exist for it."""
    if value.isascii():
        return value
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _double(value: float) -> float:
    if math.isnan(value):
        raise ValueError("NaN has no canonical bytes; leave the value out instead")
    return value + 0.0


_ID, _DIGEST, _PRODUCER, _F32 = Fixed(16), Fixed(32), Fixed(8), Float32()
_LONG = Field(ge=-(2**63), le=2**63 - 1)

Id = Annotated[bytes, AfterValidator(_ID), _ID]
"""A UUID as 16 bytes, big-endian."""
Digest = Annotated[bytes, AfterValidator(_DIGEST), _DIGEST]
"""SHA-256 or HMAC-SHA256, 32 bytes."""
ProducerId = Annotated[bytes, AfterValidator(_PRODUCER), _PRODUCER]
Text = Annotated[str, AfterValidator(_text)]
Long = Annotated[int, _LONG]
Logprobs = Annotated[list[Annotated[float, _F32]], AfterValidator(floats32)]
"""Natural logarithms of probabilities as the engine computed them: 32-bit; -inf is allowed."""
Double = Annotated[float, AfterValidator(_double)]


class Record(BaseModel):
    """A record of the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    @classmethod
    def known(cls, **values: Any) -> Self:
        """The record of values that MUST be valid: only texts are cleaned, nothing else is looked at.

        For values that this program made itself; what comes from outside goes the usual way.

        Raises:
            TypeError: a field is missing, or there is none of that name.
        """
        for name, value in values.items():
            if value.__class__ is str and not value.isascii():
                values[name] = clean_text(value)
        count, defaults = _shape(cls)
        fields = {**defaults, **values}
        if len(fields) != count:
            raise TypeError(f"{cls.__name__} has the fields {', '.join(cls.model_fields)}, not {', '.join(fields)}")
        record = cls.__new__(cls)
        for slot, content in (
            ("__dict__", fields),
            ("__pydantic_fields_set__", set(values)),
            ("__pydantic_extra__", None),
            ("__pydantic_private__", None),
        ):
            _set(record, slot, content)
        return record


_set = object.__setattr__


@functools.cache
def _shape(model: type[Record]) -> tuple[int, dict[str, Any]]:
    """How many fields a record has, and what stands in those that are not named."""
    fields = model.model_fields
    return len(fields), {name: info.default for name, info in fields.items() if not info.is_required()}


class Pair(Record):
    """One entry of what would be a map; arrays of pairs are sorted by key, because Avro maps have no order."""

    key: Text
    value: Text


class Count(Record):
    """A named count."""

    key: Text
    count: Long


class BlobRef(Record):
    """A body kept in the blob store of the tenant: HMAC-SHA256 name, size in bytes before compression."""

    blob_id: Digest
    size: Long
    media_type: Text
    encoding: Text


class Message(Record):
    """One message of a conversation: `body` is the JSON text as the client sent it, or `blob` where it went."""

    message_id: Id
    role: Text
    body: Text | None = None
    blob: BlobRef | None = None


class Payload(Record):
    """Base of every kind's payload."""

    KIND: ClassVar[str]


# session


class SessionContent(Record):
    """Content of `session_opened`."""

    title: Text | None = None


class SessionOpened(Payload):
    """The first event of a session."""

    KIND = "session_opened"
    client: Text | None = None
    user: Text | None = None
    workflow: Text | None = None
    purpose: Text | None = None
    tags: list[Text] = []
    parent_session: Id | None = None
    parent_event: Id | None = None
    recorder_version: Text | None = None
    sample_rate: Double | None = None
    content: SessionContent | None = None


class AnnotationContent(Record):
    """Content of `session_annotated`."""

    note: Text | None = None


class SessionAnnotated(Payload):
    """A person or a rule changed a session's labels."""

    KIND = "session_annotated"
    tags_added: list[Text] = []
    tags_removed: list[Text] = []
    visibility: Text | None = None
    content: AnnotationContent | None = None


class SessionClosed(Payload):
    """Nothing more is expected of the session; later events are still accepted."""

    KIND = "session_closed"
    reason: Text


# environment


class EnvironmentCaptured(Payload):
    """What produced the tokens. `environment_id` is the digest over all items; three partial digests say what a change means.

    `items` values are JSON texts; `unknown` names what could not be asked over this origin. Secrets never stand here.
    """

    KIND = "environment_captured"
    environment_id: Digest
    origin: Text
    semantic: Digest | None = None
    numeric: Digest | None = None
    scheduling: Digest | None = None
    items: list[Pair] = []
    unknown: list[Text] = []


# debugging


class BreakpointHit(Payload):
    """A request was stopped and waits: `deadline_us` after the stop, `default_action` (release or refuse) is what happens."""

    KIND = "breakpoint_hit"
    breakpoint_id: Text
    generation_id: Id
    deadline_us: Long | None = None
    default_action: Text | None = None


class EditContent(Record):
    """Content of `request_edited`: an RFC 6902 patch as JSON text and why."""

    patch: Text
    reason: Text | None = None


class RequestEdited(Payload):
    """A person changed a stopped request: RFC 6902 patch, keyed digests of the request's body before and after.

    With `undo_of` the patch takes back the edit of that id.
    """

    KIND = "request_edited"
    generation_id: Id
    edit_id: Id
    undo_of: Id | None = None
    digest_before: Digest
    digest_after: Digest
    content: EditContent | None = None


class ReleaseContent(Record):
    """Content of `breakpoint_released`."""

    reason: Text | None = None


class BreakpointReleased(Payload):
    """A stopped request stands still no more.

    `action` is as_is, edited, refused, expired (the default action of its stop was applied), abandoned (the client hung
    up) or lost (the worker that held it ended).
    """

    KIND = "breakpoint_released"
    breakpoint_id: Text
    generation_id: Id
    action: Text
    content: ReleaseContent | None = None


# generation


class RequestContent(Record):
    """What was asked. `parameters` is the JSON text of the request without its messages, as the client sent it."""

    messages: list[Message] = []
    parameters: Text = ""
    parameters_blob: BlobRef | None = None


class RequestSubmitted(Payload):
    """A request arrived. `message_ids` lists all its messages in order; bodies only of those the session did not hold yet.

    `request_digest` is HMAC-SHA256 under the session's salt over the body's bytes; `injected` names what the gateway added.
    A request that continues an earlier one of its session does not list everything again: its messages are the first
    `history_messages` of those of `history_generation`, then those of `message_ids`.
    """

    KIND = "request_submitted"
    generation_id: Id
    parent_generation: Id | None = None
    endpoint: Text
    upstream: Text | None = None
    model: Text | None = None
    stream: bool = False
    n: Long = 1
    seed: Long | None = None
    temperature: Double | None = None
    max_tokens: Long | None = None
    message_ids: list[Id] = []
    tools: Long = 0
    injected: list[Text] = []
    request_digest: Digest | None = None
    body_bytes: Long = 0
    trace_id: Text | None = None
    client_request_id: Text | None = None
    api_key_id: Text | None = None
    client_address: Text | None = None
    environment_id: Digest | None = None
    redactions: list[Count] = []
    content: RequestContent | None = None
    priority: Text | None = None
    history_generation: Id | None = None
    history_messages: Long | None = None


class GenerationContent(Record):
    """Content of `generation_started`: the prompt as the engine tokenised it."""

    prompt_token_ids: list[Long] = []


class GenerationStarted(Payload):
    """The upstream answered. `authoritative` is the source whose events views use for this generation.

    `upstream` and `environment_id` stand here where another upstream or environment than those of `request_submitted` answered: with
    an `upstream` and no `environment_id` it is not known which, whatever the request named;
    `queued_us` is how long the request waited for its turn, before offset 0.
    """

    KIND = "generation_started"
    generation_id: Id
    authoritative: Text
    attempt: Long = 1
    upstream_id: Text | None = None
    model: Text | None = None
    status: Long | None = None
    prompt_tokens: Long | None = None
    offset_us: Long = 0
    content: GenerationContent | None = None
    upstream: Text | None = None
    environment_id: Digest | None = None
    queued_us: Long | None = None


class SequenceStarted(Payload):
    """The first sign of one of n sequences, `offset_us` after the request was forwarded."""

    KIND = "sequence_started"
    generation_id: Id
    index: Long
    role: Text | None = None
    offset_us: Long = 0


class Alternative(NamedTuple):
    """One token that might have stood in a place: its text, its id where that is known, its logprob."""

    text: str
    token_id: int | None
    logprob: float


class ChunkAlternatives(Record):
    """What else a chunk's tokens might have been, as the upstream told it: `counts[i]` of the flat lists belong to entry i.

    They stand in the upstream's order, which mostly has the token that was chosen among them. `token_ids` is empty unless all are known;
    a text may be empty, or U+FFFD for a part of a character.
    """

    counts: list[Long] = []
    token_ids: list[Long] = []
    texts: list[Text] = []
    logprobs: Logprobs = []

    def by_entry(self, entries: int) -> Sequence[tuple[Alternative, ...]]:
        """The alternatives of each of so many entries; none of any where the lists do not belong together."""
        ids: Sequence[int | None] = self.token_ids or (None,) * len(self.texts)
        ends = list(itertools.accumulate(self.counts, initial=0))
        fits = len(self.counts) == entries and ends == sorted(ends)
        if not fits or not ends[-1] == len(self.texts) == len(ids) == len(self.logprobs):
            return ((),) * entries
        told = [Alternative(*one) for one in zip(self.texts, ids, self.logprobs, strict=True)]
        return [tuple(told[start:end]) for start, end in itertools.pairwise(ends)]


class ChunkContent(Record):
    """Tokens of a chunk. `lengths[i]` code points of `text` came with entry i; ids and logprobs are empty when unknown.

    `alternatives` is null where the client asked for none.
    """

    token_ids: list[Long] = []
    text: Text = ""
    lengths: list[Long] = []
    logprobs: Logprobs = []
    alternatives: ChunkAlternatives | None = None


class TokenChunk(Payload):
    """Consecutive tokens of one sequence: entry i has position `position + i` and came `offsets_us[i]` after the start.

    Where the upstream gives no token ids an entry is one delta as received. `channel` is content, reasoning, refusal or tool.
    """

    KIND = "token_chunk"
    generation_id: Id
    index: Long
    position: Long
    channel: Text = "content"
    offsets_us: list[Long] = []
    content: ChunkContent | None = None


class ToolCallContent(Record):
    """Content of `tool_call`: `arguments` is the JSON text as generated, valid or not."""

    call_id: Text | None = None
    name: Text | None = None
    arguments: Text = ""


class ToolCall(Payload):
    """A complete tool call of a sequence, put together from its pieces."""

    KIND = "tool_call"
    generation_id: Id
    index: Long
    call_index: Long
    offset_us: Long = 0
    content: ToolCallContent | None = None


class SequenceFinished(Payload):
    """One sequence ended; `tokens` counts the entries recorded for it."""

    KIND = "sequence_finished"
    generation_id: Id
    index: Long
    tokens: Long
    finish_reason: Text | None = None
    stop_reason: Text | None = None
    offset_us: Long = 0


class GenerationFinished(Payload):
    """The generation ended well. `tokens_recorded` stands beside what the upstream's usage said, so that they reconcile."""

    KIND = "generation_finished"
    generation_id: Id
    sequences: Long
    tokens_recorded: Long
    prompt_tokens: Long | None = None
    completion_tokens: Long | None = None
    cached_tokens: Long | None = None
    first_token_us: Long | None = None
    offset_us: Long = 0
    system_fingerprint: Text | None = None


class FailureContent(Record):
    """Content of `generation_failed`."""

    message: Text = ""


class GenerationFailed(Payload):
    """The generation ended badly: `error_type` names how, `origin` whose end failed, `position` the tokens that had come.

    Error types: client_disconnected, invalid_request, upstream_unreachable, upstream_timeout, upstream_disconnected,
    upstream_error, upstream_malformed, shutdown, gateway_error, not_recorded (strict mode: the tape did not take the
    request), refused (at a breakpoint), model_not_found, overloaded, invalid_api_key, permission_denied,
    rate_limit_exceeded, insufficient_quota, keys_unavailable. Origins: client, upstream, gateway, engine.
    """

    KIND = "generation_failed"
    generation_id: Id
    error_type: Text
    origin: Text
    status: Long | None = None
    position: Long = 0
    retryable: bool = False
    offset_us: Long = 0
    content: FailureContent | None = None


# engine


class StepEntry(Record):
    """One sequence's share of an engine step."""

    generation_id: Id
    index: Long
    tokens: Long


class EngineStep(Payload):
    """One step of an engine's scheduler; lives in a session of its own, tenant `_platform`, without content."""

    KIND = "engine_step"
    engine_run: Id
    step: Long
    duration_us: Long
    waiting: Long = 0
    running: Long = 0
    preempted: Long = 0
    kv_used: Double | None = None
    entries: list[StepEntry] = []
    record: bytes | None = None
    checksum: ProducerId | None = None


class KvContent(Record):
    """Content of `kv_operation`: `block_hashes` are the first 8 bytes of each of vLLM's hashes of the prompt's first blocks."""

    error: Text = ""
    block_hashes: bytes | None = None


class KvOperation(Payload):
    """One call of a KV connector, or `calls` of them that had nothing to do, of which `duration_us` is the sum.

    Operations: lookup, metadata, load, save, finish, else the connector's own method. Outcomes: ok, pending (ask again), deferred (it
    keeps the blocks), error (it raised), hanging (it had not come back yet), sent, received, failed. `request` is its name as its client
    knows it; of `tokens_asked` the engine had `tokens_local` itself; `bytes` is what was offered to be saved or loaded, not what
    the connector made of it; `memory_bytes` is what its process held.
    """

    KIND = "kv_operation"
    operation: Text
    role: Text
    connector: Text
    generation_id: Id | None = None
    tokens_asked: Long | None = None
    tokens_matched: Long | None = None
    blocks: Long | None = None
    duration_us: Long = 0
    outcome: Text = "ok"
    content: KvContent | None = None
    request: Text | None = None
    tokens_local: Long | None = None
    bytes: Long | None = None
    calls: Long | None = None
    memory_bytes: Long | None = None


# replay


class Difference(Record):
    """One difference between the recorded environment and today's: JSON texts; `digest` says which of the three it changes."""

    key: Text
    recorded: Text | None = None
    present: Text | None = None
    digest: Text = "semantic"


class ReplayStarted(Payload):
    """A replay of `subject_session` began; it is recorded in a session of its own."""

    KIND = "replay_started"
    replay_id: Id
    subject_session: Id
    subject_until: Id | None = None
    mode: Text
    engine: Text
    strict: bool = False
    environment_recorded: Digest | None = None
    environment_present: Digest | None = None
    differences: list[Difference] = []


class ComparedContent(Record):
    """Content of `sequence_compared`: the engine's own logprob and rank for each recorded token."""

    logprobs: Logprobs = []
    ranks: list[Long] = []


class SequenceCompared(Payload):
    """One sequence was scored by the engine; drift is |recorded - present| logprob per token in nats."""

    KIND = "sequence_compared"
    replay_id: Id
    generation_id: Id
    index: Long
    verdict: Text
    reason: Text | None = None
    tokens: Long = 0
    tokens_scored: Long = 0
    first_telling: Long | None = None
    drift_mean: Double | None = None
    drift_p99: Double | None = None
    drift_max: Double | None = None
    noise_floor: Double | None = None
    content: ComparedContent | None = None


class ReplayFinished(Payload):
    """A replay ended with one verdict: identical, numeric_drift, sampling_differs, model_differs or inconclusive."""

    KIND = "replay_finished"
    replay_id: Id
    verdict: Text
    reason: Text | None = None
    generations: Long = 0
    sequences: Long = 0
    tokens: Long = 0
    duration_us: Long = 0


# producers


class SequencePosition(Record):
    """The last `producer_seq` that a producer gave out for a partition."""

    partition: Long
    seq: Long


class ProducerHeartbeat(Payload):
    """A producer says how far it is, so that a lost tail is seen; `closed` on a clean end."""

    KIND = "producer_heartbeat"
    positions: list[SequencePosition] = []
    closed: bool = False
    host: Text | None = None
    pid: Long | None = None


SAMPLED_OUT = "sampled_out"
"""The reason of a `records_lost` that counts what sampling left out: nothing was lost against anybody's will."""


class RecordsLost(Payload):
    """Events that a producer had to let go, counted by kind; deltas of a token stream count one each."""

    KIND = "records_lost"
    reason: Text
    count: Long
    first_recorded_at: Long | None = None
    last_recorded_at: Long | None = None
    kinds: list[Count] = []


# custody


class SegmentSealed(Payload):
    """A cold segment was committed to the ledger."""

    KIND = "segment_sealed"
    segment: Text
    segment_tenant: Text
    day: Text
    segment_class: Text
    events: Long
    bytes: Long
    root: Digest
    ledger_entry: Long


class HoldContent(Record):
    """Content of `hold_placed` and `hold_released`."""

    reason: Text | None = None


class HoldPlaced(Payload):
    """A legal hold began; `selector` is JSON."""

    KIND = "hold_placed"
    hold_id: Id
    selector: Text
    ledger_entry: Long | None = None
    content: HoldContent | None = None


class HoldReleased(Payload):
    """A legal hold ended."""

    KIND = "hold_released"
    hold_id: Id
    ledger_entry: Long | None = None
    content: HoldContent | None = None


class RetentionApplied(Payload):
    """A retention run deleted what its policy said."""

    KIND = "retention_applied"
    policy: Text
    selector: Text
    segments: Long = 0
    events: Long = 0
    bytes: Long = 0
    held_back: Long = 0
    ledger_entry: Long | None = None


class ErasureContent(Record):
    """Content of `erasure_applied`."""

    reason: Text | None = None


class ErasureApplied(Payload):
    """Content of a subject was erased; commitments stand in its place."""

    KIND = "erasure_applied"
    erasure_id: Id
    subject_digest: Digest
    approvers: list[Text] = []
    events: Long = 0
    pending: list[Text] = []
    ledger_entry: Long | None = None
    content: ErasureContent | None = None


class VerificationFinished(Payload):
    """A verification run ended."""

    KIND = "verification_finished"
    scope: Text
    outcome: Text
    entries: Long = 0
    segments: Long = 0
    events: Long = 0
    findings: list[Pair] = []
    duration_us: Long = 0


class AccessContent(Record):
    """Content of `access_logged`."""

    statement: Text = ""


class AccessLogged(Payload):
    """Somebody looked: a query, a session shown, an export."""

    KIND = "access_logged"
    operation: Text
    outcome: Text
    statement_digest: Digest | None = None
    rows: Long | None = None
    duration_us: Long = 0
    content: AccessContent | None = None


PAYLOADS: dict[str, type[Payload]] = {
    model.KIND: model
    for model in (
        *(SessionOpened, SessionAnnotated, SessionClosed, EnvironmentCaptured),
        *(BreakpointHit, RequestEdited, BreakpointReleased),
        *(RequestSubmitted, GenerationStarted, SequenceStarted, TokenChunk, ToolCall),
        *(SequenceFinished, GenerationFinished, GenerationFailed),
        *(EngineStep, KvOperation, ReplayStarted, SequenceCompared, ReplayFinished),
        *(ProducerHeartbeat, RecordsLost),
        *(SegmentSealed, HoldPlaced, HoldReleased, RetentionApplied, ErasureApplied, VerificationFinished, AccessLogged),
    )
}
"""Every kind and its payload, in the order of the schema's fields; append only."""


class Event(Record):
    """One event: the envelope and exactly one payload. `recorded_at` is the producer's wall clock in µs since the epoch."""

    event_id: Id
    session_id: Id
    salt: Id | None = None
    commitment: Digest | None = None
    tenant: Text
    retention_class: Text = "standard"
    actor: Text = ""
    source: Source
    producer_id: ProducerId
    producer_seq: Annotated[int, Field(ge=0, le=2**63 - 1)]
    recorded_at: Long
    payload: Payload

    @property
    def kind(self) -> str:
        """Name of the payload's kind."""
        return self.payload.KIND

    def to_datum(self) -> dict[str, Any]:
        """The Avro datum: envelope fields and the one payload under its kind's name."""
        datum = {name: getattr(self, name) for name in ENVELOPE}
        datum[self.kind] = self.payload.model_dump()
        return datum

    @classmethod
    def from_datum(cls, datum: dict[str, Any]) -> Event:
        """The event of an Avro datum.

        Raises:
            InvalidEvent: not exactly one known payload, or a value out of its range.
        """
        kinds = [kind for kind, value in datum.items() if value is not None and kind in PAYLOADS]
        if len(kinds) != 1:
            raise InvalidEvent(f"{len(kinds)} payloads in one event, valid is exactly one", operation="read event")
        try:
            payload = PAYLOADS[kinds[0]].model_validate(datum[kinds[0]])
            return cls.model_validate({**{name: datum.get(name) for name in ENVELOPE}, "payload": payload})
        except ValueError as error:
            raise InvalidEvent(f"{kinds[0]}: {error}", operation="read event") from error


ENVELOPE = tuple(name for name in Event.model_fields if name != "payload")
"""Names of the envelope's fields in the order of the schema."""
