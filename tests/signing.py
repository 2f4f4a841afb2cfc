"""The signer of ledgers in tests, and how their bytes are damaged."""

from __future__ import annotations

import random
from hashlib import sha256
from pathlib import Path

from store.ledger import Digest, Ledger, digest_line
from store.ledger.note import Signer
from store.objects.local import LocalStore

ORIGIN = "example.org/ledger"
SIGNER = Signer(ORIGIN, bytes(range(32)))


def flip(data: bytes, bit: int) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def lose_end(database: Path, harm: str) -> None:
    """Damage, cut or remove the write-ahead log of a SQLite file, as `harm` says; `all` removes the file itself, too."""
    wal = database.with_name(f"{database.name}-wal")
    good = wal.read_bytes()
    bad = {"flip": flip(good, len(good) * 7), "header": flip(good, 20), "cut": good[: len(good) // 2]}
    if harm in bad:
        wal.write_bytes(bad[harm])
    else:
        wal.unlink()
    if harm == "all":
        database.unlink()


def signed_ledger(store: LocalStore, signer: Signer = SIGNER, seed: int = 4) -> bytes:
    """Twelve entries, nine of them segments, with five checkpoints; the last, which is returned, covers no more than the one before."""
    ledger, rng = Ledger(store, signer, ORIGIN), random.Random(seed)
    for number in range(12):
        if number % 4 == 3:
            ledger.append("job", {"n": number, "seed": seed})
        else:
            data = rng.randbytes(200 + number)
            digest = sha256(data).hexdigest()
            key = f"events/tenant=a/day=2026-01-0{number % 3 + 1}/standard-{number}-{digest[:8]}.parquet"
            store.create(key, data)
            ledger.append("segment", {"key": key, "bytes": len(data), "sha256": digest, "rows": 10})
        if number % 3 == 2:
            ledger.checkpoint([digest_line(Digest("log", 0, number, bytes([number]) * 32))])
    return ledger.checkpoint([digest_line(Digest("log", 0, 99, bytes(32)))]).data
