"""Stopped requests and workers: several of them, one that ends, one that is killed, a control log that goes away, a long day."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ingest.debug import commands, workers
from ingest.debug.desk import Desk
from ingest.gateway import stops
from ingest.gateway.orphans import CLAIM, Orphans
from ingest.recorder import Recorder
from schemas.codec import decode
from schemas.errors import ConflictError, LogUnavailable, Unavailable
from schemas.events import BreakpointHit, BreakpointReleased, Event, GenerationFailed
from schemas.registry import SchemaRegistry
from schemas.settings import DebugSettings, GatewaySettings, Settings
from store.control import ControlView, open_control
from store.log import open_log
from tests.debug_rig import Debugged, debugging, echo, folded, payloads, wait_known
from tests.gateway_rig import DEADLINE_S, HELLO, BrokenUpstream, Rig, broken
from tests.program import until


def events_of(settings: Settings) -> list[Event]:
    """All events of a log but heartbeats."""
    registry, log = SchemaRegistry(), open_log(settings.log, settings.data)
    with contextlib.closing(log):
        values = [value for p in range(log.partitions) if log.bounds(p)[1] for value in log.read(p, 0, limit=100_000).values]
    return [event for event in (decode(value, registry) for value in values) if event.kind != "producer_heartbeat"]


@pytest.fixture
def upstream() -> Iterator[BrokenUpstream]:
    """An upstream that repeats what it is told."""
    with broken(echo) as made:
        yield made


@pytest.fixture(autouse=True)
def busy_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that look around more often, so that nobody waits for them."""
    monkeypatch.setattr(workers, "HEARTBEAT_S", 0.2)


