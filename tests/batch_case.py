"""Batch work, whatever carries it: the contract that both deployments keep, seen by the official SDK."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from ingest.gateway.batch.desk import BatchDesk, object_of
from ingest.gateway.batch.facts import SUBMITTER, Facts
from ingest.gateway.batch.finish import results_of
from schemas.batches import Batch, Owner
from schemas.errors import LogChanged
from schemas.events import AccessLogged, RequestSubmitted, SessionOpened
from schemas.settings import BatchSettings, GatewaySettings, RecorderSettings, Settings
from store.control import ControlLog, ControlView, open_control
from store.crashpoints import VARIABLE
from store.log.admin import remove_topics
from store.work import WorkLogs, work_name
from tests.gateway_rig import HELLO, BrokenUpstream, Peer, Rig, broken
from tests.program import until
from tests.test_gateway import payloads

CHAT = "/v1/chat/completions"
MODELS = ("m", "other/model 2")
AT_WORK = 3
"""Requests at the upstream at once: of the five that a worker has begun two wait for their turn."""
WAITING = 2
BATCH: dict[str, Any] = {"concurrency": AT_WORK + WAITING, "backoff_s": 0.05, "attempts_max": 3}


class Upstream:
    """An upstream that answers with what was asked; a request may tell it to fail, and all wait while it is shut."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.order: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.passes = 0
        self.server: BrokenUpstream | None = None

    @property
    def url(self) -> str:
        """Its address."""
        assert self.server is not None
        return self.server.url

    def _may_pass(self) -> bool:
        """While it is shut the test lets requests out one by one."""
        if self.passes:
            self.passes -= 1
            return True
        return self.open.is_set()

    async def act(self, peer: Peer) -> None:
        """Answer one request."""
        text = orjson.loads(peer.body)["messages"][-1]["content"]
        self.asked[text] += 1
        self.order.append(text)
        while not text.startswith("deadly") and not self._may_pass():  # noqa: ASYNC110  the test sets it, in no loop
            await asyncio.sleep(0.005)
        if text.startswith("deadly"):
            return await peer.gone()
        if text.startswith("broken"):
            return await peer.whole(b"500 Internal Server Error", b"application/json", b'{"error": {"message": "it broke"}}')
        if text.startswith("busy") and self.asked[text] <= 5:
            return await peer.whole(b"503 Service Unavailable", b"application/json", b'{"error": {"message": "loading"}}')
        message = {"role": "assistant", "content": f"you said {text}"}
        usage = {"prompt_tokens": 3, "completion_tokens": 1}
        body = {"id": "x", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
        return await peer.whole(b"200 OK", b"application/json", orjson.dumps(body))


def request(custom_id: str, text: str, model: str = "m", **changes: Any) -> dict[str, Any]:
    """A line of a batch file."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], **changes.pop("more", {})}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **changes}


def jsonl(*requests: Any) -> bytes:
    """A batch file."""
    return b"".join((line if isinstance(line, bytes) else orjson.dumps(line)) + b"\n" for line in requests)


def submit(client: Any, data: bytes, **options: Any) -> Any:
    """Upload a file and submit it."""
    file = client.files.create(file=("requests.jsonl", io.BytesIO(data)), purpose="batch")
    return client.batches.create(**{"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **options})


def ended(client: Any, batch_id: str, status: str = "completed", seconds: float = 60.0) -> Any:
    """A batch once it has ended."""
    final = ("completed", "failed", "expired", "cancelled")
    found = until(lambda: batch if (batch := client.batches.retrieve(batch_id)).status in final else None, seconds)
    assert found.status == status
    return found


def lines_of(client: Any, file_id: str | None) -> list[dict[str, Any]]:
    """What stands in a file of results."""
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()] if file_id else []


def texts_of(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The answers by custom id."""
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in lines}


