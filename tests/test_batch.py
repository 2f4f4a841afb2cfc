"""Batch work in both deployments, before a real engine, and what is particular to keys, files and the command line."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import openai
import orjson
import pytest
from click.testing import CliRunner

from ingest.debug import workers
from ingest.gateway.batch.desk import BatchDesk, parse_item, result_of
from ingest.gateway.batch.facts import BATCH, CLAIM, COMMITTED, ENDING, FILE, SUBMITTER
from ingest.gateway.batch.finish import finish, forget
from ingest.gateway.batch.requeue import bereft, requeue
from ingest.gateway.batch.submission import Submission, end_abandoned
from ingest.gateway.batch.window import Window, done_with
from ingest.gateway.keys import KIND, make
from schemas.batches import Batch, Owner
from schemas.errors import ConflictError
from schemas.events import SequenceFinished
from schemas.settings import GatewaySettings, Settings
from scripts.native.processes import free_port
from store.control import open_control
from tests.batch_case import (
    AT_WORK,
    BatchCase,
    Forks,
    Upstream,
    configured,
    desk_at,
    ended,
    jsonl,
    lines_of,
    remove,
    request,
    results_at,
    submit,
    submit_at,
    texts_of,
    written,
)
from tests.conftest import KafkaService, MinioService, VllmService, distributed
from tests.gateway_rig import Rig, broken
from tests.program import until
from tests.test_gateway import payloads
from tokentape.cli import main


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Where workers and submitters come from that are to be killed."""
    forks = Forks()
    yield forks
    forks.close()


class TestEmbedded(BatchCase):
    """Through the embedded log."""

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, tmp_path_factory: pytest.TempPathFactory) -> Settings:
        return Settings(data=tmp_path_factory.mktemp("batch"))


class TestKafka(BatchCase):
    """Through a topic for each model."""

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, tmp_path_factory: pytest.TempPathFactory, kafka: KafkaService, minio: MinioService) -> Settings:
        return distributed(tmp_path_factory.mktemp("batch"), kafka, minio)


def tokentape(*arguments: str) -> Any:
    """The command's result."""
    return CliRunner().invoke(main, list(arguments))


def test_command_line(tmp_path: Path, vllm: VllmService) -> None:
    """Submitted with nothing else running, worked off by a gateway before vLLM, with token ids on the tape; results by the command line."""
    settings = Settings(data=tmp_path / "data")
    options = ("--data", str(settings.data), "--set", f"gateway.upstream={vllm.url}", "batch")
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_bytes(jsonl(request("a", "x", "nobody")))
    good.write_bytes(jsonl(*(request(f"r{i}", "Hello.", vllm.model, more={"max_tokens": 4}) for i in range(3))))
    refused = tokentape(*options, "submit", str(bad))
    made = tokentape(*options, "submit", str(good), "--tag", "night")
    batch_id = made.output.strip()
    early = tokentape(*options, "results", batch_id)
    gateway = GatewaySettings(port=0, upstream=vllm.url)
    rig = Rig(settings.model_copy(update={"gateway": gateway}))
    results = tokentape(*options, "results", batch_id, "--wait")
    events = rig.events()
    rig.close()
    shown = json.loads(tokentape(*options, "show", batch_id, "--format", "json").output)
    lines = [json.loads(line) for line in results.stdout.splitlines() if line.startswith("{")]

    assert (refused.exit_code, f"line 1: no upstream serves the model 'nobody'; valid: {vllm.model}" in refused.output) == (2, True)
    assert (made.exit_code, early.exit_code) == (0, 2)
    assert "is in_progress: 0 of 3 requests have ended" in early.output
    assert [line["custom_id"] for line in lines] == ["r0", "r1", "r2"]
    assert all(line["response"]["status_code"] == 200 for line in lines)
    assert len(payloads(events, SequenceFinished)) == 3
    assert (shown["status"], shown["completed"], shown["failed"]) == ("completed", 3, 0)