class TestWorkers:
    def test_any_worker_and_any_desk_decides(self, deployment: Settings, upstream: BrokenUpstream) -> None:
        """A command given to another worker or to the command line reaches the one that holds the request."""
        gateway = GatewaySettings(port=0, upstream=upstream.url)
        settings = deployment.model_copy(update={"gateway": gateway, "debug": DebugSettings(deadline_s=60)})
        rigs = [Rig(settings) for _ in range(2)]
        control = open_control(settings)
        made = Debugged(rigs[0], control)
        made.desk.add({})
        for rig in rigs:
            wait_known(rig.url, made.desk.breakpoints()[0].breakpoint_id)
        answers = [made.ask(), made.ask()]
        first, second = made.waiting(2)
        patch = [{"op": "replace", "path": "/messages/0/content", "value": "by the other worker"}]
        until(lambda: len(httpx.get(f"{rigs[1].url}/api/v1/stopped").json()["stopped"]) == 2)
        edited = httpx.post(f"{rigs[1].url}/api/v1/stopped/{first}/edits", json={"patch": patch}, timeout=DEADLINE_S)
        released = httpx.post(f"{rigs[1].url}/api/v1/stopped/{first}/release", headers={"x-tokentape-user": "eve"}, timeout=DEADLINE_S)
        refused = httpx.post(f"{rigs[1].url}/api/v1/stopped/{first}/refuse", timeout=DEADLINE_S)
        made.desk.ask(second, "release")
        texts = {answer.result(DEADLINE_S) for answer in answers}
        until(lambda: len(payloads(events_of(settings), BreakpointReleased)) == 2)
        for rig in rigs:
            rig.close()
        made.pool.shutdown()
        control.close()

        assert (edited.status_code, released.status_code, refused.status_code) == (201, 200, 409)
        assert "by api:eve" in refused.json()["detail"]
        assert texts == {"by the other worker", HELLO[0]["content"]}
        assert folded(events_of(settings))

    def test_stopped_with_the_gateway(self, tmp_path: Path) -> None:
        """A gateway that stops ends what is stopped in it at once: told to the client, on the tape, and at no desk any more."""
        with debugging(tmp_path) as made:
            made.stop()
            answers = [made.pool.submit(made.rig.post, {"model": "m", "messages": HELLO, "stream": stream}) for stream in (False, True)]
            made.waiting(2)
            made.rig.stop()
            whole, streamed = (answer.result(DEADLINE_S) for answer in answers)
            events = made.rig.events()
            left = made.desk.stopped()

        assert (whole.status_code, streamed.status_code) == (503, 200)
        assert b"The gateway is stopping" in whole.content
        assert b"The gateway is stopping" in streamed.content
        assert [released.action for released in payloads(events, BreakpointReleased)] == ["lost", "lost"]
        assert [failed.error_type for failed in payloads(events, GenerationFailed)] == ["shutdown", "shutdown"]
        assert left == []
        assert folded(events)

    def test_killed(self, deployment: Settings, upstream: BrokenUpstream) -> None:
        """After `kill -9` the next worker says of each stopped request what became of it, once, whoever looks."""
        settings = deployment.model_copy(update={"debug": DebugSettings(deadline_s=60)})
        control = open_control(settings)
        desk = Desk(control, "user:ann", answer_timeout_s=0.5)
        desk.add({})
        child, url = _child(settings, upstream.url)
        pool = ThreadPoolExecutor(3)
        body = {"model": "m", "messages": HELLO}
        answers = [pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=DEADLINE_S) for _ in range(3)]
        until(lambda: len(desk.stopped()) == len(payloads(events_of(settings), BreakpointHit)) == 3)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert all(isinstance(answer.exception(DEADLINE_S), httpx.HTTPError) for answer in answers)
        assert [row["state"] for row in desk.stopped()] == ["worker gone"] * 3
        with pytest.raises(Unavailable, match="no gateway worker answered"):
            desk.ask(desk.stopped()[0]["generation"], "release")

        successors = [Rig(settings.model_copy(update={"gateway": GatewaySettings(port=0, upstream=upstream.url)})) for _ in range(2)]
        until(lambda: desk.stopped() == [])
        settled = desk.stopped(settled=True)
        until(lambda: control.latest(CLAIM) == {})
        for rig in successors:
            rig.close()
        events = events_of(settings)
        known = control.latest(workers.KIND)
        control.close()
        pool.shutdown()

        assert [row["state"] for row in settled] == ["lost"] * 3
        assert len(payloads(events, BreakpointHit)) == 3
        assert [released.action for released in payloads(events, BreakpointReleased)] == ["lost"] * 3
        assert [failed.error_type for failed in payloads(events, GenerationFailed)] == ["shutdown"] * 3
        assert "ended while the request was stopped" in payloads(events, GenerationFailed)[0].content.message
        assert {generation.status for generation in folded(events)} == {"failed"}
        assert known == {}

    @pytest.mark.parametrize("content", [True, False])
    def test_claims(self, settings_embedded: Settings, content: bool) -> None:
        """Of several workers that find the same orphan only the one whose claim stands first settles it, as its tenant wants."""
        control, log = open_control(settings_embedded), open_log(settings_embedded.log, settings_embedded.data)
        recorder = Recorder(log, settings_embedded.recorder, source="gateway")
        generation = str(uuid.uuid4())
        fact: dict[str, Any] = {
            "worker": "w-dead",
            "session": str(uuid.uuid4()),
            "tenant": "default",
            "retention_class": "standard",
            "actor": "",
        }
        fact["content"] = content
        control.append(commands.STOPPED, generation, {**fact, "breakpoint": "b", "outcome": None})
        view = ControlView(control)
        living = [workers.Worker() for _ in range(4)]
        for worker in living:
            control.append(workers.KIND, worker.worker_id, worker.document())
        until(lambda: len(view.latest(workers.KIND)) == 4)

        async def settle_all() -> None:
            loop = asyncio.get_running_loop()
            seen = [Orphans(worker.worker_id, control, view, recorder) for worker in living]
            await asyncio.gather(*(orphans.settle(lambda *fact: loop.run_in_executor(None, _append, control, *fact)) for orphans in seen))

        asyncio.run(settle_all())
        until(lambda: (view.get(commands.STOPPED, generation) or {}).get("outcome"))
        recorder.close()
        view.close()
        control.close()
        log.close()
        events = events_of(settings_embedded)

        assert [event.kind for event in events] == ["breakpoint_released", "generation_failed"]
        assert [part.content is not None for part in payloads(events, BreakpointReleased)] == [content]
        assert [part.content is not None for part in payloads(events, GenerationFailed)] == [content]

    def test_silence_of_another_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A worker elsewhere counts as dead when nothing new was heard of it for the whole lease, by the observer's clock."""
        clock = iter([0.0, 10.0, 20.0, 20.0 + workers.LEASE_S, 20.1 + workers.LEASE_S])
        monkeypatch.setattr("ingest.debug.workers.time.monotonic", lambda: next(clock))
        seen, fact = workers.Workers(), {"host": "elsewhere", "pid": 1, "started": "1", "at": 5.0}

        assert [seen.dead("w", {"w": fact}) for _ in range(2)] == [False, False]
        assert not seen.dead("w", {"w": {**fact, "at": 6.0}})
        assert [seen.dead("w", {"w": {**fact, "at": 6.0}}) for _ in range(2)] == [False, True]
        assert seen.dead("w", {})

    def test_processes_of_this_machine_are_looked_up(self) -> None:
        """A process that runs lives, one that ended or whose number was given out again does not."""
        mine = workers.Worker().document()
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()

        assert workers.runs_here(mine) is True
        assert workers.runs_here({**mine, "started": "1"}) is False
        assert workers.runs_here({**mine, "pid": child.pid}) is False
        assert workers.runs_here({**mine, "host": "elsewhere"}) is None


