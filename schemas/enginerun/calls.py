"""The calls of an engine core in their order, in about one byte each: the `record` of an `engine_step`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from schemas.errors import InvalidEvent


@dataclass(frozen=True, slots=True)
class Schedule:
    """The engine decided what the next step computes."""


@dataclass(frozen=True, slots=True)
class Update:
    """The engine took in the result of the oldest step that it had decided on and not yet taken in."""


@dataclass(frozen=True, slots=True)
class Arrive:
    """A request came. Requests are numbered as they come, so its number is not written."""


@dataclass(frozen=True, slots=True)
class ArriveBeside:
    """A further sequence of the request with number `first` came, the `child`-th of n; its seed is that one's and `seed_more`.

    `index` is the sequence's on the tape.
    """

    first: int
    child: int
    index: int
    seed_more: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Requests were ended from outside: by their client, or because the front end found a stop string."""

    numbers: tuple[int, ...]
    status: str


@dataclass(frozen=True, slots=True)
class Reset:
    """The prefix cache was emptied; with `running` all running requests were preempted for it."""

    running: bool


@dataclass(frozen=True, slots=True)
class Idle:
    """No request and nothing cached: an engine that begins here does the same."""


@dataclass(frozen=True, slots=True)
class Preempt:
    """What the schedule before it preempted. Known from the decisions; written for a replay that imposes them."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cached:
    """The schedule before it admitted request `number` with so many tokens computed already."""

    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Unrepeatable:
    """Something happened that a replay cannot do again, in words."""

    what: str


Call = Schedule | Update | Arrive | ArriveBeside | Finish | Reset | Idle | Preempt | Cached | Unrepeatable

STATUSES = ("FINISHED_ABORTED", "FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_IGNORED", "FINISHED_ERROR", "FINISHED_REPETITION")
"""Names of vLLM's statuses of an end; append only."""

# A step that is scheduled and taken in with nothing between is by far the most frequent and one byte.
_BOTH, _SCHEDULE, _UPDATE, _ARRIVE, _BESIDE, _FINISH, _RESET, _RESET_RUNNING, _IDLE, _PREEMPT, _CACHED, _UNREPEATABLE = range(12)


def encode(calls: Iterable[Call]) -> bytes:
    """The bytes of some calls."""
    out = bytearray()
    before: Call | None = None
    for call in calls:
        if isinstance(call, Update) and isinstance(before, Schedule):
            out[-1] = _BOTH
        else:
            _write(out, call)
        before = call
    return bytes(out)


def _write(out: bytearray, call: Call) -> None:
    match call:
        case Schedule():
            out.append(_SCHEDULE)
        case Update():
            out.append(_UPDATE)
        case Arrive():
            out.append(_ARRIVE)
        case ArriveBeside(first, child, index, seed_more):
            out.append(_BESIDE)
            _numbers(out, first, child, index, seed_more)
        case Finish(numbers, status):
            out.append(_FINISH)
            _numbers(out, STATUSES.index(status), len(numbers), *numbers)
        case Reset(running):
            out.append(_RESET_RUNNING if running else _RESET)
        case Idle():
            out.append(_IDLE)
        case Preempt(numbers):
            out.append(_PREEMPT)
            _numbers(out, len(numbers), *numbers)
        case Cached(number, tokens):
            out.append(_CACHED)
            _numbers(out, number, tokens)
        case Unrepeatable(what):
            text = what.encode()
            out.append(_UNREPEATABLE)
            _numbers(out, len(text))
            out += text


def _numbers(out: bytearray, *values: int) -> None:
    """LEB128."""
    for value in values:
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)


def decode(data: bytes) -> Iterator[Call]:
    """The calls of these bytes.

    Raises:
        InvalidEvent: they are no calls.
    """
    reader = _Reader(data)
    try:
        while reader.at < len(data):
            yield from _read(reader)
    except IndexError as error:
        raise InvalidEvent("the record of an engine step ends in the middle", operation="read engine step") from error


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        value = shift = 0
        while (byte := self.byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def numbers(self) -> tuple[int, ...]:
        return tuple(self.number() for _ in range(self.number()))

    def text(self) -> str:
        size = self.number()
        self.at += size
        return self.data[self.at - size : self.at].decode()


def _read(reader: _Reader) -> Iterator[Call]:
    code = reader.byte()
    if code == _BOTH:
        yield Schedule()
        yield Update()
    elif code == _SCHEDULE:
        yield Schedule()
    elif code == _UPDATE:
        yield Update()
    elif code == _ARRIVE:
        yield Arrive()
    elif code == _BESIDE:
        yield ArriveBeside(reader.number(), reader.number(), reader.number(), reader.number())
    elif code == _FINISH:
        status = STATUSES[reader.number()]
        yield Finish(reader.numbers(), status)
    elif code in (_RESET, _RESET_RUNNING):
        yield Reset(code == _RESET_RUNNING)
    elif code == _IDLE:
        yield Idle()
    elif code == _PREEMPT:
        yield Preempt(reader.numbers())
    elif code == _CACHED:
        yield Cached(reader.number(), reader.number())
    elif code == _UNREPEATABLE:
        yield Unrepeatable(reader.text())
    else:
        raise InvalidEvent(f"{code} is no call of an engine core", operation="read engine step")
