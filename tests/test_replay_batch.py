"""Many sessions replayed: each once, also when the process is killed or engines die, and what the run says at its end."""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from replay.batch import AHEAD, Batch
from replay.engines.base import Forced, Generated, Refused, Request, Scored
from replay.engines.openai import OpenAIEngine
from replay.gathering import Gathered
from replay.words import uuid
from schemas import events as e
from schemas.errors import EngineUnavailable, StoreUnavailable
from schemas.settings import GatewaySettings, Settings
from schemas.sink import SessionContext, new_id
from scripts.native.processes import free_port
from store.log import open_log
from store.rows import StoredEvent
from tests.conftest import VllmService
from tests.flaky_proxy import Proxy
from tests.gateway_rig import Peer, broken
from tests.program import Program, until
from tests.recording import events_of, opened
from tests.tape import Tape, environment, finish
from tests.test_compare import Scorer, Sink, scored, taped

SESSIONS = 210
SILENT_AFTER = 350_000
"""Bytes that an engine sends before it says no more: half of its answers, of which 32 at a time are asked for."""
MESSAGES = [{"role": "user", "content": "What happened at nine?"}]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> tuple[Program, list[str]]:
    """An installation with many sessions of an engine's answer on its tape, one in seven with another token; their ids."""
    return _recorded(tmp_path_factory.mktemp("batch"), vllm, SESSIONS, vllm.model)


def _recorded(folder: Path, vllm: VllmService, count: int, model: str) -> tuple[Program, list[str]]:
    engine = OpenAIEngine(vllm.url)
    environment = engine.fingerprint()
    said = engine.generate(Request(vllm.model, {"messages": MESSAGES, "max_tokens": 16, "temperature": 0}))
    engine.close()
    assert isinstance(said, Generated)
    program = Program(folder, Settings(data=folder / "data", gateway=GatewaySettings(upstream=vllm.url)))
    sessions = []
    with opened(program.settings) as (recorder, _):
        for number in range(count):
            context = SessionContext(new_id(), "default", "gateway")
            sessions.append(uuid(context.session_id))
            for stored in _tape(said, model, environment, altered=number % 7 == 0).events:
                recorder.record(context, stored.event.payload)
    program.run("index")
    return program, sessions


def _tape(said: Generated, model: str, environment: e.EnvironmentCaptured, *, altered: bool) -> Tape:
    tape, spoken = Tape("batch"), said.sequences[0]
    tape.add(environment)
    ids = [3 if altered and i == 5 else token for i, token in enumerate(spoken.token_ids)]
    fields: dict[str, Any] = {"parameters": {"temperature": 0}, "temperature": 0.0, "environment_id": environment.environment_id}
    g = tape.request("g", MESSAGES, 0, model=model, **fields)
    tape.started(g, 1, 1, said.prompt_token_ids)
    tape.tokens(g, 0, [float(i) for i in range(len(ids))], ["x"] * len(ids), ids=ids, logprobs=spoken.logprobs)
    finish(tape, g, 0, [len(ids)], 100)
    return tape


def _finished(program: Program) -> int:
    log = open_log(program.settings.log, program.settings.data)
    try:
        return sum(event.kind == "replay_finished" for event in events_of(log))
    finally:
        log.close()


