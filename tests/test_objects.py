"""The object stores: one contract, held by a local folder and by a real S3 server."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
from pydantic import SecretStr

from schemas.errors import AlreadyExists, ConflictError, CorruptStore, SettingsError, StorageFull, StoreUnavailable, UsageError
from schemas.settings import ColdSettings
from store.duck import connect
from store.objects import open_store
from store.objects.base import Lock, ObjectStore
from store.objects.local import LocalStore
from store.objects.minio import MinioStore
from tests.flaky_proxy import Proxy

WRITERS = 32
UNSAFE_KEYS = ["", "/etc/passwd", "../x", "a/../../x", "a/./b", "a//b", "a/", ".tmp/x", "a/.hidden"]
UNSAFE_KEYS += ["a\\b", "a\0b", "a\nb", "x" * 256, "y/" * 600, "\ud800"]


def soon(seconds: float = 600) -> datetime:
    """An instant in the future, with a fraction that stores round up."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


def settings_of(server: Any, **changes: Any) -> ColdSettings:
    """Settings that lead to a MinIO fixture."""
    values = {"bucket": f"t-{uuid.uuid4().hex[:12]}", "endpoint": server.endpoint, "access_key": server.access_key, "timeout_s": 10.0}
    return ColdSettings(kind="minio", secret_key=SecretStr(server.secret_key), **(values | changes))


def nobody_at(port: int) -> ColdSettings:
    """Settings that lead to a port without an S3 server."""
    return ColdSettings(kind="minio", endpoint=f"127.0.0.1:{port}", access_key="a", secret_key=SecretStr("b"), timeout_s=0.5)


