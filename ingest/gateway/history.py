"""Which earlier request of its session a request continues, so that a conversation's messages are not listed anew each turn.

Turn n of a conversation continues turn n with its lowest set bit cleared (the parents of a Fenwick tree) and lists only
the messages since then. So a conversation of n turns lists about n log2(n) messages in all instead of n², and a reader
follows at most log2(n) requests back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

TURNS_MAX = 64
"""Requests remembered per session; one whose predecessor is forgotten lists all its messages again."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A request as later ones may continue it; `before` is the one that it continues itself."""

    number: int
    generation_id: bytes
    messages: int
    before: Turn | None = None


class History:
    """The latest requests of one session by what they asked."""

    def __init__(self) -> None:
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()

    def continued(self, generation_id: bytes, message_ids: Sequence[bytes]) -> Turn | None:
        """The request whose messages these begin with; from now on this one may be continued too."""
        digests = _digests(message_ids)
        last = next((turn for digest in reversed(digests) if (turn := self._turns.get(digest))), None)
        number = last.number + 1 if last else 0
        before = last
        while before is not None and before.number > number & (number - 1):
            before = before.before
        if digests:
            self._turns[digests[-1]] = Turn(number, generation_id, len(message_ids), before)
            self._turns.move_to_end(digests[-1])
            if len(self._turns) > TURNS_MAX:
                self._turns.popitem(last=False)
        return before


def _digests(message_ids: Sequence[bytes]) -> list[bytes]:
    """A digest of the first message, of the first two, and so on."""
    running, digests = blake2b(digest_size=16), []
    for message_id in message_ids:
        running.update(message_id)
        digests.append(running.digest())
    return digests