def test_keys(tmp_path: Path) -> None:
    """With keys required a batch is its key's: others cannot see it, models are the key's, and no token is kept in the log."""
    upstream = Upstream()
    with broken(upstream.act, models=("m", "secret")) as server:
        upstream.server = server
        settings = configured(Settings(data=tmp_path / "data"), server.url)
        settings = settings.model_copy(update={"gateway": settings.gateway.model_copy(update={"auth": "required"})})
        control = open_control(settings)
        tokens = []
        for tenant in ("acme", "other"):
            token, key = make(owner="ann", tenant=tenant, models=("m",))
            control.append(KIND, key.key_id, key.model_dump(mode="json"))
            tokens.append(token)
        control.close()
        rig = Rig(settings)
        own, other = (rig.client(api_key=token) for token in tokens)
        made = submit(own, jsonl(request("a", "mine")))
        batch = ended(own, made.id)
        texts = texts_of(lines_of(own, batch.output_file_id))
        with pytest.raises(openai.BadRequestError, match="this key may not ask for the model 'secret'; valid: m"):
            submit(own, jsonl(request("a", "x", "secret")))
        with pytest.raises(openai.NotFoundError, match="no batch is called"):
            other.batches.retrieve(made.id)
        with pytest.raises(openai.NotFoundError, match="no file is called"):
            other.files.content(batch.output_file_id)
        with pytest.raises(openai.AuthenticationError):
            rig.client(api_key="tt-nothing").batches.list()
        tenants = {event.tenant for event in rig.events() if event.kind == "request_submitted"}
        rig.close()
    kept = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())

    assert texts == {"a": "you said mine"}
    assert tenants == {"acme"}
    assert not any(token.encode() in kept for token in tokens)


@pytest.fixture(scope="module")
def small_upstream() -> Iterator[Upstream]:
    """The upstream of `small`."""
    upstream = Upstream()
    with broken(upstream.act, models=("m",)) as server:
        upstream.server = server
        yield upstream


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, small_upstream: Upstream) -> Iterator[Rig]:
    """A gateway with narrow limits."""
    settings = Settings(data=tmp_path_factory.mktemp("small"))
    rig = Rig(configured(settings, small_upstream.url, window_h=2, lines_max=3, file_bytes_max=1024))
    yield rig
    rig.close()


def test_limits(small: Rig) -> None:
    """A file that is too large or has too many lines, an unknown purpose and too long a window are refused with what is possible."""
    client = small.client()
    with pytest.raises(openai.BadRequestError, match=r"'24h' is no window; hours or days such as 24h, at most 2h"):
        submit(client, jsonl(request("a", "x")))
    with pytest.raises(openai.BadRequestError, match="purpose 'assistants' is not served; valid: batch"):
        client.files.create(file=("x", b"{}"), purpose="assistants")
    with pytest.raises(openai.BadRequestError, match="more than 3 lines"):
        submit(client, jsonl(*(request(f"r{i}", "x") for i in range(4))), completion_window="1h")
    with pytest.raises(openai.APIStatusError, match=r"batch\.file_bytes_max"):
        submit(client, jsonl(request("a", "x" * 1024)), completion_window="1h")


def test_pages(small: Rig) -> None:
    """Lists come page by page, newest first, nothing twice; a wrong limit is named."""
    client = small.client()
    made = [submit(client, jsonl(request("a", f"page {i}")), completion_window="1h") for i in range(3)]
    for batch in made:
        ended(client, batch.id)
    page = client.batches.list(limit=2)
    with pytest.raises(openai.BadRequestError, match="limit must be a number from 1 to 100"):
        client.batches.list(limit=0)

    assert (len(page.data), page.has_more) == (2, True)
    assert [batch.id for batch in client.batches.list(limit=1)][:3] == [batch.id for batch in reversed(made)]
    files = [file.id for file in client.files.list(limit=1)]
    assert len(files) == len(set(files))
    assert {batch.input_file_id for batch in made} < set(files)


def test_expired(small: Rig, small_upstream: Upstream) -> None:
    """What has a result when the window ends keeps it; every other line says that it expired."""
    client = small.client()
    small_upstream.asked.update({"busy a": -10_000, "busy b": -10_000})
    brief = small.settings.batch.model_copy(update={"window_h": 0.002})
    with desk_at(small.settings.model_copy(update={"batch": brief})) as desk:
        made = submit_at(desk, written(small.settings, request("a", "busy a"), request("b", "busy b"), request("c", "quick")))
    batch = ended(client, made.batch_id, "expired")
    missing = {line["custom_id"]: line["error"]["code"] for line in lines_of(client, batch.error_file_id)}

    assert texts_of(lines_of(client, batch.output_file_id)) == {"c": "you said quick"}
    assert missing == {"a": "batch_expired", "b": "batch_expired"}
    assert batch.expired_at