class ObjectStoreCase:
    """What every store must do."""

    @pytest.fixture
    def store(self) -> ObjectStore:
        raise NotImplementedError

    def test_purging_goes_past_governance_and_no_further(self, store: ObjectStore) -> None:
        """Every version of a governance-locked object goes; a compliance lock and a legal hold keep theirs, with the reason."""
        store.create("events/a/free", b"1")
        store.create("events/a/governed", b"2", lock=Lock("governance", soon()))
        store.create("events/a/bound", b"3", lock=Lock("compliance", soon(20)))
        store.create("events/ab", b"4")
        store.set_hold("events/a/free", True)
        with pytest.raises(ConflictError, match="hold"):
            store.purge("events/a/free")
        with pytest.raises(ConflictError, match="locked") as refused:
            store.purge("events/a/bound")
        store.set_hold("events/a/free", False)
        gone = [store.purge(f"events/a/{name}") for name in ("free", "governed", "never")]

        assert "not before" in refused.value.hint
        assert gone == [1, 1, 0]
        assert dict(store.remains("events/")) == {"events/a/bound": 1, "events/ab": 1}
        assert store.lock_of("events/ab").mode == "none"
        assert store.lock_of("events/a/bound").mode == "compliance"
        with pytest.raises(KeyError):
            store.lock_of("events/a/free")
        with pytest.raises(KeyError):
            store.set_hold("events/a/free", True)

    def test_round_trip(self, store: ObjectStore) -> None:
        """What was created is read back whole, in ranges, and described."""
        data = os.urandom(100_000)
        store.create("events/tenant=a/x.parquet", data)
        info = store.head("events/tenant=a/x.parquet")

        assert store.get("events/tenant=a/x.parquet") == data
        assert info is not None
        assert (info.key, info.size) == ("events/tenant=a/x.parquet", len(data))
        assert abs((info.modified_at - datetime.now(UTC)).total_seconds()) < 3600

    def test_ranges(self, store: ObjectStore) -> None:
        """A range ends where the object ends, is empty beyond, and is never counted from the end."""
        store.create("r", b"0123456789")

        assert [store.get_range("r", *r) for r in [(0, 3), (8, 5), (10, 1), (50, 2), (4, 0)]] == [b"012", b"89", b"", b"", b""]
        with pytest.raises(UsageError):
            store.get_range("r", -3, 3)

    def test_empty_object(self, store: ObjectStore) -> None:
        """An object of no bytes exists."""
        store.create("empty", b"")

        assert (store.get("empty"), store.get_range("empty", 0, 4)) == (b"", b"")

    def test_names_are_kept(self, store: ObjectStore) -> None:
        """Spaces, percent and plus signs and other scripts are part of a key, not of its encoding."""
        keys = sorted(["n/ü ?+%&#=~/x.txt", "n/日本/𝒳", "n/%2e%2e/y", "n/a b+c"])
        for key in keys:
            store.create(key, key.encode())

        assert [info.key for info in store.list("n/")] == keys
        assert [store.get(key).decode() for key in keys] == keys

    def test_missing(self, store: ObjectStore) -> None:
        """A missing key is a KeyError to read, None to head, and no error to delete."""
        store.delete("none/here")

        assert store.head("none/here") is None
        for length in (0, 1):
            with pytest.raises(KeyError):
                store.get_range("none/here", 0, length)
        with pytest.raises(KeyError):
            store.get("none/here")

    def test_a_folder_is_no_object(self, store: ObjectStore) -> None:
        """The beginning of a key is not itself an object."""
        store.create("folder/x", b"1")

        assert store.head("folder") is None
        with pytest.raises(KeyError):
            store.get("folder")

    def test_create_once(self, store: ObjectStore) -> None:
        """Other bytes under a taken key are refused, the same bytes are a retry that succeeds."""
        store.create("once", b"first")
        store.create("once", b"first")
        for other in (b"second", b"other", b"", b"first and more"):
            with pytest.raises(AlreadyExists):
                store.create("once", other)

        assert store.get("once") == b"first"

    def test_one_of_many_writers_wins(self, store: ObjectStore) -> None:
        """Of writers at the same moment exactly one succeeds, and its bytes are what stands."""
        barrier = threading.Barrier(WRITERS)

        def write(number: int) -> int | None:
            barrier.wait()
            try:
                store.create("race", b"writer %d" % number)
            except AlreadyExists:
                return None
            return number

        with ThreadPoolExecutor(WRITERS) as pool:
            winners = [n for n in pool.map(write, range(WRITERS)) if n is not None]

        assert [b"writer %d" % n for n in winners] == [store.get("race")]

    def test_create_from_file(self, store: ObjectStore, tmp_path: Path) -> None:
        """A file is stored once, retried with success, and refused when it differs in one byte."""
        data = os.urandom(9 << 20)
        (tmp_path / "a").write_bytes(data)
        (tmp_path / "b").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        store.create_from_file("big", tmp_path / "a")
        store.create_from_file("big", tmp_path / "a")
        with pytest.raises(AlreadyExists):
            store.create_from_file("big", tmp_path / "b")

        assert store.get("big") == data
        with pytest.raises(UsageError, match="cannot read"):
            store.create_from_file("gone", tmp_path / "gone")

    def test_list_order(self, store: ObjectStore) -> None:
        """Keys come in the order of their bytes, whatever folders they share; a prefix need not be a folder."""
        keys = ["l/a", "l/a-b", "l/a.b/c", "l/a0/c", "l/a0/d/e", "l/ab", "l/b/10", "l/b/9", "l/é"]
        for key in reversed(keys):
            store.create(key, b"x")

        assert [info.key for info in store.list("l/")] == keys
        assert [info.key for info in store.list("l/a0")] == ["l/a0/c", "l/a0/d/e"]
        assert [info.key for info in store.list("l/b")] == ["l/b/10", "l/b/9"]
        assert [info.key for info in store.list("l/", start_after="l/a0/c")] == keys[keys.index("l/a0/c") + 1 :]
        assert [info.key for info in store.list("l/", start_after="l/a0")] == keys[keys.index("l/a0/c") :]
        assert list(store.list("m/")) == []

    def test_many_objects_are_listed(self, store: ObjectStore) -> None:
        """A listing longer than one page of the server is complete."""
        keys = [f"many/{n:05}" for n in range(1_050)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: store.create(key, b"."), keys))

        assert [info.key for info in store.list("many/")] == keys

    def test_delete(self, store: ObjectStore) -> None:
        """A deleted object is gone, its neighbours stay, and its key may be used again."""
        for key in ("d/x", "d/x-2", "d/xy"):
            store.create(key, key.encode())
        store.delete("d/x")
        left = [info.key for info in store.list("d/")]
        store.create("d/x", b"again")

        assert left == ["d/x-2", "d/xy"]
        assert store.get("d/x") == b"again"

    @pytest.mark.parametrize("mode", ["governance", "compliance"])
    def test_locked_objects_stay(self, store: ObjectStore, mode: Any) -> None:
        """Deleting a locked object is refused and changes nothing."""
        store.create("locked", b"held", lock=Lock(mode, soon(5)))
        with pytest.raises(ConflictError, match="locked"):
            store.delete("locked")

        assert store.get("locked") == b"held"

    def test_a_retry_applies_the_lock(self, store: ObjectStore, tmp_path: Path) -> None:
        """An object that an interrupted call left without its lock gets it from the retry."""
        (tmp_path / "f").write_bytes(b"bytes")
        store.create("unlocked", b"bytes")
        store.create_from_file("unlocked", tmp_path / "f", lock=Lock("governance", soon(5)))
        with pytest.raises(ConflictError, match="locked"):
            store.delete("unlocked")

    def test_a_lock_ends(self, store: ObjectStore) -> None:
        """After its last second a locked object can be deleted."""
        store.create("short", b"x", lock=Lock("governance", soon(2)))
        deadline = time.monotonic() + 60
        while store.head("short") is not None and time.monotonic() < deadline:
            try:
                store.delete("short")
            except ConflictError:
                time.sleep(0.2)

        assert store.head("short") is None

    def test_a_lock_needs_an_end(self, store: ObjectStore) -> None:
        """A lock without an end, or with one that has no time zone, is refused before anything is written."""
        for until in (None, datetime(2099, 1, 1)):  # noqa: DTZ001 - a time without a zone is the case
            with pytest.raises(UsageError, match="needs an end"):
                store.create("endless", b"x", lock=Lock("governance", until))

        assert store.head("endless") is None

    @pytest.mark.parametrize("key", UNSAFE_KEYS)
    def test_unsafe_keys_are_refused(self, store: ObjectStore, key: str) -> None:
        """No method takes a key that leaves the store or that some store could not hold."""
        calls: list[Callable[[], object]] = [
            lambda: store.create(key, b"x"),
            lambda: store.create_from_file(key, Path(__file__)),
            lambda: store.get(key),
            lambda: store.get_range(key, 0, 1),
            lambda: store.head(key),
            lambda: store.delete(key),
            lambda: store.read_url(key, expires_s=60),
        ]
        for call in calls:
            with pytest.raises(UsageError):
                call()

    @pytest.mark.parametrize("prefix", ["../", "/etc", "a/../../", ".tmp/", "a/../b"])
    def test_unsafe_prefixes_are_refused(self, store: ObjectStore, prefix: str) -> None:
        """Listing does not leave the store either."""
        with pytest.raises(UsageError):
            list(store.list(prefix))

    def test_duckdb_reads_the_url(self, store: ObjectStore, tmp_path: Path) -> None:
        """DuckDB reads a segment through its read_url, with no credential of its own."""
        duckdb.sql(f"COPY (SELECT range AS n FROM range(1000)) TO '{tmp_path}/x.parquet' (FORMAT parquet)")
        store.create_from_file("events/x.parquet", tmp_path / "x.parquet")
        with connect(extensions=("httpfs",)) as connection:
            url = store.read_url("events/x.parquet", expires_s=60)
            row = connection.execute("SELECT count(*), sum(n) FROM read_parquet(?)", [url]).fetchone()

        assert row == (1000, 499_500)


