"""Models from a real MinIO: checked, resumed, evicted, fetched once by two; and whatever may go wrong on the way said in one line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import resource
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from click.testing import CliRunner
from minio import Minio

from schemas.errors import StorageFull
from schemas.settings import WeightsSettings
from store.fences import waiting
from store.weights import MANIFEST, WeightCache
from store.weights.cache import PIECE, SPARE_BYTES
from tests.conftest import MinioService
from tests.flaky_proxy import Proxy
from tests.program import ROOT, until
from tokentape.cli import main

SMALL = {"config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(range(256)) * 4000, "sub/vocab.txt": b"a\nb\n"}


class Store:
    """A bucket, a cache and the options that name both."""

    def __init__(self, folder: Path, minio: MinioService) -> None:
        self.minio, self.folder, self.cache = minio, folder, folder / "cache"
        self.bucket = f"weights-{uuid.uuid4().hex[:12]}"
        self.client = Minio(minio.endpoint, minio.access_key, minio.secret_key, secure=False)

    def address(self, name: str = "tiny") -> str:
        return f"s3://{self.bucket}/models/{name}"

    def options(self, *, endpoint: str | None = None, **more: object) -> list[str]:
        fields = {"endpoint": endpoint or self.minio.endpoint, "access_key": self.minio.access_key, "secret_key": self.minio.secret_key}
        said = {**fields, "cache": self.cache, **more}
        return ["--data", str(self.folder / "data"), *(word for key, value in said.items() for word in ("--set", f"weights.{key}={value}"))]

    def run(self, *words: str, code: int = 0, endpoint: str | None = None, **more: object) -> str:
        """What `tokentape weights …` says: its output, or its line of complaint."""
        ran = CliRunner().invoke(main, [*self.options(endpoint=endpoint, **more), "weights", *words])
        assert code == ran.exit_code, ran.output
        return (ran.stdout if code == 0 else ran.stderr).strip()

    def started(self, *words: str, endpoint: str, **more: object) -> subprocess.Popen[str]:
        """The same in a process of its own."""
        command = [sys.executable, "-m", "tokentape.cli", *self.options(endpoint=endpoint, **more), "weights", *words]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def publish(self, files: dict[str, bytes], name: str = "tiny") -> str:
        folder = self.folder / "published" / name
        for file, data in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        return self.run("publish", str(folder), self.address(name))

    def overwrite(self, file: str, data: bytes, name: str = "tiny") -> None:
        self.client.put_object(self.bucket, f"models/{name}/{file}", io.BytesIO(data), len(data))


@pytest.fixture
def store(tmp_path: Path, minio: MinioService) -> Store:
    """A bucket that nobody else has."""
    return Store(tmp_path, minio)


def content(folder: Path) -> dict[str, bytes]:
    """The files of a model, without those of the cache."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, ".used"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def large(pieces: int) -> bytes:
    """So many pieces that no two are alike, and one that is not whole."""
    return random.Random(7).randbytes(1 << 20) * (pieces * PIECE >> 20) + b"the end"


def test_a_model_there_and_back(store: Store) -> None:
    """What was published is fetched; the second time nothing but the manifest crosses the wire; sha256sum agrees."""
    digest = store.publish(SMALL)
    folder = Path(store.run("fetch", store.address()))
    with Proxy(store.minio.endpoint) as proxy:
        again = store.run("fetch", store.address(), "--digest", digest, endpoint=proxy.endpoint)
        sent = proxy.sent
    checked = subprocess.run(["sha256sum", "--check", "--quiet", MANIFEST], cwd=folder, capture_output=True, check=False)

    assert SMALL == content(folder)
    assert (folder.name, str(folder)) == (digest, again)
    assert sent < 4096
    assert 0 == checked.returncode, checked.stdout
    assert digest in store.run("list", "--format", "json")