def test_forgotten(small: Rig) -> None:
    """After `batch.keep_days` batch, files and results are gone, from the store too; one that has not ended stays."""
    client = small.client()
    old = ended(client, submit(client, jsonl(request("a", "old")), completion_window="1h").id)
    kept = client.files.create(file=("kept.jsonl", jsonl(request("a", "kept"))), purpose="batch")
    batch = small.settings.batch.model_copy(update={"keep_days": 1e-9})
    with desk_at(small.settings.model_copy(update={"batch": batch})) as desk:
        reading = desk.facts.find(old.id)
        assert reading is not None
        waiting = reading.model_copy(update={"batch_id": "batch_waiting", "input_file_id": kept.id, "ends": {"m": [1 << 40]}})
        desk.facts.write(BATCH, waiting.batch_id, waiting)
        forget(desk)
        left = [found.key for found in desk.objects.list("batch/")]
        batches = [found.batch_id for found in desk.facts.batches()]
        for kind in (BATCH, FILE):
            desk.facts.write(kind, waiting.batch_id if kind == BATCH else kept.id, None)

    assert batches == ["batch_waiting"]
    assert [key.rpartition("/")[2] for key in left] == [kept.id]
    until(lambda: not client.batches.list().data)
    with pytest.raises(openai.NotFoundError, match="no file is called"):
        client.files.content(old.output_file_id)


def test_upstream_away(tmp_path: Path) -> None:
    """An upstream that stops in the middle of a batch and starts again later: its requests wait, and no wait counts as an attempt."""
    upstream, port = Upstream(), free_port()
    upstream.open.clear()
    with broken(upstream.act, models=("m",), port=port) as server:
        rig = Rig(configured(Settings(data=tmp_path / "data"), server.url, attempts_max=1))
        client = rig.client()
        made = submit(client, jsonl(*(request(f"r{i}", f"away {i}") for i in range(8))))
        until(lambda: len(upstream.order) == AT_WORK)
    rig.wait_for("generation_failed")
    status = client.batches.retrieve(made.id).status
    upstream.open.set()
    with broken(upstream.act, models=("m",), port=port):
        batch = ended(client, made.id)
        rig.close()

    assert status == "in_progress"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (8, 0)


def test_silent_submitter(tmp_path: Path) -> None:
    """A submitter that lives but says nothing for too long loses its batch to whoever looks, and is told so."""
    settings = Settings(data=tmp_path / "data")
    hasty = settings.model_copy(update={"log": settings.log.model_copy(update={"timeout_s": 0.001})})
    with desk_at(settings) as desk:
        submission = Submission(desk.facts, "batch_silent", hasty)
        submission.renew()
        owner, now = Owner(tenant="default", name="somebody"), time.time()
        named = {"batch_id": "batch_silent", "endpoint": "mixed", "input_file_id": "file-x", "window": "1h"}
        batch = Batch.model_validate({**named, "owner": owner, "total": 1, "created_at": now, "expires_at": now + 3600})
        desk.facts.write(BATCH, batch.batch_id, batch)
        until(lambda: time.time() > now + 0.01)
        output = tokentape("--data", str(settings.data), "batch", "show", "batch_silent", "--format", "json").output
        shown = next(json.loads(line) for line in output.splitlines() if line.startswith("{") and "status" in line)
        until(lambda: desk.facts.ended("batch_silent"))
        with pytest.raises(ConflictError, match="batch_silent was taken for abandoned"):
            submission.check()

    assert shown["status"] == "failed"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[BatchDesk]:
    """A desk with nobody else."""
    with desk_at(Settings(data=tmp_path / "data")) as desk:
        yield desk


def answer(desk: BatchDesk, batch: Batch, number: int, status: int = 200) -> bytes:
    """Create the result of a line."""
    result = orjson.dumps({"id": f"b{number}", "custom_id": f"r{number}", "response": {"status_code": status, "body": {}}, "error": None})
    desk.objects.create(result_of(batch, number), result)
    return result


def waiting(desk: BatchDesk) -> Batch:
    """A batch of four requests, r1 to r4."""
    return submit_at(desk, written(desk.settings, *(request(f"r{i}", f"r{i}") for i in range(1, 5))))


def records(desk: BatchDesk, batch: Batch) -> list[str]:
    """What stands of a batch in the log of model m, by custom id."""
    work = desk.works.standing("m")
    found = [parse_item(value) for partition in range(work.partitions) for value in work.read(partition, 0, limit=99).values]
    return sorted(item.custom_id for item in found if item.batch_id == batch.batch_id)