class TestLocal(ObjectStoreCase):
    """A folder."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return open_store(ColdSettings(), tmp_path)

    def test_files_are_read_only(self, store: LocalStore) -> None:
        """An object is a file of mode 0444, and no unfinished file is left beside it."""
        store.create("a/b", b"x")

        assert (store.root / "a/b").stat().st_mode & 0o777 == 0o444
        assert list((store.root / ".tmp").iterdir()) == []

    def test_symbolic_links_are_refused(self, store: LocalStore, tmp_path: Path) -> None:
        """Neither a linked object nor a linked folder leads out of the store."""
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside/secret").write_bytes(b"s")
        (store.root / "folder").symlink_to(tmp_path / "outside")
        (store.root / "file").symlink_to(tmp_path / "outside/secret")
        for call in (lambda: store.get("folder/secret"), lambda: store.get("file"), lambda: store.create("folder/new", b"x")):
            with pytest.raises(CorruptStore, match="symbolic link"):
                call()

        assert list(store.list("folder/")) == []

    def test_an_object_is_no_folder(self, store: LocalStore) -> None:
        """A key below another object, or above one, is a conflict."""
        store.create("a/b", b"x")
        for key in ("a/b/c", "a"):
            with pytest.raises(ConflictError, match="in the way"):
                store.create(key, b"y")

    def test_a_folder_that_went_away(self, store: LocalStore) -> None:
        """A root that is gone (an unmounted disk) is unavailable, and is not made again on the disk below."""
        store.create("a", b"x")
        store.root.rename(store.root.with_name("elsewhere"))
        calls: list[Callable[[], object]] = [
            lambda: store.get("a"),
            lambda: store.head("a"),
            lambda: list(store.list("")),
            lambda: store.create("b", b"y"),
        ]
        for call in calls:
            with pytest.raises(StoreUnavailable):
                call()

        assert not store.root.exists()

    def test_a_full_disk(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """No room is StorageFull, leaves no object, and the next try succeeds."""

        def full(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StorageFull):
                store.create("a", b"x")

        assert store.head("a") is None
        store.create("a", b"x")

    def test_abandoned_files_are_swept(self, store: LocalStore) -> None:
        """What a dead writer left unfinished is removed when the store is opened a day later."""
        old, new = store.root / ".tmp/old", store.root / ".tmp/new"
        old.write_bytes(b"x")
        new.write_bytes(b"x")
        os.utime(old, (1, 1))
        LocalStore(store.root)

        assert (old.exists(), new.exists()) == (False, True)

    def test_probe(self, store: LocalStore) -> None:
        """The probe says that create-once holds and that a folder enforces no lock, and leaves nothing behind."""
        found = store.probe()

        assert (found.conditional_create, found.locks_enforced) == (True, False)
        assert list(store.list("")) == []


class TestMinio(ObjectStoreCase):
    """A real S3 server."""

    @pytest.fixture
    def store(self, minio: Any, tmp_path: Path) -> ObjectStore:
        """A bucket of its own, with object lock."""
        return open_store(settings_of(minio), tmp_path)

    def test_the_url_cannot_be_written(self, store: MinioStore, tmp_path: Path) -> None:
        """COPY to a presigned URL fails and leaves the object as it was."""
        duckdb.sql(f"COPY (SELECT 1 AS n) TO '{tmp_path}/x.parquet' (FORMAT parquet)")
        store.create_from_file("x.parquet", tmp_path / "x.parquet")
        before = store.get("x.parquet")
        with connect(extensions=("httpfs",)) as connection, pytest.raises(duckdb.Error):
            connection.execute(f"COPY (SELECT 666 AS n) TO '{store.read_url('x.parquet', expires_s=60)}' (FORMAT parquet)")

        assert store.get("x.parquet") == before

    def test_the_lock_is_that_of_the_put(self, store: MinioStore) -> None:
        """Mode and end of the lock stand as soon as create returns, the end rounded up to a second."""
        until = soon(5)
        store.create("x", b"x", lock=Lock("compliance", until))
        held = store._client.get_object_retention(store.bucket, "x")

        assert held is not None
        assert held.mode == "COMPLIANCE"
        assert timedelta(0) <= held.retain_until_date - until < timedelta(seconds=1)

    def test_a_retry_never_weakens_a_lock(self, store: MinioStore) -> None:
        """The same bytes with a shorter and softer lock leave the longer and harder one."""
        until = soon(8).replace(microsecond=0)
        store.create("x", b"x", lock=Lock("compliance", until))
        store.create("x", b"x", lock=Lock("governance", soon(2)))
        held = store._client.get_object_retention(store.bucket, "x")

        assert held is not None
        assert (held.mode, held.retain_until_date) == ("COMPLIANCE", until)

    def test_delete_removes_all_versions(self, store: MinioStore) -> None:
        """Versions and delete markers that other programs made go too."""
        store.create("v", b"1")
        store._client.remove_object(store.bucket, "v")  # leaves a delete marker over the version
        store.create("v", b"2")
        store.delete("v")

        assert list(store._client.list_objects(store.bucket, recursive=True, include_version=True)) == []

    def test_probe(self, store: MinioStore) -> None:
        """The probe finds what this server really does: create-once and locks hold."""
        found = store.probe()

        assert (found.conditional_create, found.locks_enforced) == (True, True)

    def test_probe_of_a_bucket_without_locks(self, minio: Any, store: MinioStore) -> None:
        """A bucket that someone made without object lock is reported, and a locked create there is refused with the cure."""
        bucket = f"plain-{uuid.uuid4().hex[:12]}"
        store._client.make_bucket(bucket)
        plain = MinioStore(settings_of(minio, bucket=bucket))
        found = plain.probe()

        assert (found.conditional_create, found.locks_enforced) == (True, False)
        with pytest.raises(SettingsError, match="keeps no locks"):
            plain.create("x", b"x", lock=Lock("governance", soon()))

    def test_wrong_settings(self, minio: Any) -> None:
        """Wrong credentials, a bad bucket name and an address with a scheme are settings errors with a hint."""
        for changes in (
            {"secret_key": SecretStr("wrong-secret")},
            {"access_key": "nobody"},
            {"bucket": "No"},
            {"endpoint": "http://127.0.0.1:9/x"},
        ):
            with pytest.raises(SettingsError) as caught:
                MinioStore(settings_of(minio).model_copy(update=changes))

            assert caught.value.hint

    def test_a_lost_reply_is_a_success(self, minio: Any) -> None:
        """The server wrote the object and its reply was lost: create finds its own bytes and succeeds, once."""
        with Proxy(minio.endpoint) as proxy:
            store = MinioStore(settings_of(minio, endpoint=proxy.endpoint))
            proxy.drop_next_reply_to = b"PUT "
            store.create("x", b"mine", lock=Lock("governance", soon(5)))

            assert proxy.dropped == 1
            assert store.get("x") == b"mine"
            assert len(list(store._client.list_objects(store.bucket, include_version=True))) == 1

    def test_a_lost_refusal_is_a_refusal(self, minio: Any) -> None:
        """When the lost reply was "taken", the retry says so too."""
        with Proxy(minio.endpoint) as proxy:
            store = MinioStore(settings_of(minio, endpoint=proxy.endpoint))
            store.create("x", b"theirs")
            proxy.drop_next_reply_to = b"PUT "
            with pytest.raises(AlreadyExists):
                store.create("x", b"mine")

    def test_no_server(self) -> None:
        """An address where nobody listens is unavailable at once."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
            with pytest.raises(StoreUnavailable):
                MinioStore(
                    ColdSettings(
                        kind="minio", endpoint=f"127.0.0.1:{taken.getsockname()[1]}", access_key="a", secret_key=SecretStr("b"), timeout_s=1
                    )
                )

    def test_a_server_that_does_not_answer(self) -> None:
        """A server that accepts and stays silent is unavailable after the time-out, not after urllib3's five minutes."""
        with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(StoreUnavailable):
            MinioStore(
                ColdSettings(
                    kind="minio", endpoint=f"127.0.0.1:{silent.getsockname()[1]}", access_key="a", secret_key=SecretStr("b"), timeout_s=0.5
                )
            )

    def test_the_server_goes_away_and_comes_back(self, minio_private: Any, tmp_path: Path) -> None:
        """Each method of an open store says that the server is away, and works again when it is back."""
        store = MinioStore(settings_of(minio_private, timeout_s=2.0))
        store.create("x", b"x")
        (tmp_path / "f").write_bytes(b"f")
        minio_private.stop()
        calls: list[Callable[[], object]] = [
            lambda: store.create("y", b"y"),
            lambda: store.create_from_file("z", tmp_path / "f"),
            lambda: store.get("x"),
            lambda: store.get_range("x", 0, 1),
            lambda: store.head("x"),
            lambda: list(store.list("")),
            lambda: store.delete("x"),
            store.probe,
        ]
        for call in calls:
            with pytest.raises(StoreUnavailable):
                call()
        minio_private.start()
        store.create("y", b"y")

        assert [info.key for info in store.list("")] == ["x", "y"]
