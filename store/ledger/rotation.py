"""Handing the ledger over to another key: while the old one is there to sign that, and after it was lost.

The fresh key is on the disk before the entry that names it, and takes the old one's place after it. Whatever is interrupted in
between is finished by the next command that signs, or by the same command once more.
"""

from __future__ import annotations

from schemas import clock
from schemas.errors import ConflictError, SettingsError, UsageError
from schemas.settings import Settings
from store.ledger import open_ledger
from store.ledger.chain import LOST, ROTATED
from store.ledger.entry import Entry
from store.ledger.keys import KeyFolder
from store.ledger.ledger import ATTEMPTS_MAX, Ledger
from store.objects.base import ObjectStore


def rotate(settings: Settings, store: ObjectStore) -> Entry:
    """Have the key in force sign that a fresh one follows it; the entry. The old private key is gone afterwards.

    Raises:
        SettingsError: the private key in force is not here.
        StoreUnavailable: the store does not answer; the same command once more finds out what stands.
    """
    folder, ledger = KeyFolder(settings.data / "keys", settings.ledger.origin), open_ledger(settings, store)
    for _ in range(ATTEMPTS_MAX):
        folder.private(ledger.chain().last.key)  # finishes what was interrupted before a key is drafted
        fresh = folder.draft()
        try:
            entry = ledger.append(ROTATED, {"key": str(fresh.verifier)}, expected=ledger.head())
        except ConflictError:
            continue
        folder.promote()
        return entry
    raise ConflictError(f"lost {ATTEMPTS_MAX} races for a number", operation="rotate", place="ledger")


def begin_again(settings: Settings, store: ObjectStore, *, reason: str) -> Entry:
    """Begin a chain with a fresh key because the one in force was lost; the entry, which says since when and why.

    Raises:
        UsageError: the key is not lost.
        StoreUnavailable: the store does not answer.
    """
    folder = KeyFolder(settings.data / "keys", settings.ledger.origin)
    lost = open_ledger(settings, store).chain().last.key
    try:
        folder.private(lost)
    except SettingsError:
        pass
    else:
        raise UsageError("the key in force is not lost", operation="rotate", hint="`tokentape keys ledger rotate` without --lost")
    fresh = folder.draft()
    folder.trust(fresh.verifier)
    body = {"key": str(fresh.verifier), "lost": lost.key_id, "noticed_at": f"{clock.now():%Y-%m-%dT%H:%M:%SZ}", "reason": reason}
    entry = open_ledger(settings, store).append(LOST, body, fresh=fresh)
    folder.promote()
    return entry


def key_rows(ledger: Ledger) -> list[dict[str, object]]:
    """Each key that signed, the first one first: from which entry on, since when, and how it came.

    Raises:
        ProofError: the entries do not follow from the first key.
    """
    rows: list[dict[str, object]] = []
    for span in ledger.chain().spans:
        entry = ledger.entry(span.number) if span.number >= 0 else None
        since = entry.recorded_at if entry else None
        rows.append({"key_id": span.key.key_id, "how": span.how, "entry": span.number if entry else None, "since": since})
    return rows