@pytest.mark.parametrize("how", ["altered", "truncated"])
def test_what_is_not_what_its_manifest_says(store: Store, how: str) -> None:
    """Named, and not in the cache; when it is mended only that file comes again."""
    store.publish(SMALL)
    whole = SMALL["model.safetensors"]
    store.overwrite("model.safetensors", whole[:-1] + b"?" if how == "altered" else whole[:-1])
    complaint = store.run("fetch", store.address(), code=5)
    listed = store.run("list", "--format", "json")
    store.overwrite("model.safetensors", whole)
    folder = Path(store.run("fetch", store.address()))

    assert "altered on the way or in the store: model.safetensors (wanted " in complaint
    assert "config.json" not in complaint
    assert "" == listed
    assert SMALL == content(folder)


def test_a_connection_that_is_cut_is_taken_up_where_it_broke(store: Store) -> None:
    """Three cuts in the middle of a file cost three further requests and no byte twice; one that is always cut is an error."""
    data = {"model.safetensors": large(1)}
    store.publish(data)
    with Proxy(store.minio.endpoint) as proxy:
        proxy.cuts, proxy.cut_after = 3, 2_000_000
        folder = Path(store.run("fetch", store.address(), endpoint=proxy.endpoint))
        sent = proxy.sent
        (folder / "model.safetensors").unlink()
        os.rename(folder, folder.with_name("0" * 64))
        proxy.cuts, proxy.cut_after = 10_000, 30_000
        complaint = store.run("fetch", store.address(), code=5, endpoint=proxy.endpoint, connections=1)

    assert sent < len(data["model.safetensors"]) * 1.2
    assert "bytes early" in complaint


def test_killed_half_way_and_resumed(store: Store) -> None:
    """A fetch that is killed leaves pieces, its successor asks for the others only, and two successors at once fetch once."""
    data = {"config.json": b"{}", "model.safetensors": large(6)}
    size = len(data["model.safetensors"])
    digest = store.publish(data)
    pieces = store.cache / "partial" / digest / "model.safetensors.pieces"
    with Proxy(store.minio.endpoint) as proxy:
        proxy.silent_after = size * 5 // 6
        first = store.started("fetch", store.address(), endpoint=proxy.endpoint, connections=2)
        until(lambda: pieces.exists() and len(pieces.read_text().splitlines()) > 1 and proxy.sent >= (proxy.silent_after or 0))
        first.kill()
        first.communicate()
        came = len(pieces.read_text().splitlines()) - 1
        models = store.run("list", "--format", "json")
        before, proxy.silent_after = proxy.sent, None
        two = [store.started("fetch", store.address(), endpoint=proxy.endpoint) for _ in range(2)]
        said = [process.communicate(timeout=90) for process in two]
        resumed = proxy.sent - before

    assert -signal.SIGKILL == first.returncode
    assert "" == models
    assert came > 1
    assert resumed < size - came * PIECE + 100_000
    assert [(0, "")] * 2 == [(process.returncode, err) for process, (_, err) in zip(two, said, strict=True)]
    assert said[0][0] == said[1][0]
    assert data == content(Path(said[0][0].strip()))


def test_a_full_disk(store: Store) -> None:
    """The system lets no file grow that far: one line, nothing in the cache, and with room again it goes on."""
    store.publish({"model.safetensors": large(1)})
    command = [sys.executable, "-m", "tokentape.cli", *store.options(), "weights", "fetch", store.address()]

    def little() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    full = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, preexec_fn=little)  # one thread here
    models = store.run("list", "--format", "json")
    folder = Path(store.run("fetch", store.address()))

    assert 8 == full.returncode, full.stderr
    assert full.stderr.startswith("tokentape: fetch weights: File too large")
    assert "" == models
    assert (folder / "model.safetensors").stat().st_size == PIECE + len(b"the end")


def test_the_cache_has_a_size(store: Store) -> None:
    """The model that was not used for longest goes first; one that never fits is refused, and nothing went for it."""
    room = 2 * len(SMALL["model.safetensors"]) + 60_000
    digests = [store.publish({**SMALL, "name": name.encode()}, name) for name in "abcd"]
    for name in "ab":
        store.run("fetch", store.address(name), bytes_max=room)
    os.utime(store.cache / "models" / digests[0] / ".used")
    os.utime(store.cache / "models" / digests[1] / ".used", (1, 1))
    store.run("fetch", store.address("c"), bytes_max=room)
    kept = {path.name for path in (store.cache / "models").iterdir()}
    complaint = store.run("fetch", store.address("d"), code=8, bytes_max=1000)

    assert {digests[0], digests[2]} == kept
    assert "bytes do not fit into a cache of 1,000" in complaint
    assert kept == {path.name for path in (store.cache / "models").iterdir()}


