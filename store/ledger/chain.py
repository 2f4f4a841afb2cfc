"""Which key signs when: the first public key, and what each entry that hands over to another one made of it.

A rotation is an entry of type `key_rotated`: the key in force signs that another follows it. Where the key in force was lost nobody
can sign that; then an entry of type `key_lost` is signed by a fresh key, and counts only for who was handed that key's public half by
another way. So the first public key alone proves all rotations, and a fresh start only together with the key that was begun with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from schemas.errors import UsageError
from store.ledger.entry import Checkpoint, Entry, checkpoint_size, read_checkpoint
from store.ledger.note import ModifiedNote, UnsignedNote, Verifier

ROTATED = "key_rotated"
LOST = "key_lost"
"""Types of the entries that hand over; the body of both holds `key`, the public key that follows, in signed-note form."""


@dataclass(frozen=True, slots=True)
class Span:
    """`key` signs what comes after entry `number`, which handed over to it; the first key's number is -1."""

    number: int
    key: Verifier
    how: Literal["first", "rotated", "lost"]


@dataclass(frozen=True, slots=True)
class KeyChain:
    """The keys of a ledger as far as its entries were followed. `trusted` are public keys that were handed over by another way."""

    trusted: tuple[Verifier, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, keys: KeyChain | Verifier | Iterable[Verifier]) -> KeyChain:
        """A chain that begins with the first of these keys; one that exists already is begun anew.

        Raises:
            UsageError: there is none, or they do not belong to one ledger.
        """
        trusted = keys.trusted if isinstance(keys, KeyChain) else (keys,) if isinstance(keys, Verifier) else tuple(keys)
        if len({key.name for key in trusted}) != 1:
            hint = "one key a line, the first one first"
            raise UsageError("these are not the public keys of one ledger", operation="read key", hint=hint)
        return cls(trusted, (Span(-1, trusted[0], "first"),))

    @property
    def name(self) -> str:
        """The ledger's name."""
        return self.trusted[0].name

    @property
    def last(self) -> Span:
        """The newest key."""
        return self.spans[-1]

    def at(self, number: int) -> Verifier:
        """The key in force once the entries before `number` stand: it signs that entry, and a checkpoint over so many entries."""
        return next(span.key for span in reversed(self.spans) if span.number < number)

    def check(self, entry: Entry, origin: str) -> KeyChain:
        """Hold an entry's signature against the key in force; the chain after it.

        Raises:
            UnsignedNote: another key claims to have signed it, or a fresh start that no trusted key vouches for.
            ModifiedNote: the signature does not fit, the entry belongs to another ledger, or hands over to what cannot follow.
        """
        if entry.type == LOST:
            return self._begin_again(entry, origin)
        try:
            entry.check(self.at(entry.sequence), origin)
        except UnsignedNote as error:
            if entry.type == ROTATED:
                raise UnsignedNote(f"a forged rotation: {error.fault}", operation="read entry", place=entry.key) from None
            raise
        return self._with(Span(entry.sequence, _named(entry), "rotated")) if entry.type == ROTATED else self

    def read_checkpoint(self, key: str | None, data: bytes, origin: str) -> Checkpoint:
        """A checkpoint, held against the key in force at its size. Arguments and errors as `store.ledger.entry.read_checkpoint`."""
        return read_checkpoint(key, data, self.at(checkpoint_size(data)), origin)

    def _begin_again(self, entry: Entry, origin: str) -> KeyChain:
        fresh = _named(entry)
        if fresh not in self.trusted[1:]:
            fault = f"the key before it was lost, and a fresh one, {fresh.key_id}, signs itself: have it handed to you by another way"
            raise UnsignedNote(fault, operation="read entry", place=entry.key)
        entry.check(fresh, origin)
        return self._with(Span(entry.sequence, fresh, "lost"))

    def _with(self, span: Span) -> KeyChain:
        """The chain with one more key; reading an entry twice changes nothing."""
        if span in self.spans:
            return self
        if span.number < self.last.number or span.key in [known.key for known in self.spans] or span.key.name != self.name:
            raise ModifiedNote(f"hands over to {span.key.key_id}, which cannot follow", operation="read entry", place=str(span.number))
        return KeyChain(self.trusted, (*self.spans, span))


def _named(entry: Entry) -> Verifier:
    """The key that an entry hands over to."""
    try:
        return Verifier.parse(str(entry.body.get("key")))
    except UsageError:
        raise ModifiedNote("hands over to what is no key", operation="read entry", place=entry.key) from None