def test_offsets_of_another_log(desk: BatchDesk) -> None:
    """What workers committed in another log says nothing of a batch, and what it waits for is appended once."""
    batch = waiting(desk)
    remove(desk.settings, "m")
    for partition in range(4):
        desk.facts.write(COMMITTED, f"{partition}/m", {"log_id": "another", "offset": 1 << 40})
    status = desk.facts.status(batch)
    waiting(desk)  # the new log reaches as far as the old one did
    answer(desk, batch, 2)
    requeue(desk, batch)
    once = records(desk, batch)
    requeue(desk, batch)

    assert status == "in_progress"
    assert once == records(desk, batch) == ["r1", "r3", "r4"]
    assert bereft(desk, desk.facts.batches()) == {}


def test_places_in_another_log() -> None:
    """What is worked off of a log that was replaced is not deleted from the new one, which holds other records there."""
    places = [Window("m", 0, "old", 5, written=5), Window("m", 1, "new", 3, written=2), Window("m", 2, "new", 0), Window("n", 3, "new", 4)]

    assert done_with(places, "m", "new") == {1: 2}


def test_batch_of_an_earlier_version(desk: BatchDesk) -> None:
    """It does not say which log its records are in: it is the one in which workers committed, and reaches as far as the records do."""
    batch = waiting(desk)
    old = {name: value for name, value in batch.model_dump(mode="json").items() if name != "logs"}
    desk.facts.write(BATCH, batch.batch_id, old)
    found = desk.facts.batches()
    untouched = bereft(desk, found)
    for partition in range(4):
        desk.facts.write(COMMITTED, f"{partition}/m", {"log_id": batch.logs["m"], "offset": 1})
    committed, worked_off = bereft(desk, found), desk.facts.worked_off(found[0])
    remove(desk.settings, "m")
    for partition in range(4):
        desk.facts.write(COMMITTED, f"{partition}/m", {"log_id": desk.works.standing("m").log_id, "offset": 0})
    beyond = bereft(desk, found)
    waiting(desk)
    desk.facts.write(COMMITTED, "0/m", {"log_id": batch.logs["m"], "offset": 0})
    elsewhere = bereft(desk, found)
    requeue(desk, batch)

    assert (found[0].logs, untouched, committed, worked_off) == ({}, {}, {}, True)
    assert list(elsewhere) == list(beyond) == [batch.batch_id]
    assert records(desk, batch) == ["r1", "r2", "r3", "r4"]
    assert desk.facts.batch(batch.batch_id, None).logs == {"m": desk.works.of("m").log_id}


def test_nothing_wanted_is_appended(desk: BatchDesk) -> None:
    """A batch that was cancelled ends without its log."""
    batch = waiting(desk)
    kept = answer(desk, batch, 3)
    desk.cancel(batch, "ada")
    remove(desk.settings, "m")
    requeue(desk, batch)
    (moved,) = desk.facts.batches()
    worked_off = desk.facts.worked_off(moved)
    finish(desk, moved)
    lines = list(b"".join(desk.results(moved)).splitlines())

    assert (records(desk, batch), worked_off, desk.facts.status(moved)) == ([], True, "cancelled")
    assert lines[0] == kept
    assert len(lines) == 4


@pytest.mark.parametrize("lost", [None, "error"])
def test_an_end_that_no_fact_tells_of(lost: str | None, desk: BatchDesk) -> None:
    """A backup may have the files of results, or one of two, and facts of before: what stands in them is not asked again."""
    batch = waiting(desk)
    good, bad = [answer(desk, batch, number) for number in (1, 2, 4)], answer(desk, batch, 3, status=500)
    finish(desk, batch)
    end = desk.facts.ended(batch.batch_id)
    assert end is not None
    for kind, key in ((ENDING, batch.batch_id), (FILE, end.output_file_id), (FILE, end.error_file_id)):
        desk.facts.write(kind, str(key), None)
    if lost:
        desk.objects.delete(f"batch/default/files/{end.error_file_id}")
    remove(desk.settings, "m")
    requeue(desk, batch)
    again = records(desk, batch)
    if lost:
        answer(desk, batch, 3, status=500)
    finish(desk, batch)

    assert again == (["r3"] if lost else [])
    assert b"".join(desk.results(batch)).splitlines() == [*good, bad]


def test_results_of_a_finisher_that_died(desk: BatchDesk) -> None:
    """The file that it kept is the batch's, though it did not say so, and whatever its bytes are."""
    batch = waiting(desk)
    for number in range(1, 5):
        answer(desk, batch, number)
    desk.objects.create(f"batch/default/files/file-{batch.batch_id.removeprefix('batch_')}-output", b"the first one's\n")
    finish(desk, batch)

    assert b"".join(desk.results(batch)) == b"the first one's\n"