def test_two_that_come_at_once_keep_within_its_size(store: Store) -> None:
    """What another process fetches counts as a whole from when it begins, and is never evicted; what has come of one's own counts too."""
    data = {name: {"model.safetensors": large(2), "name": name.encode()} for name in "ab"}
    first, second = (store.publish(files, name) for name, files in data.items())
    both = 2 * len(large(2))
    partial, pieces = store.cache / "partial" / first, store.cache / "partial" / first / "model.safetensors.pieces"
    with Proxy(store.minio.endpoint) as proxy:
        proxy.silent_after = PIECE * 3 // 2
        process = store.started("fetch", store.address("a"), endpoint=proxy.endpoint, bytes_max=both * 7 // 8, connections=1)
        until(lambda: pieces.exists() and len(pieces.read_text().splitlines()) > 1)
        complaint = store.run("fetch", store.address("b"), code=8, bytes_max=both * 7 // 8)
        lies = partial.is_dir()
        process.kill()
        process.communicate()
    store.run("fetch", store.address("b"), bytes_max=2 * both)
    resumed = Path(store.run("fetch", store.address("a"), bytes_max=both * 7 // 8))

    assert "bytes do not fit into a cache of" in complaint
    assert "that others fetch" in complaint
    assert lies
    assert data["a"] == content(resumed)
    assert [first] == [path.name for path in (store.cache / "models").iterdir()], f"{second} had to go"


def test_a_fetch_that_goes_on_has_its_room_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files took the whole of it when it began: a disk that has nothing but the spare room left is enough."""
    cache, size, here = WeightCache(WeightsSettings(cache=tmp_path)), 300 << 10, 100 << 10
    partial = tmp_path / "partial" / ("a" * 64)
    partial.mkdir(parents=True)
    with (partial / "model.safetensors").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    monkeypatch.setattr(WeightCache, "_free", lambda _: SPARE_BYTES)
    with waiting(tmp_path / "locks" / f"{partial.name}.lock", "this one"):
        assert [] == cache.evict(size - here, arriving=partial, here=here)
        with pytest.raises(StorageFull, match="bytes are needed"):
            cache.evict(2 * size - here, arriving=partial, here=here)


def test_what_cannot_be_fetched(store: Store) -> None:
    """No such model, another version, a manifest that leads out of its folder, wrong keys, no store: each in one line."""
    store.publish(SMALL)
    escaping = f"{hashlib.sha256(b'').hexdigest()}  ../../evil\n".encode()
    store.overwrite(MANIFEST, escaping, "bad")
    wrong = {
        "place": store.run("fetch", "https://elsewhere/x", code=2),
        "missing": store.run("fetch", store.address("nobody"), code=2),
        "version": store.run("fetch", store.address(), "--digest", "0" * 64, code=5),
        "manifest": store.run("fetch", store.address("bad"), code=5),
        "keys": store.run("fetch", store.address(), code=8, secret_key="wrong-secret"),
        "store": store.run("fetch", store.address(), code=8, endpoint="127.0.0.1:9"),
        "publish": store.run("publish", str(store.folder / "nothing"), store.address(), code=2),
    }
    words = {
        "place": "is no place of a model",
        "missing": f"no {MANIFEST} is there",
        "version": "the model's digest is ",
        "manifest": "is no line of a manifest",
        "keys": "SignatureDoesNotMatch",
        "store": "does not come",
        "publish": "no files are there",
    }

    assert dict.fromkeys(words, True) == {name: words[name] in said for name, said in wrong.items()}, wrong
    with contextlib.suppress(FileNotFoundError):
        assert [] == list((store.cache / "models").iterdir())
