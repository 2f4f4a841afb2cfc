"""Answers under redaction rules: tokens wait in a window until what they spell can no longer grow into a match.

A match may come in any number of pieces. So the text of a sequence is held back, searched every `SCAN_CHARACTERS`, and
let go but for its last `WINDOW_CHARACTERS`: whatever a rule matches within that length is found, wherever the pieces
split it; a longer match may pass in part. Each token keeps its position and its time. A token of which a
character was taken loses its id and its logprob, and so does one without text right before it, since its bytes
may be part of what follows; the first of them carries the mark. Tokens that wait are lost if the process is killed.
Alternatives of tokens are left out: each is the end of a text that was never written, so no rule has seen it whole.

Nothing waits for tenants without rules, or with `output = "exact"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ingest.attachments import Deferred
from ingest.gateway.tape import Recording
from ingest.redaction import Redactor, mark
from schemas.events import Alternative, Payload, ToolCall
from schemas.requests import load
from schemas.sink import SessionContext

WINDOW_CHARACTERS = 512
"""Longer than any built-in pattern, and than any text that a rule of one's own should match."""

SCAN_CHARACTERS = 2048
"""Text held before it is searched: often enough to bound memory, seldom enough to cost little per token."""

_ENDS = ("tool_call", "sequence_finished", "generation_finished", "generation_failed")


@dataclass(slots=True)
class _Held:
    """One delta that waits."""

    position: int
    offset_us: int
    channel: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]


@dataclass(slots=True)
class _Sequence:
    """What of one sequence waits, all of one channel."""

    session: SessionContext
    deltas: list[_Held] = field(default_factory=list)
    characters: int = 0