def _append(control: Any, kind: str, key: str, value: Any) -> bool:
    control.append(kind, key, value)
    return True


def _child(settings: Settings, upstream: str) -> tuple[subprocess.Popen[bytes], str]:
    """A gateway in a process of its own, and its URL."""
    command = [sys.executable, "-m", "tests.gateway_child", str(settings.data), upstream, settings.log.model_dump_json()]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)
    assert child.stdout is not None
    url = child.stdout.readline().decode().strip()
    child.stdout.close()
    return child, url


class TestControlLogAway:
    def test_requests_stop_and_go_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the control log away a request still stops, the worker's own API still decides, and deadlines hold."""
        monkeypatch.setattr(stops, "WRITE_WAIT_S", 0.2)
        with debugging(tmp_path) as made:
            made.stop(deadline_s=30)

            def away(*_: object, **__: object) -> Any:
                raise LogUnavailable("away", operation="test")

            with monkeypatch.context() as patch:
                patch.setattr("store.control.embedded.EmbeddedControl.append", away)
                patch.setattr("store.control.embedded.EmbeddedControl._after", away)
                answer = made.ask()
                rows = until(lambda: httpx.get(f"{made.rig.url}/api/v1/stopped").json()["stopped"] or None)
                path = f"{made.rig.url}/api/v1/stopped/{rows[0]['generation']}"
                edited = httpx.post(f"{path}/edits", json={"patch": [{"op": "add", "path": "/n", "value": 1}]}, timeout=DEADLINE_S)
                released = httpx.post(f"{path}/release", timeout=DEADLINE_S)
                refused = httpx.post(f"{made.rig.url}/api/v1/breakpoints", json={}, timeout=DEADLINE_S)

                assert answer.result(DEADLINE_S) == HELLO[0]["content"]
            events = made.rig.wait_for("generation_finished")

        assert (edited.status_code, released.status_code, refused.status_code) == (201, 200, 503)
        assert refused.headers["content-type"] == "application/problem+json"
        assert [released.action for released in payloads(events, BreakpointReleased)] == ["edited"]
        assert folded(events)


class TestLongDay:
    def test_a_hundred_stopped_requests_for_a_day(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """24 hours by the stops' own clock: each of 100 requests is answered by somebody or expires by its rule, exactly once."""
        clock = _Clock()
        monkeypatch.setattr(stops, "now", clock)
        chance = random.Random(11)
        hours = (1, 5, 12, 23)
        with debugging(tmp_path, debug={"keepalive_s": 3600.0}) as made, ThreadPoolExecutor(100) as clients:
            for hour in hours:
                for action in ("release", "refuse"):
                    made.stop(breakpoint_id=f"{action}-{hour}", tag=f"{action}-{hour}", deadline_s=hour * 3600.0, default_action=action)
            names = [f"{chance.choice(['release', 'refuse'])}-{chance.choice(hours)}" for _ in range(100)]
            answers = [clients.submit(_ask, made.rig.url, name, stream=number % 2 == 0) for number, name in enumerate(names)]
            ids = made.waiting(100)
            decided = {generation: chance.choice(["release", "refuse"]) for generation in chance.sample(ids, 30)}
            for minute in range(0, 24 * 60 + 1, 30):
                clock.minutes = minute
                for generation in [generation for generation in decided if chance.random() < 0.1]:
                    _try(made.desk, generation, decided.pop(generation))
                time.sleep(0)
            texts = [answer.result(DEADLINE_S) for answer in answers]
            events = until(lambda: found if len(payloads(found := made.rig.events(), BreakpointReleased)) == 100 else None)
            left = until(lambda: made.desk.stopped() == [] or None)

        statuses = Counter(generation.status for generation in folded(events))
        actions = Counter(released.action for released in payloads(events, BreakpointReleased))

        assert left
        assert len(payloads(events, BreakpointHit)) == 100
        assert actions.keys() == {"as_is", "refused", "expired"}
        assert Counter(texts) == {"answered": statuses["finished"], "refused": statuses["failed"]}
        assert statuses.total() == 100


class _Clock:
    """Time as the test says."""

    minutes = 0

    def __call__(self) -> float:
        return 60.0 * self.minutes


def _ask(url: str, tag: str, *, stream: bool) -> str:
    body = {"model": "m", "messages": HELLO, "stream": stream}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-tokentape-tags": tag}, timeout=120)
    return "refused" if b"refused at a breakpoint" in answer.content else "answered" if b"sea" in answer.content else answer.text


def _try(desk: Desk, generation: str, verb: str) -> None:
    with contextlib.suppress(ConflictError):  # it had expired by then
        desk.ask(generation, verb)