def test_two_append_anew(desk: BatchDesk) -> None:
    """Of two that begin at once, each with its own copy of the facts, one appends."""
    both = Barrier(2)

    def begin(each: BatchDesk, batch: Batch) -> None:
        both.wait(30)
        requeue(each, batch)

    found = []
    with desk_at(desk.settings) as other, ThreadPoolExecutor(2) as pool:
        for _ in range(8):
            batch = waiting(desk)
            remove(desk.settings, "m")
            until(partial(other.facts.find, batch.batch_id))
            list(pool.map(begin, (desk, other), (batch, batch)))
            found.append(records(desk, batch))
    left = [desk.facts.latest(kind) for kind in (CLAIM, SUBMITTER)]

    assert found == [["r1", "r2", "r3", "r4"]] * 8
    assert left == [{}, {}]


def test_claims(desk: BatchDesk) -> None:
    """The first claim in the log counts, as long as its process lives, or what it renews."""
    batch, lived = waiting(desk), workers.Worker().document()
    remove(desk.settings, "m")
    claim = {**lived, "worker": "w-first", "until": time.time() + 60}
    desk.facts.write(CLAIM, f"{batch.batch_id}/w-first", claim)
    sweep = partial(end_abandoned, desk.facts, lambda: pytest.fail("nothing was abandoned"), desk.settings)
    sweep()
    requeue(desk, batch)
    held = records(desk, batch), list(desk.facts.latest(CLAIM))
    desk.facts.write(CLAIM, f"{batch.batch_id}/w-first", {**claim, "until": 0})
    desk.facts.write(SUBMITTER, batch.batch_id, claim)
    sweep()
    renewed = list(desk.facts.latest(CLAIM))
    desk.facts.write(SUBMITTER, batch.batch_id, None)
    sweep()
    lapsed = list(desk.facts.latest(CLAIM))
    requeue(desk, batch)

    assert held == ([], [f"{batch.batch_id}/w-first"])
    assert (renewed, lapsed) == ([f"{batch.batch_id}/w-first"], [])
    assert records(desk, batch) == ["r1", "r2", "r3", "r4"]


def test_a_lease_that_another_one_took(desk: BatchDesk) -> None:
    """Who was taken for dead and goes on appends nothing, and says so."""
    batch = waiting(desk)
    remove(desk.settings, "m")
    later = Submission(desk.facts, batch.batch_id, desk.settings)
    fetch = desk.fetch_input

    def slow(*arguments: Any) -> None:
        fetch(*arguments)
        later.renew()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk, "fetch_input", slow)
        with pytest.raises(ConflictError, match=f"another process appends {batch.batch_id}"):
            requeue(desk, batch)
    left = records(desk, batch)
    requeue(desk, batch)  # the later one lives
    held = records(desk, batch)
    later.close()
    requeue(desk, batch)

    assert (left, held) == ([], [])
    assert records(desk, batch) == ["r1", "r2", "r3", "r4"]


@pytest.mark.parametrize("what", ["log.sqlite", "log.sqlite is gone", "a record"])
def test_damaged_log(what: str, tmp_path: Path, small_upstream: Upstream, forks: Forks) -> None:
    """A damaged log is set aside, and its batch comes to its end; after `batch.keep_days` nothing is left of the log."""
    settings = Settings(data=tmp_path / "data")
    small_upstream.asked.clear()
    with desk_at(settings) as desk:
        batch = submit_at(desk, written(settings, *(request(f"r{i}", f"damaged {i}") for i in range(8))))
    path = settings.data / "work" / "m" / "log" / "log.sqlite"
    if what == "a record":
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("UPDATE batch SET data = zeroblob(length(data))")
    elif what == "log.sqlite":
        path.write_bytes(b"no database" * 1000)
    else:
        path.unlink()
    with desk_at(settings) as desk, forks.worker(settings, small_upstream.url):
        until(lambda: desk.facts.ended(batch.batch_id))
        texts = texts_of(results_at(desk, batch))
        aside = [folder.name for folder in (settings.data / "work" / ".damaged").iterdir()]
        desk.works.forget(time.time() + 60)

    assert texts == {f"r{i}": f"you said damaged {i}" for i in range(8)}
    assert len(aside) == 1
    assert aside[0].startswith("m-")
    assert list((settings.data / "work" / ".damaged").iterdir()) == []