class Window:
    """A recorder before a recorder: what comes out has been under the rules of its tenant."""

    def __init__(self, recorder: Recording, redactor: Redactor) -> None:
        self._recorder = recorder
        self._redactor = redactor
        self._open: dict[tuple[bytes, int], _Sequence] = {}

    @classmethod
    def before(cls, recorder: Recording, redactor: Redactor) -> Recording:
        """The recorder behind a window, or as it is where no tenant has rules."""
        return cls(recorder, redactor) if redactor.searches_any else recorder

    async def durable(self) -> None:
        """Return when all that was recorded is durable, but for what waits."""
        await self._recorder.durable()

    def record(self, session: SessionContext, payload: Payload | Deferred) -> None:
        """Record one event; the end of a sequence lets its tokens go first."""
        if self._open and payload.KIND in _ENDS:
            generation, index = getattr(payload, "generation_id", None), getattr(payload, "index", None)
            for key in [key for key in self._open if key[0] == generation and index in (None, key[1])]:
                self._let_go(key, all_of_it=True)
        if isinstance(payload, ToolCall) and self._applies(session):
            payload = self._tool_call(session, payload)
        self._recorder.record(session, payload)

    def tokens(
        self,
        session: SessionContext,
        generation_id: bytes,
        index: int,
        position: int,
        offset_us: int,
        *,
        channel: str = "content",
        token_ids: Sequence[int] = (),
        text: str = "",
        logprobs: Sequence[float] = (),
        alternatives: Sequence[Sequence[Alternative]] = (),
    ) -> int:
        """Hold or record one delta; the position of the next."""
        if not self._applies(session):
            return self._recorder.tokens(
                session,
                generation_id,
                index,
                position,
                offset_us,
                channel=channel,
                token_ids=token_ids,
                text=text,
                logprobs=logprobs,
                alternatives=alternatives,
            )
        key = (generation_id, index)
        held = self._open.get(key)
        if held is not None and held.deltas and held.deltas[-1].channel != channel:
            self._let_go(key, all_of_it=True)
            held = None
        if held is None:
            held = self._open[key] = _Sequence(session)
        held.deltas.append(_Held(position, offset_us, channel, tuple(token_ids), text, tuple(logprobs)))
        held.characters += len(text)
        if held.characters >= SCAN_CHARACTERS:
            self._let_go(key, all_of_it=False)
        return position + (len(token_ids) or 1)

    def run(
        self,
        session: SessionContext,
        generation_id: bytes,
        index: int,
        position: int,
        offset_us: int,
        token_ids: Sequence[int],
        texts: Sequence[str],
        logprobs: Sequence[float],
    ) -> int:
        """Hold tokens that came at once one by one, or record them as they are; the position of the next."""
        if not self._applies(session):
            return self._recorder.run(session, generation_id, index, position, offset_us, token_ids, texts, logprobs)
        for token, text, logprob in zip(token_ids, texts, logprobs, strict=True):
            position = self.tokens(session, generation_id, index, position, offset_us, token_ids=(token,), text=text, logprobs=(logprob,))
        return position

    def _applies(self, session: SessionContext) -> bool:
        redactor = self._redactor.for_tenant(session.tenant)
        return redactor.searches and redactor.policy.output == "redacted"

    def _tool_call(self, session: SessionContext, payload: ToolCall) -> ToolCall:
        """A tool call without what the rules take out of its arguments."""
        if payload.content is None:
            return payload
        redactor, arguments = self._redactor.for_tenant(session.tenant), payload.content.arguments
        try:
            written, taken = redactor.document(load(arguments.encode()), "arguments")
        except ValueError:
            written, taken = redactor.text(arguments)
        content = payload.content.model_copy(update={"arguments": written}) if taken else payload.content
        return payload.model_copy(update={"content": content})

    def _let_go(self, key: tuple[bytes, int], *, all_of_it: bool) -> None:
        """Search what waits and record what can no longer change."""
        held = self._open.pop(key)
        text = "".join(delta.text for delta in held.deltas)
        spans = self._redactor.for_tenant(held.session.tenant).find(text)
        limit = len(text) if all_of_it else len(text) - WINDOW_CHARACTERS
        whole = [start for start, end, _ in spans if start < limit < end <= start + WINDOW_CHARACTERS]
        limit = min([limit, *whole])
        texts, ends = _without(held.deltas, spans)
        count = len(ends) if all_of_it else next((at for at, end in enumerate(ends) if end > limit), len(ends))
        while 0 < count < len(ends) and not held.deltas[count - 1].text:
            count -= 1  # its bytes may belong to the text that stays
        for delta, kept in zip(held.deltas[:count], texts, strict=False):
            self._pass_on(key, held.session, delta, kept)
        if count < len(ends):
            held.deltas = held.deltas[count:]
            held.characters = sum(len(delta.text) for delta in held.deltas)
            self._open[key] = held

    def _pass_on(self, key: tuple[bytes, int], session: SessionContext, delta: _Held, text: str | None) -> None:
        """Record one delta; `text` is what is left of one that was touched, None for one that was not."""
        if text is None:
            self._put(key, session, delta, delta.position, delta.token_ids, delta.text, delta.logprobs)
            return
        last = delta.position + max(len(delta.token_ids), 1) - 1
        for position in range(delta.position, last):
            self._put(key, session, delta, position, (), "", ())
        self._put(key, session, delta, last, (), text, ())

    def _put(
        self,
        key: tuple[bytes, int],
        session: SessionContext,
        delta: _Held,
        position: int,
        token_ids: Sequence[int],
        text: str,
        logprobs: Sequence[float],
    ) -> None:
        self._recorder.tokens(
            session, *key, position, delta.offset_us, channel=delta.channel, token_ids=token_ids, text=text, logprobs=logprobs
        )


def _without(deltas: Sequence[_Held], spans: Sequence[tuple[int, int, str]]) -> tuple[list[str | None], list[int]]:
    """What is left of each delta's text (None: all of it, nothing was taken), and where each ends in the whole text."""
    texts: list[str | None] = []
    ends: list[int] = []
    at = 0
    for delta in deltas:
        end = at + len(delta.text)
        touching = [span for span in spans if span[0] < end and span[1] > at]
        texts.append(_rest(delta.text, at, touching) if touching else None)
        ends.append(end)
        at = end
    for place in range(len(deltas) - 2, -1, -1):
        if not deltas[place].text and texts[place + 1] is not None:
            texts[place] = ""
    return texts, ends


def _rest(text: str, at: int, spans: Sequence[tuple[int, int, str]]) -> str:
    """A piece's text without spans of the whole text, in which it begins at `at`; a span is marked where it begins."""
    parts, cursor = [], 0
    for start, end, name in spans:
        parts.append(text[cursor : max(start - at, 0)])
        if start >= at:
            parts.append(mark(name))
        cursor = min(end - at, len(text))
    return "".join([*parts, text[cursor:]])
