"""The signer of ledgers in tests, and how their bytes are damaged."""

from __future__ import annotations

from store.ledger.note import Signer

ORIGIN = "example.org/ledger"
SIGNER = Signer(ORIGIN, bytes(range(32)))


def flip(data: bytes, bit: int) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