def test_a_killed_run_goes_on_and_does_each_session_once(recorded: tuple[Program, list[str]], vllm: VllmService) -> None:
    """Killed after a part, started again with two engines and a dead one: every session has one finished replay, and its right verdict."""
    program, sessions = recorded
    words = ["replay-batch", "--where", "tokens > 0", "--run", "nightly"]
    with Proxy(vllm.url.removeprefix("http://")) as proxy:  # the engine falls silent after a part, however fast it was
        proxy.silent_after = SILENT_AFTER
        command = program.command(*words, "--engine", f"http://{proxy.endpoint}")
        process = subprocess.Popen(command, cwd=program.folder, env=program.environment, stderr=subprocess.DEVNULL)
        until(lambda: (proxy.sent >= SILENT_AFTER and _finished(program) > 0) or None)
        process.kill()
        process.wait()
    before = _finished(program)
    dead = f"http://127.0.0.1:{free_port()}"
    ended = program.run(*words, "--engine", vllm.url, "--engine", dead, "--engine", f"{vllm.url}/v1", "--format", "json").rows[0]

    assert 0 < before < SESSIONS
    assert (before, SESSIONS) == (sum(ended["verdicts_before"].values()), before + sum(ended["verdicts"].values()))
    rows, again = program.ask(
        "SELECT subject_session_id AS session, verdict FROM replays JOIN sessions USING (session_id) "
        "WHERE workflow = 'nightly' AND verdict IS NOT NULL",
        "SELECT count(*) AS sessions FROM sessions WHERE purpose IS DISTINCT FROM 'replay' AND replays > 0",
    )
    assert Counter(sessions) == Counter(row["session"] for row in rows)
    assert {"model_differs": SESSIONS // 7} == Counter(row["verdict"] for row in rows if row["verdict"] == "model_differs")
    assert 0 == again[0]["sessions"]
    assert ended["worst"][0]["drift_max"] > 1
    nothing_left = program.run(*words)
    assert f"{SESSIONS} done before" in nothing_left.stderr
    said = {
        words[1]: int(words[0]) for line in nothing_left.stdout.decode().splitlines()[:3] if (words := line.split(",")[0].split(maxsplit=1))
    }
    honest = said.get("identical", 0) + said.get("numeric drift", 0)  # requests of others are in the server's batches too
    assert (SESSIONS - SESSIONS // 7, SESSIONS // 7) == (honest, said["model differs"])


def test_without_an_engine_a_run_says_how_to_go_on(recorded: tuple[Program, list[str]], vllm: VllmService) -> None:
    """Nothing is lost and nothing is recorded as done; a condition, name or model that is none is one line."""
    program, _ = recorded
    before = _finished(program)
    dead = f"http://127.0.0.1:{free_port()}"
    for words, code, fault in (
        (["--where", "tokens > 0", "--engine", dead, "--run", "other"], 8, f"no engine is left after 0 sessions, {SESSIONS} wait"),
        (["--where", "no_such_column = 1"], 4, "no_such_column"),
        (["--where", "true", "--run", "a b"], 2, "is no name of a run"),
        (["--where", "true", "--engine", "vllm:x", "--engine", dead], 2, "it stands alone"),
        (["--where", "tokens > 0", "--engine", vllm.url, "--model", "other"], 2, "serves no model 'other'"),
    ):
        ran = program.run("replay-batch", *words, code=code)

        assert fault in ran.stderr.splitlines()[-2]  # the last line is the hint; before it stands what was to be done
    assert before == _finished(program)


def test_why_sessions_are_inconclusive_is_said(tmp_path: Path, vllm: VllmService) -> None:
    """A server without the recorded model has one line for all of them, and so has JSON."""
    program, _ = _recorded(tmp_path, vllm, 2, "gone")
    words = ["replay-batch", "--where", "tokens > 0", "--engine", vllm.url]
    said = program.run(*words).stdout.decode()
    told = program.run(*words, "--run", "again", "--format", "json").rows[0]

    assert "inconclusive, 2 sessions: it refused model 'gone' (status 404)" in said
    assert [2] == list(told["inconclusive"].values())


@pytest.mark.parametrize("knows", [True, False])
def test_batch_work_goes_behind_interactive_work(knows: bool) -> None:
    """It names itself to gateways and takes a lower priority where the engine has them; a server that has none is asked without."""

    async def act(peer: Peer) -> None:
        if not knows and b"priority" in peer.body:
            await peer.whole(b"400 Bad Request", b"application/json", b'{"error": {"message": "Unrecognized field: priority"}}')
            return
        scores = {"choices": [{"prompt_logprobs": [None, {"2": {"logprob": -1.0, "rank": 1}}]}]}
        await peer.whole(b"200 OK", b"application/json", json.dumps(scores).encode())

    with broken(act) as upstream:
        engine = OpenAIEngine(upstream.url, background=True)
        answers = [engine.force(Request("m"), (1,), (2,)) for _ in range(2)]
        engine.close()

    assert [Scored((-1.0,), (1,), (-1.0,))] * 2 == answers
    assert ([1, 1] if knows else [1, None, None]) == [body.get("priority") for body in upstream.bodies]
    assert all(b"x-tokentape-priority: batch" in head.lower() for head in upstream.heads)


def test_an_engine_that_dies_gives_its_session_back(tmp_path: Path) -> None:
    """It leaves the replay unfinished; the other engine does the session from its start; without another the run stops."""
    calls: list[str] = []

    def dying(ids: tuple[int, ...]) -> Any:
        calls.append("dying")
        if len(calls) > 1:
            raise EngineUnavailable("gone", operation="ask engine")
        return scored([-1.0] * len(ids))

    events, sink = taped([-1.0] * 20).events, Sink()
    alone = Batch(["a", "b", "c"], lambda names: dict.fromkeys(names, events), sink, run="r")
    with pytest.raises(EngineUnavailable, match="no engine is left after 1 sessions, 2 wait: ask engine: gone"):
        alone.run([Scorer(dying)])

    kinds = Counter(payload.KIND for _, payload in sink.recorded)
    assert (2, 1) == (kinds["replay_started"], kinds["replay_finished"])
    assert "the engine failed" in [payload.reason for _, payload in sink.recorded if isinstance(payload, e.SessionClosed)]
    calls.clear()
    engines = [Scorer(dying), Scorer(lambda ids: scored([-1.0] * len(ids)))]
    summary = Batch(["a", "b", "c"], lambda names: dict.fromkeys(names, events), Sink(), run="r").run(engines)
    assert {"identical": 3} == dict(summary.verdicts)


GOOD, BAD = taped([-1.0] * 20).events, taped([-1.0] * 21).events
"""A session, and one at which a server fails: its sequence has another length than the others'."""
LENGTH_BAD = len(range(5)) + 21


async def _score(peer: Peer) -> None:
    scores = [None, *({str(token): {"logprob": -1.0, "rank": 1}} for token in json.loads(peer.body)["prompt"][1:])]
    await peer.whole(b"200 OK", b"application/json", json.dumps({"choices": [{"prompt_logprobs": scores}]}).encode())


async def _fail(peer: Peer, status: bytes = b"500 Internal Server Error", more: bytes = b"") -> None:
    await peer.whole(status, b"application/json", b'{"error":{"message":"out of memory"}}', more)


def _failing(fails: Callable[[int], bool], status: bytes | None) -> tuple[Callable[[Peer], Awaitable[None]], list[int]]:
    """A server that fails at requests of some numbers, from 1 on, with a status or by hanging up; and the numbers that it was asked."""
    asked: list[int] = []

    async def act(peer: Peer) -> None:
        asked.append(len(asked) + 1)
        if not fails(asked[-1]):
            await _score(peer)
        elif status is not None:
            await _fail(peer, status)

    return act, asked


def _is_bad(peer: Peer) -> bool:
    return len(json.loads(peer.body)["prompt"]) == LENGTH_BAD


@pytest.mark.parametrize("at_once", [1, 32])
@pytest.mark.parametrize("how", ["status", "reset"])
def test_one_request_that_fails_is_one_sessions(at_once: int, how: str) -> None:
    """Only its session is begun again, whatever else was asked with it, and the engine has all its places in the end."""
    act, _ = _failing(lambda number: number == 40, b"503 Service Unavailable" if how == "status" else None)
    sink = Sink()
    batch = Batch([str(number) for number in range(200)], lambda names: dict.fromkeys(names, GOOD), sink, run="r")
    with broken(act) as upstream:
        summary = batch.run([OpenAIEngine(upstream.url)], at_once=at_once)
    kinds = Counter(payload.KIND for _, payload in sink.recorded)

    assert {"identical": 200} == dict(summary.verdicts)
    assert (201, 200) == (kinds["replay_started"], kinds["replay_finished"])
    assert [at_once] == [desk.places for desk in batch._desks]


@pytest.mark.parametrize(
    ("sessions", "bad", "engines", "at_once"),
    [(300, {5}, 1, 32), (300, {5}, 4, 32), (40, {5}, 1, 1), (60, {57, 58, 59}, 1, 8), (1, {0}, 1, 32), (3, {0, 1, 2}, 1, 32)],
    ids=["one engine", "four", "one at once", "the last ones", "alone", "nothing else"],
)
def test_a_session_at_which_engines_fail_is_inconclusive(sessions: int, bad: set[int], engines: int, at_once: int) -> None:
    """After three times, with the reason, where the engine answers others; the run goes on, and the same command finds nothing left."""

    async def act(peer: Peer) -> None:
        await (_fail(peer) if _is_bad(peer) else _score(peer))

    sink, names_bad = Sink(), set(map(str, bad))
    batch = Batch([str(i) for i in range(sessions)], lambda names: {n: BAD if n in names_bad else GOOD for n in names}, sink, run="r")
    with broken(act) as upstream:
        summary = batch.run([OpenAIEngine(upstream.url) for _ in range(engines)], at_once=at_once)
        times = sum(len(body["prompt"]) == LENGTH_BAD for body in upstream.bodies)
    reasons = {p.reason for _, p in sink.recorded if isinstance(p, e.ReplayFinished) and p.verdict == "inconclusive"}

    assert Counter(inconclusive=len(bad), identical=sessions - len(bad)) == summary.verdicts
    assert 3 * len(bad) == times
    assert {f"1 of 1 sequence: the engine failed at it 3 times: ask engine: status 500: out of memory ({upstream.url})"} == reasons


@pytest.mark.parametrize("at_once", [1, 32])
@pytest.mark.parametrize("how", ["status", "reset"])
def test_a_server_that_is_down_ends_a_run(at_once: int, how: str) -> None:
    """Soon, in one line, without a verdict on what it was asked for last: that is done when the run goes on."""
    act, asked = _failing(lambda number: number > 100, b"502 Bad Gateway" if how == "status" else None)
    batch = Batch([str(number) for number in range(2000)], lambda names: dict.fromkeys(names, GOOD), Sink(), run="r")
    fault = "status 502: out of memory" if how == "status" else "does not answer"
    ended = f"no engine is left after 100 sessions, 1900 wait: ask engine: {fault}"
    with broken(act) as upstream, pytest.raises(EngineUnavailable, match=ended):
        batch.run([OpenAIEngine(upstream.url)], at_once=at_once)

    assert {"identical": 100} == dict(batch.summary.verdicts)
    assert len(asked) <= 100 + at_once + 2


def test_what_one_engine_cannot_do_another_does() -> None:
    """One that answers little and fails at the rest, and so is free all the time, has no say where another is there."""

    async def ailing(peer: Peer) -> None:
        await (_fail(peer) if len(json.loads(peer.body)["prompt"]) > 2 else _score(peer))

    with broken(ailing) as ill, broken(_score) as well:
        batch = Batch([str(number) for number in range(300)], lambda names: dict.fromkeys(names, GOOD), Sink(), run="r")
        summary = batch.run([OpenAIEngine(upstream.url) for upstream in (ill, well)], at_once=16)

    assert {"identical": 300} == dict(summary.verdicts)


@pytest.mark.parametrize("status", [b"429 Too Many Requests", b"503 Service Unavailable"])
def test_a_server_that_says_when_to_come_again_is_asked_again(status: bytes) -> None:
    """Then, as long as that is soon; one that wants an hour has failed."""
    again = iter([b"0", b"0", None, b"3600"])

    async def act(peer: Peer) -> None:
        wait = next(again)
        await (_score(peer) if wait is None else _fail(peer, status, b"retry-after: %b\r\n" % wait))

    with broken(act) as upstream:
        engine = OpenAIEngine(upstream.url)
        found = engine.force(Request("m"), (1,), (2,))
        with pytest.raises(EngineUnavailable, match="out of memory"):
            engine.force(Request("m"), (1,), (2,))
        engine.close()

    assert Scored((-1.0,), (1,), (-1.0,)) == found


def test_what_waits_goes_as_one_batch() -> None:
    """While the engine is at work others ask; it then gets all of them at once, each has its own answer, and a failure is everyone's."""
    begun, go, sizes = threading.Event(), threading.Event(), []

    class Slow(Scorer):
        def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
            sizes.append(len(several))
            begun.set()
            assert go.wait(60)
            if any(each.token_ids == (13,) for each in several):
                raise EngineUnavailable("gone", operation="ask engine")
            return [scored([-float(token) for token in each.token_ids]) for each in several]

    gathered = Gathered(Slow(lambda ids: scored([])))

    def ask(token: int) -> Scored | Refused:
        return gathered.force(Request(None), (1,), (token,))

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, 1)
        assert begun.wait(60)
        rest = [pool.submit(ask, token) for token in range(2, 9)]
        until(lambda: gathered.waiting == 7 or None)
        go.set()
        answers = [future.result(60) for future in (first, *rest)]
        bad = pool.submit(ask, 13)
        with pytest.raises(EngineUnavailable, match="gone"):
            bad.result(60)
    gathered.close()

    assert sizes == [1, 7, 1]
    assert answers == [scored([-float(token)]) for token in range(1, 9)]


def test_a_continuous_engine_takes_in_while_it_works() -> None:
    """What is asked for joins those at work; what wants the engine for itself waits for their end, and what comes later for that."""

    class Steady(Scorer):
        def __init__(self) -> None:
            super().__init__(lambda ids: scored([]))
            self.running: dict[int, Forced] = {}
            self.done: list[int] = []
            self.most, self.fails = 0, False

        def begin(self, forced: Forced) -> int | Refused:
            if forced.token_ids == (0,):
                return Refused("nothing to say")
            self.running[forced.token_ids[0]] = forced
            self.most = max(self.most, len(self.running))
            return forced.token_ids[0]

        def step(self) -> list[tuple[int, Callable[[], Scored]]]:
            if self.fails:
                raise EngineUnavailable("gone", operation="ask engine")
            ended, self.done = self.done, []
            return [(token, partial(scored, [-float(token)])) for token in ended if self.running.pop(token)]

        def fingerprint(self, recorded: e.EnvironmentCaptured | None = None) -> e.EnvironmentCaptured | None:
            assert not self.running
            return None

    engine = Steady()
    gathered = Gathered(engine)
    with ThreadPoolExecutor(8) as pool:
        asked = {token: pool.submit(gathered.force, Request(None), (1,), (token,)) for token in (1, 2, 3)}
        until(lambda: len(engine.running) == 3 or None)
        alone = pool.submit(gathered.fingerprint)
        until(lambda: gathered.waiting == 1 or None)
        later = pool.submit(gathered.force, Request(None), (1,), (4,))
        engine.done = [2]

        assert scored([-2.0]) == asked[2].result(60)
        assert not alone.done()
        assert 4 not in engine.running
        engine.done = [1, 3]
        assert (scored([-1.0]), scored([-3.0]), None) == (asked[1].result(60), asked[3].result(60), alone.result(60))
        until(lambda: 4 in engine.running or None)
        assert Refused("nothing to say") == gathered.force(Request(None), (1,), (0,))
        engine.fails = True
        with pytest.raises(EngineUnavailable, match="gone"):
            later.result(60)
    gathered.close()

    assert engine.most == 3


@pytest.mark.parametrize("template", ["a", "b"])
def test_the_engine_has_all_that_it_may_have(template: str) -> None:
    """Sessions are read and begun while none is answered, many more than are read at once; what needs an idle engine comes first.

    Where the template is another one each prompt is rendered, which goes beside all that.
    """

    class Full(Scorer):
        def __init__(self) -> None:
            super().__init__(lambda ids: scored([]), environment(**{"probe.chat_template": template} if template != "a" else {}))
            self.begun: list[Forced] = []
            self.idle_asked = self.rendered = 0

        def render(self, request: Request) -> tuple[int, ...]:
            self.rendered += 1
            return tuple(range(5))

        def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
            assert not self.begun
            self.idle_asked += 1
            return super().generate_all(requests)

        def begin(self, forced: Forced) -> int:
            self.begun.append(forced)
            return len(self.begun) - 1

        def step(self) -> list[tuple[int, Callable[[], Scored]]]:
            if len(self.begun) < len(sessions):
                return []
            return [(i, partial(scored, [-1.0] * len(forced.token_ids))) for i, forced in enumerate(self.begun)]

    engine, events = Full(), taped([-1.0] * 20).events
    sessions = [str(number) for number in range(5 * AHEAD)]
    summary = Batch(sessions, lambda names: dict.fromkeys(names, events), Sink(), run="r").run([engine], at_once=len(sessions))

    assert {"identical": len(sessions)} == dict(summary.verdicts)
    assert engine.idle_asked
    assert (len(sessions) if template == "b" else 0) == engine.rendered


@pytest.mark.parametrize("where", ["told", "reader", "session"])
def test_what_is_no_engines_fault_ends_a_run(where: str) -> None:
    """It is raised, and what was begun by then is done first: no replay is left without an end."""
    events, sink, sessions = taped([-1.0] * 20).events, Sink(), [str(number) for number in range(3 * AHEAD)]

    def read(names: Sequence[str]) -> dict[str, list[StoredEvent]]:
        if where == "reader" and names[0] != "0":
            until(lambda: sink.recorded or None)
            raise StoreUnavailable("gone", operation="read")
        return dict.fromkeys(names, events)

    def told(_: object) -> None:
        if where == "told":
            raise OSError("the terminal is gone")

    def view(ids: tuple[int, ...]) -> Any:
        if where == "session":
            raise ZeroDivisionError("a bug")
        return scored([-1.0] * len(ids))

    faults = {"told": OSError, "reader": StoreUnavailable, "session": ZeroDivisionError}
    with pytest.raises(faults[where]):
        Batch(sessions, read, sink, run="r", told=told).run([Scorer(view)], at_once=8)
    kinds = Counter(payload.KIND for _, payload in sink.recorded)

    assert 0 < kinds["replay_started"] < len(sessions)
    if where != "session":  # whose own replay is what ends it
        assert kinds["replay_started"] == kinds["replay_finished"] == kinds["session_closed"]


def test_a_session_that_comes_back_finds_an_engine() -> None:
    """The last session's engine dies while the other has nothing to do: the other waited, and does it."""
    other_idle = threading.Event()

    def dying(ids: tuple[int, ...]) -> Any:
        assert other_idle.wait(60)
        raise EngineUnavailable("gone", operation="ask engine")

    def well(ids: tuple[int, ...]) -> Any:
        other_idle.set()
        return scored([-1.0] * len(ids))

    events = taped([-1.0] * 20).events
    summary = Batch(["a", "b"], lambda names: dict.fromkeys(names, events), Sink(), run="r").run([Scorer(dying), Scorer(well)])

    assert {"identical": 2} == dict(summary.verdicts)
