"""The ledger: appending under faults, in a folder and in MinIO."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from schemas.errors import AlreadyExists, ProofError, StoreUnavailable, UsageError
from schemas.settings import ColdSettings, Settings
from store.ledger import Digest, Ledger, digest_line, open_ledger
from store.ledger.chain import KeyChain
from store.ledger.entry import CHECKPOINTS, entry_key, make_entry
from store.ledger.merkle import (
    leaf_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)
from store.ledger.note import Signer
from store.ledger.verify import Report, verify_ledger
from store.objects import open_store
from store.objects.base import NO_LOCK, Lock, ObjectStore
from store.objects.local import LocalStore
from tests.flaky_proxy import Proxy
from tests.signing import ORIGIN, SIGNER


class LostReplies:
    """A store whose `create` succeeds and then raises, as often as `lose` says."""

    def __init__(self, store: ObjectStore, lose: int = 0) -> None:
        self._store = store
        self.lose = lose

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def create(self, key: str, data: bytes, *, lock: Lock = NO_LOCK) -> None:
        self._store.create(key, data, lock=lock)
        if self.lose:
            self.lose -= 1
            raise StoreUnavailable("the reply was lost", operation="create", place=key)


APPENDER = """
import sys
from pydantic import SecretStr
from pathlib import Path
from schemas.settings import ColdSettings
from store.ledger import Ledger
from store.ledger.note import Signer
from store.objects import open_store
cold, data, writer, count = ColdSettings.model_validate_json(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
cold = cold.model_copy(update={"secret_key": SecretStr(sys.argv[5])})
ledger = Ledger(open_store(cold, data), Signer("example.org/ledger", bytes(range(32))), "example.org/ledger")
for n in range(count):
    ledger.append("news", {"writer": writer, "n": n})
"""


class LedgerCase:
    """What the ledger does on every store."""

    @pytest.fixture
    def cold(self) -> ColdSettings:
        raise NotImplementedError

    @pytest.fixture
    def store(self, cold: ColdSettings, tmp_path: Path) -> ObjectStore:
        return open_store(cold, tmp_path)

    def test_append_and_read(self, store: ObjectStore) -> None:
        """Entries come back in order, chained, from any start, to a reader with the public key alone."""
        ledger = Ledger(store, SIGNER, ORIGIN)
        written = [ledger.append("news", {"n": n}) for n in range(7)]
        reader = Ledger(store, SIGNER.verifier, ORIGIN)

        assert list(reader.entries()) == written
        assert list(reader.entries(5)) == written[5:]
        assert list(reader.entries(9)) == []
        assert reader.head() == 7
        assert [e.previous for e in written] == [None, *(e.sha256 for e in written[:-1])]
        with pytest.raises(UsageError, match="public key"):
            reader.append("news", {})

    def test_checkpoints_and_proofs(self, store: ObjectStore) -> None:
        """Checkpoints cover all entries, carry the digests, follow one another, and proofs verify against them."""
        ledger = Ledger(store, SIGNER, ORIGIN)
        digest = Digest("log-1", 3, 17, sha256(b"x").digest())
        first = ledger.checkpoint()
        entries = [ledger.append("news", {"n": n}) for n in range(5)]
        second = ledger.checkpoint([digest_line(digest)])
        fresh = Ledger(store, SIGNER, ORIGIN)
        entries += [fresh.append("news", {"n": n}) for n in range(5, 8)]
        third = fresh.checkpoint()
        proof = fresh.consistency_proof(second.size, third.size)

        assert [c.size for c in (first, second, third)] == [0, 5, 8]
        assert second.digests == [digest]
        assert ledger.latest_checkpoint() == third == Ledger(store, SIGNER.verifier, ORIGIN).latest_checkpoint()
        assert third.head.root == root_of(leaf_hash(e.data) for e in entries)
        assert verify_consistency(second.size, third.size, second.head.root, third.head.root, proof)
        assert verify_inclusion(leaf_hash(entries[2].data), 2, 8, ledger.inclusion_proof(2, 8), third.head.root)
        size = sum(map(len, [*(e.data for e in entries), first.data, second.data, third.data]))
        assert verify_ledger(store, str(SIGNER.verifier)) == Report(8, 3, 0, size, 8, (), KeyChain.of(SIGNER.verifier))

    def test_a_lost_reply_enters_once(self, store: ObjectStore) -> None:
        """An append whose reply was lost says so, and the same append again finds its entry instead of a second one."""
        flaky = LostReplies(store)
        ledger = Ledger(flaky, SIGNER, ORIGIN)
        ledger.append("news", {"n": 0})
        flaky.lose = 2
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                ledger.append("news", {"n": 1})
        other = Ledger(store, SIGNER, ORIGIN).append("news", {"n": 2})
        again = ledger.append("news", {"n": 1.0})
        last = ledger.append("news", {"n": 1})

        assert [e.body["n"] for e in Ledger(store, SIGNER, ORIGIN).entries()] == [0, 1, 2, 1]
        assert (again.sequence, other.sequence, last.sequence) == (1, 2, 3)

    def test_processes_race(self, cold: ColdSettings, tmp_path: Path, store: ObjectStore) -> None:
        """Processes that append at once lose nothing, and no number is given twice."""
        writers, count = 3, 12
        secret = cold.secret_key.get_secret_value()
        argv = [sys.executable, "-c", APPENDER, cold.model_dump_json(), str(tmp_path)]
        started = [subprocess.Popen([*argv, str(w), str(count), secret], cwd=Path(__file__).parent.parent) for w in range(writers)]
        codes = [process.wait(120) for process in started]
        found = list(Ledger(store, SIGNER.verifier, ORIGIN).entries())

        assert codes == [0] * writers
        assert [entry.sequence for entry in found] == list(range(writers * count))
        for writer in range(writers):
            assert [entry.body["n"] for entry in found if entry.body["writer"] == writer] == list(range(count))
        assert verify_ledger(store, SIGNER.verifier).findings == ()

    def test_threads_share_a_ledger(self, store: ObjectStore) -> None:
        """Threads of one process may append through one instance."""
        ledger = Ledger(store, SIGNER, ORIGIN)
        with ThreadPoolExecutor(8) as pool:
            numbers = [entry.sequence for entry in pool.map(lambda n: ledger.append("news", {"n": n}), range(40))]

        assert sorted(numbers) == list(range(40))

    def test_a_changed_end_is_not_built_upon(self, store: ObjectStore) -> None:
        """A writer that opens a ledger whose last entry was forged, or whose checkpoint covers more, refuses to go on."""
        Ledger(store, SIGNER, ORIGIN).append("news", {"n": 0})
        stranger = make_entry(Signer(ORIGIN, bytes(32)), ORIGIN, sequence=1, previous=None, type="t", body={})
        store.create(stranger.key, stranger.data)
        with pytest.raises(ProofError):
            Ledger(store, SIGNER, ORIGIN).append("news", {"n": 1})
        with pytest.raises(ProofError):
            Ledger(store, SIGNER, ORIGIN).checkpoint()

    def test_a_cut_end_is_not_built_upon(self, store: ObjectStore) -> None:
        """Where a checkpoint covers more entries than stand, no new checkpoint is signed."""
        ledger = Ledger(store, SIGNER, ORIGIN)
        for n in range(3):
            ledger.append("news", {"n": n})
        ledger.checkpoint()
        store.delete(entry_key(2))
        with pytest.raises(ProofError, match="covers 3"):
            Ledger(store, SIGNER, ORIGIN).checkpoint()


class TestLocalLedger(LedgerCase):
    """In a folder."""

    @pytest.fixture
    def cold(self) -> ColdSettings:
        return ColdSettings()

    def test_open_ledger_locks(self, tmp_path: Path) -> None:
        """The installation's ledger has its key under the data directory and locks what it writes."""
        configuration = Settings(data=tmp_path)
        store = open_store(configuration.cold, tmp_path)
        entry = open_ledger(configuration, store).append("news", {})
        again = open_ledger(configuration, store)

        assert [e.key for e in again.entries()] == [entry.key]
        assert json.loads((tmp_path / "cold/.locks" / entry.key).read_bytes())["mode"] == "compliance"

    def test_the_newest_checkpoint_is_found(self, tmp_path: Path) -> None:
        """However old it is and however many entries came after it."""
        store = LocalStore(tmp_path)
        ledger = Ledger(store, SIGNER, ORIGIN)
        for n in range(3):
            ledger.append("news", {"n": n})
        made = ledger.checkpoint()
        for n in range(20):
            ledger.append("news", {"n": n})

        assert Ledger(store, SIGNER, ORIGIN).latest_checkpoint() == made

    def test_own_lines_are_reserved(self, tmp_path: Path) -> None:
        """Callers cannot pass lines that the ledger writes itself, nor a log id with white space."""
        ledger = Ledger(LocalStore(tmp_path), SIGNER, ORIGIN)
        with pytest.raises(UsageError, match="may not begin"):
            ledger.checkpoint(["frontier x"])
        with pytest.raises(UsageError, match="white space"):
            digest_line(Digest("a b", 0, 0, bytes(32)))


class TestMinioLedger(LedgerCase):
    """In a real S3 server."""

    @pytest.fixture
    def cold(self, minio: Any) -> ColdSettings:
        return ColdSettings(
            kind="minio",
            endpoint=minio.endpoint,
            bucket=f"t-{uuid.uuid4().hex[:12]}",
            access_key=minio.access_key,
            secret_key=SecretStr(minio.secret_key),
        )

    def test_a_reply_lost_on_the_wire_enters_once(self, cold: ColdSettings, tmp_path: Path) -> None:
        """The store resolves a lost reply by itself: the append succeeds and there is one entry, locked."""
        with Proxy(cold.endpoint) as proxy:
            store = open_store(cold.model_copy(update={"endpoint": proxy.endpoint}), tmp_path)
            ledger = Ledger(store, SIGNER, ORIGIN, lock_days=1)
            proxy.drop_next_reply_to = b"PUT "
            entry = ledger.append("news", {"n": 0})

            assert (proxy.dropped, entry.sequence, ledger.head()) == (1, 0, 1)
            with pytest.raises(Exception, match="locked"):
                store.delete(entry.key)


def test_a_taken_number_moves_on(tmp_path: Path) -> None:
    """A writer that fell far behind finds the end again and appends there."""
    store = LocalStore(tmp_path)
    slow, fast = Ledger(store, SIGNER, ORIGIN), Ledger(store, SIGNER, ORIGIN)
    slow.append("news", {"n": 0})
    for n in range(1, 30):
        fast.append("news", {"n": n})
    entry = slow.append("news", {"n": 30})

    assert entry.sequence == 30
    assert [e.body["n"] for e in slow.entries()] == list(range(31))
    with pytest.raises(AlreadyExists):
        store.create(entry.key, b"another")
    assert sorted(info.key for info in store.list(CHECKPOINTS)) == []
