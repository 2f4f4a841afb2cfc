"""The running digest of a partition: it commits to every record of the log in order, however they were batched.

`D(0)` is 32 zero bytes and `D(n+1) = SHA-256(D(n) || SHA-256(record n))`. A record that has no row (a duplicate, or one
in quarantine) is followed by its hash alone, so that the digest can be made again from rows and hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from store.shards import DIGEST_START

__all__ = ["DIGEST_START", "advance", "extend", "record_hashes"]


def record_hashes(records: Sequence[bytes]) -> list[bytes]:
    """SHA-256 of each framed record."""
    sha256 = hashlib.sha256
    return [sha256(record).digest() for record in records]


def advance(digest: bytes, hashes: Iterable[bytes]) -> bytes:
    """The running digest after further records, given by their hashes."""
    sha256 = hashlib.sha256
    for item in hashes:
        digest = sha256(digest + item).digest()
    return digest


def extend(digest: bytes, record_hash: bytes) -> bytes:
    """The running digest after one more record, given by its hash."""
    return hashlib.sha256(digest + record_hash).digest()