class BatchCase:
    """Inherited by each deployment, which gives the settings. One gateway without a worker takes submissions; workers come and go."""

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls) -> Settings:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def upstream(cls) -> Iterator[Upstream]:
        upstream = Upstream()
        with broken(upstream.act, models=MODELS) as server:
            upstream.server = server
            yield upstream

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, settings: Settings, upstream: Upstream) -> Iterator[Rig]:
        """A gateway that works on batches itself."""
        rig = Rig(configured(settings, upstream.url))
        try:
            assert rig.error is None
            yield rig
        finally:
            upstream.open.set()
            rig.close()

    @pytest.fixture(autouse=True)
    def calm(self, upstream: Upstream) -> Iterator[None]:
        """Each test begins with an upstream that answers."""
        upstream.open.set()
        upstream.asked.clear()
        upstream.order.clear()
        upstream.passes = 0
        yield
        upstream.open.set()

    def test_all_of_it(self, rig: Rig) -> None:
        """Answers are matched by custom id, in the order of the file, over models whose names no topic may have; sessions have the tag."""
        client = rig.client()
        wanted = {f"r{i}": f"text {i}" for i in range(12)}
        made = submit(client, jsonl(*(request(name, text, MODELS[i % 2]) for i, (name, text) in enumerate(wanted.items()))))
        batch = ended(client, made.id)
        lines = lines_of(client, batch.output_file_id)
        events = rig.events()
        opened = [event for event in payloads(events, SessionOpened) if made.id in event.tags]
        listed = [found.id for found in client.batches.list(limit=1)]

        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (12, 12, 0)
        assert list(texts_of(lines)) == list(wanted)
        assert texts_of(lines) == {name: f"you said {text}" for name, text in wanted.items()}
        assert batch.error_file_id is None
        assert len(opened) == 12
        assert made.id in listed
        asked = {event.client_request_id for event in payloads(events, RequestSubmitted)}
        assert asked >= wanted.keys()
        assert {"batch submit", "batch content"} <= {event.operation for event in payloads(events, AccessLogged)}

    def test_records_go_away(self, rig: Rig, settings: Settings) -> None:
        """What is worked off is deleted from the log of its model, and the results of single requests from the store."""
        client = rig.client()
        ended(client, submit(client, jsonl(*(request(f"r{i}", f"gone {i}") for i in range(4)))).id)
        works = WorkLogs(settings)
        work = works.of("m")
        until(lambda: all(first == end for first, end in map(work.bounds, range(work.partitions))))
        works.close()

    def test_errors_are_results(self, rig: Rig, upstream: Upstream) -> None:
        """A request that fails always ends after so many attempts; one that the upstream cannot take now waits for longer."""
        client = rig.client()
        unreadable = request("bad", "n", more={"n": "x"})
        lines = jsonl(request("good", "fine"), request("poison", "broken for ever"), request("late", "busy now"), unreadable)
        batch = ended(client, submit(client, lines).id)
        failed = {line["custom_id"]: line["response"]["status_code"] for line in lines_of(client, batch.error_file_id)}

        assert texts_of(lines_of(client, batch.output_file_id)).keys() >= {"good", "late"}
        assert failed["poison"] == 500
        assert (upstream.asked["broken for ever"], upstream.asked["busy now"]) == (BATCH["attempts_max"], 6)
        assert batch.request_counts.completed + batch.request_counts.failed == 4

    def test_cancel(self, rig: Rig, upstream: Upstream) -> None:
        """What is under way ends and counts, the rest is never asked, and each of its lines says so."""
        client = rig.client()
        upstream.open.clear()
        made = submit(client, jsonl(*(request(f"r{i}", f"cancel {i}") for i in range(40))))
        until(lambda: len(upstream.order) == AT_WORK)
        until(lambda: _queued(rig.url) == WAITING)
        status = client.batches.cancel(made.id).status
        with pytest.raises(openai.ConflictError, match="cancelling already"):
            client.batches.cancel(made.id)
        upstream.open.set()
        batch = ended(client, made.id, "cancelled")
        good, bad = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)

        assert status == "cancelling"
        assert len(good) == len(upstream.order) == BATCH["concurrency"]
        assert {line["error"]["code"] for line in bad} == {"batch_cancelled"}
        assert len({line["custom_id"] for line in good + bad}) == len(good) + len(bad) == 40

    def test_interactive_first(self, rig: Rig, upstream: Upstream) -> None:
        """While a batch fills the upstream a person's request goes before what the batch has waiting, and the batch ends all the same.

        One turn of eight goes by age, and which one is not known here: of the next two turns one at least is by priority.
        """
        client = rig.client()
        upstream.open.clear()
        made = submit(client, jsonl(*(request(f"r{i}", f"flood {i}") for i in range(10))))
        until(lambda: len(upstream.order) == AT_WORK)
        until(lambda: _queued(rig.url) == WAITING)
        waiting: list[Any] = []
        asking = threading.Thread(target=lambda: waiting.append(client.chat.completions.create(model="m", messages=HELLO)))
        asking.start()
        until(lambda: _queued(rig.url) == WAITING + 1)
        for turns in (1, 2):
            upstream.passes = 1
            until(partial(_asked, upstream, AT_WORK + turns))
        upstream.open.set()
        asking.join(30)
        ended(client, made.id)

        assert waiting[0].choices[0].message.content == f"you said {HELLO[0]['content']}"
        assert HELLO[0]["content"] in upstream.order[AT_WORK : AT_WORK + 2]

    def test_two_workers(self, rig: Rig, settings: Settings, upstream: Upstream, forks: Forks) -> None:
        """Two workers share a model, and nothing is asked twice; when one is killed in the middle, the other asks again what it held.

        Each request has one result either way.
        """
        client = rig.client()
        ended(client, submit(client, jsonl(request("first", "makes the log"))).id)
        with forks.worker(settings, upstream.url) as pid:
            shared_with(settings, pid)
            shared, once = self._shared_batch(client, upstream, lambda: None)
            killed, again = self._shared_batch(client, upstream, lambda: kill(pid))

        assert shared == killed == {f"r{i}": 1 for i in range(24)}
        assert once == 24
        assert again > 24  # what was under way in the dead worker

    def _shared_batch(self, client: Any, upstream: Upstream, interrupt: Callable[[], None]) -> tuple[Counter[str], int]:
        """A batch that is interrupted while both workers are busy with it: its results by custom id, and how often was asked."""
        upstream.asked.clear()
        upstream.order.clear()
        upstream.open.clear()
        made = submit(client, jsonl(*(request(f"r{i}", f"share {i}") for i in range(24))))
        until(lambda: len(upstream.order) == 2 * AT_WORK)
        interrupt()
        upstream.open.set()
        batch = ended(client, made.id)
        assert batch.request_counts.completed == 24
        return Counter(line["custom_id"] for line in lines_of(client, batch.output_file_id)), sum(upstream.asked.values())

    def test_dying_workers(self, settings: Settings, upstream: Upstream, forks: Forks) -> None:
        """With every worker killed the work waits in the log, and a later one ends it.

        A request over which workers die ends as an error after so many attempts; those that were under way beside it do not.
        """
        own = apart(settings, "alone")
        with desk_at(own) as desk:
            upstream.open.clear()
            with forks.worker(own, upstream.url, attempts_max=2) as pid:
                first = submit_at(desk, written(settings, request("d", "deadly"), request("a", "alone a"), request("b", "alone b")))
                until(lambda: len(upstream.order) == AT_WORK)
                second = submit_at(desk, written(settings, *(request(f"r{i}", f"alone {i}") for i in range(12))))
                kill(pid)
            upstream.open.set()
            still = [desk.facts.status(batch) for batch in (first, second)]
            with forks.worker(own, upstream.url, attempts_max=2) as pid:
                until(lambda: upstream.asked["deadly"] == 2)
                kill(pid)
            with forks.worker(own, upstream.url, attempts_max=2):
                until(lambda: desk.facts.ended(first.batch_id) and desk.facts.ended(second.batch_id))
            one, two = (results_at(desk, batch) for batch in (first, second))

        assert still == ["in_progress", "in_progress"]
        assert upstream.asked["deadly"] == 2
        assert {line["custom_id"]: line["response"]["status_code"] for line in one} == {"a": 200, "b": 200, "d": 500}
        assert one[-1]["response"]["body"]["error"]["code"] == "attempts_exhausted"
        assert [line["custom_id"] for line in two] == [f"r{i}" for i in range(12)]
        assert all(line["response"]["status_code"] == 200 for line in two)

    def test_killed_submitter(self, rig: Rig, settings: Settings, upstream: Upstream, forks: Forks) -> None:
        """A submitter killed while it appends fails its batch at once: nothing of it is asked, the tape says so, others go on."""
        client = rig.client()
        before = {found.id for found in client.batches.list(limit=100)}
        path = written(settings, *(request(f"r{i}", "never") for i in range(20_000)))
        pid = forks.begin(settings, path)
        with desk_at(settings) as desk:
            killed = until(lambda: next((found for found in desk.facts.batches() if found.batch_id not in before), None), 60.0)
            kill(pid)
            status = desk.facts.status(killed)
        failed = ended(client, killed.batch_id, "failed")
        after = ended(client, submit(client, jsonl(request("a", "after"))).id)
        access = [event for event in payloads(rig.events(), AccessLogged) if event.outcome == "abandoned"]

        assert killed.ends is None
        assert status in ("validating", "failed")
        assert "stopped before every request was durable" in failed.errors.data[0].message
        assert texts_of(lines_of(client, after.output_file_id)) == {"a": "you said after"}
        assert not upstream.asked["never"]
        assert [event.content.statement for event in access if event.content] == [killed.batch_id]

    def test_lost_log(self, settings: Settings, upstream: Upstream, forks: Forks) -> None:
        """The log of a model is removed while nobody works: what has no result is appended anew, by one of two workers.

        What has its result is not asked again, nor is what waits in the log of another model appended twice.
        """
        own = apart(settings, "lost")
        with desk_at(own) as desk:
            names = [f"r{i}" for i in range(24)]
            batch = submit_at(desk, written(own, *(request(name, name, MODELS[i % 2]) for i, name in enumerate(names))))
            done = self._begun(desk, batch, own, upstream, forks)
            remove(own, "m")
            upstream.asked.clear()
            with forks.worker(own, upstream.url), forks.worker(own, upstream.url):
                until(lambda: desk.facts.ended(batch.batch_id), 60.0)
            moved = desk.facts.batch(batch.batch_id, None)
            lines = results_at(desk, batch)

        assert list(texts_of(lines)) == names
        assert upstream.asked.keys() == set(names) - done
        assert moved.logs["other/model 2"] == batch.logs["other/model 2"]
        assert moved.logs["m"] not in ("", batch.logs["m"])
        assert moved.ends is not None
        assert batch.ends is not None
        assert moved.ends["other/model 2"] == batch.ends["other/model 2"]
        assert sum(moved.ends["m"]) == sum(1 for name in names[::2] if name not in done)

    def _begun(self, desk: BatchDesk, batch: Batch, settings: Settings, upstream: Upstream, forks: Forks) -> set[str]:
        """Work on a batch until six of its requests have results, then kill the worker; what these asked."""
        upstream.open.clear()
        upstream.passes = 6
        with forks.worker(settings, upstream.url) as pid:
            until(lambda: len(list(results_of(desk, batch))) == 6)
            kill(pid)
        upstream.open.set()
        return {f"r{number - 1}" for number in results_of(desk, batch)}

    def test_a_log_that_another_thread_replaces(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who holds it, or asks for it just then, hears that it was replaced, which is no outage, and has the one of now."""
        own = apart(settings, "replaced")
        works = WorkLogs(own)
        with contextlib.closing(works):
            held = works.of("m")
            remove(own, "m")
            now = works.standing("m")
            with pytest.raises(LogChanged, match="replaced meanwhile"):
                held.bounds(0)
            given = iter([held])
            monkeypatch.setattr(works, "of", lambda model: next(given, None) or WorkLogs.of(works, model))

            assert works.standing("m") is now
            assert held.log_id != now.log_id

    def test_killed_while_appending_anew(self, settings: Settings, upstream: Upstream, forks: Forks) -> None:
        """A worker dies when it has appended and not said so: the next one takes over, and each request has one result."""
        own = apart(settings, "killed")
        with desk_at(own) as desk:
            batch = submit_at(desk, written(own, *(request(f"r{i}", f"r{i}") for i in range(12))))
            remove(own, "m")
            upstream.open.clear()
            dying = Forks(**{VARIABLE: "batch.appended"})
            pid = dying.begin(configured(own, upstream.url))
            until(lambda: not Path(f"/proc/{pid}").exists())
            dying.close()
            held, still = desk.facts.get(SUBMITTER, batch.batch_id), desk.facts.batch(batch.batch_id, None)
            upstream.open.set()
            with forks.worker(own, upstream.url):
                until(lambda: desk.facts.ended(batch.batch_id), 60.0)
            lines = results_at(desk, batch)

        assert held
        assert held["pid"] == pid
        assert still == batch
        assert list(texts_of(lines)) == [f"r{i}" for i in range(12)]

    def test_lost_input(self, settings: Settings, upstream: Upstream, forks: Forks) -> None:
        """Log and input file are gone: the batch ends as failed with one line that says why, and keeps the results that it has."""
        own = apart(settings, "input")
        with desk_at(own) as desk:
            batch = submit_at(desk, written(own, *(request(f"r{i}", f"r{i}") for i in range(12))))
            done = self._begun(desk, batch, own, upstream, forks)
            remove(own, "m")
            desk.objects.delete(object_of(desk.facts.file(batch.input_file_id, None)))
            with forks.worker(own, upstream.url):
                end = until(lambda: desk.facts.ended(batch.batch_id), 60.0)
            lines = results_at(desk, batch)

        assert (end.status, end.counts.completed) == ("failed", 6)
        assert end.error == (
            f"the input file {batch.input_file_id} is gone: its requests without a result cannot be asked any more; submit them again"
        )
        assert texts_of(lines).keys() == done

    def test_input_that_is_no_request_any_more(self, settings: Settings, upstream: Upstream, forks: Forks) -> None:
        """A log is lost, and a limit was lowered under the input file's lines: the batch ends as failed and names line and limit."""
        own = apart(settings, "limit")
        with desk_at(own) as desk:
            batch = submit_at(desk, written(own, *(request(f"r{i}", f"r{i}", more={"user": "u" * 1024}) for i in range(12))))
            done = self._begun(desk, batch, own, upstream, forks)
            remove(own, "m")
            later = configured(own, upstream.url)
            pid = forks.begin(later.model_copy(update={"gateway": later.gateway.model_copy(update={"body_bytes_max": 1024})}))
            end = until(lambda: desk.facts.ended(batch.batch_id), 60.0)
            kill(pid)
            lines = results_at(desk, batch)

        assert (end.status, end.counts.completed) == ("failed", 6)
        assert str(end.error).startswith("line 1 of the input file is no request by the settings of now: over 1024 bytes")
        assert texts_of(lines).keys() == done

    def test_log_lost_under_a_gateway(self, rig: Rig, settings: Settings, upstream: Upstream) -> None:
        """The log is removed while a gateway works on it: the batch comes to its end, and so does what is submitted afterwards."""
        client = rig.client()
        ended(client, submit(client, jsonl(request("first", "makes the log"))).id)
        upstream.open.clear()
        made = submit(client, jsonl(*(request(f"r{i}", f"under {i}") for i in range(12))))
        until(lambda: len(upstream.order) == 1 + AT_WORK)
        remove(settings, "m")
        after = submit(client, jsonl(*(request(f"r{i}", f"after {i}") for i in range(3))))
        upstream.open.set()
        lost, next_one = (lines_of(client, ended(client, batch.id).output_file_id) for batch in (made, after))

        assert texts_of(lost) == {f"r{i}": f"you said under {i}" for i in range(12)}
        assert len(lost) == 12
        assert texts_of(next_one) == {f"r{i}": f"you said after {i}" for i in range(3)}

    def test_backlog(self, rig: Rig, upstream: Upstream) -> None:
        """Backlog and the age of the oldest request are in the metrics while work waits."""
        client = rig.client()
        upstream.open.clear()
        made = submit(client, jsonl(*(request(f"r{i}", f"wait {i}") for i in range(12))))
        wanted = 'tokentape_batch_backlog{model="m"} 12.0'
        text = until(lambda: found if wanted in (found := httpx.get(f"{rig.url}/metrics").text) else None)
        upstream.open.set()
        ended(client, made.id)

        age = next(line for line in text.splitlines() if line.startswith('tokentape_batch_oldest_seconds{model="m"}'))
        assert float(age.split()[1]) > 0

    def test_faulty_file(self, rig: Rig, upstream: Upstream) -> None:
        """Each faulty line is named with what is wrong; nothing of the file is accepted."""
        client = rig.client()
        faulty = jsonl(
            request("a", "good"),
            b"{not json",
            request("a", "again"),
            request("c", "m", method="GET"),
            request("d", "m", url="/v1/nothing"),
            request("e", "m", more={"stream": True}),
            {"custom_id": "f", "method": "POST", "url": CHAT, "body": {"messages": []}},
            request("", "m"),
            request("g", "m", extra=1),
            b"[]",
        )
        before = len(list(client.batches.list(limit=100)))
        with pytest.raises(openai.BadRequestError) as raised:
            submit(client, faulty)

        message = raised.value.message
        for part in ("line 2: not valid JSON", "line 3: custom_id 'a' stands on an earlier line", "line 4: method must be 'POST'"):
            assert part in message
        for part in ("line 5: url '/v1/nothing'", f"valid: {CHAT}", "line 6: body.stream", "line 7: body.model", "line 8: custom_id"):
            assert part in message
        for part in ("line 9: unknown field 'extra'", "line 10: not a JSON object"):
            assert part in message
        assert len(list(client.batches.list(limit=100))) == before
        assert not upstream.asked

    def test_unknown_model(self, rig: Rig) -> None:
        """A model that nobody serves is named with its line and the valid ones, before anything is accepted."""
        with pytest.raises(openai.BadRequestError, match=r"line 2: no upstream serves the model 'nobody'; valid: m, other/model 2"):
            submit(rig.client(), jsonl(request("a", "x"), request("b", "x", "nobody")))


def desk_of(settings: Settings, control: ControlLog, view: ControlView, works: WorkLogs) -> BatchDesk:
    """A desk over what is open."""
    return BatchDesk(settings, Facts(control, view), works, [CHAT])


@contextlib.contextmanager
def desk_at(settings: Settings) -> Iterator[BatchDesk]:
    """A desk without a gateway."""
    control = open_control(settings)
    view, works = ControlView(control), WorkLogs(settings)
    try:
        yield desk_of(settings, control, view, works)
    finally:
        works.close()
        view.close()
        control.close()


def written(settings: Settings, *requests: Any) -> Path:
    """A file of requests."""
    settings.data.mkdir(parents=True, exist_ok=True)
    path = settings.data / "requests.jsonl"
    path.write_bytes(jsonl(*requests))
    return path


def submit_at(desk: BatchDesk, path: Path) -> Batch:
    """Submit a local file, whoever serves its models."""
    owner = Owner(tenant="default", name="user:test")
    return desk.submit(desk.add_file(path, "requests.jsonl", owner), owner, lambda _: None)


def results_at(desk: BatchDesk, batch: Batch) -> list[dict[str, Any]]:
    """What stands in the files of results of a batch that has ended."""
    return [json.loads(line) for line in b"".join(desk.results(batch)).splitlines()]


def apart(settings: Settings, name: str) -> Settings:
    """Settings with logs and a data directory of their own."""
    log = settings.log.model_copy(update={"topic": f"{settings.log.topic}.{name}"})
    return settings.model_copy(update={"log": log, "data": settings.data / name})


def remove(settings: Settings, model: str) -> None:
    """Remove the log of a model."""
    if settings.log.kind == "embedded":
        shutil.rmtree(settings.data / "work" / work_name(model))
    else:
        remove_topics(settings.log, [f"{settings.log.topic}.work.{work_name(model)}"])


def configured(settings: Settings, url: str, **batch: Any) -> Settings:
    """The settings of a gateway or worker before an upstream."""
    gateway = GatewaySettings(port=0, upstream=url, upstream_kind="openai", concurrency_max=AT_WORK)
    recorder = RecorderSettings(coalesce_ms=5.0)
    return settings.model_copy(update={"gateway": gateway, "recorder": recorder, "batch": BatchSettings(**{**BATCH, **batch})})


class Forks:
    """Processes forked from one that has imported everything."""

    def __init__(self, **environment: str) -> None:
        command, environment = [sys.executable, "-m", "tests.batch_child"], {**os.environ, **environment}
        self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self._read()

    def _read(self) -> tuple[int, str]:
        assert self._parent.stdout is not None
        pid, _, said = self._parent.stdout.readline().strip().partition(" ")
        return int(pid), said

    def begin(self, settings: Settings, path: Path | None = None) -> int:
        """Begin a worker, or the submitter of a file; its process id."""
        given = settings.model_dump(mode="json")
        given["cold"]["secret_key"] = settings.cold.secret_key.get_secret_value()
        for upstream in (given["gateway"], given["debug"]):
            upstream.pop("upstream_key", None)
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps({"settings": given, "path": str(path) if path else None}) + "\n")
        self._parent.stdin.flush()
        pid, said = self._read()
        if said != "begun":  # the child was quicker
            assert (self._read(), said) == ((pid, "begun"), "ready")
        elif path is None:
            assert self._read() == (pid, "ready")
        return pid

    @contextlib.contextmanager
    def worker(self, settings: Settings, url: str, **batch: Any) -> Iterator[int]:
        """A worker until the end of the block, if it is not killed before."""
        pid = self.begin(configured(settings, url, **batch))
        try:
            yield pid
        finally:
            kill(pid)

    def close(self) -> None:
        """End the parent; those who began children have ended them."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait()
        self._parent.stdout.close()


def kill(pid: int) -> None:
    """Kill a process, where it still runs; returns when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists())


def shared_with(settings: Settings, pid: int) -> None:
    """Return when a worker has taken its half of the partitions of model m."""
    control = open_control(settings)

    def half() -> bool:
        own = {name for name, fact in control.latest("batch.worker").items() if fact["pid"] == pid}
        held = [key for key, fact in control.latest("batch.lease").items() if key.endswith("/m") and fact["worker"] in own]
        return len(held) == settings.log.partitions // 2

    until(half, 60.0)
    control.close()


def _asked(upstream: Upstream, count: int) -> bool:
    return len(upstream.order) == count


def _queued(url: str) -> int:
    return int(httpx.get(f"{url}/health").json()["upstreams"][0]["queued"])
