"""Batch replay over Ray actors: the verdicts of one engine, from two, each session once; what a cluster cannot do is one line."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from replay.engines.apart import Hosted
from replay.engines.base import Forced, Request
from replay.engines.cluster import ActorEngine, Cluster, room
from schemas.errors import EngineUnavailable, UsageError
from schemas.settings import Settings
from scripts.native.processes import free_port
from tests.conftest import VllmService
from tests.program import Program
from tests.traffic_rig import Traffic, ask

SMALL = [word for name in ("max_model_len=256", "max_num_seqs=4") for word in ("--engine-option", name)]


@pytest.mark.timeout(1200)
def test_two_actors_replay_what_one_server_recorded(tmp_path: Path, vllm: VllmService) -> None:
    """Real vLLM in each of two actors: every session has its verdict, both worked, and the run finds nothing left to do again."""
    traffic = Traffic(Settings(data=tmp_path / "data"), vllm)
    traffic.record([ask(f"Which request came {number}th?", temperature=1.0, seed=number) for number in range(8)])
    program = Program(tmp_path, traffic.settings)
    program.environment["RAY_worker_niceness"] = "0"  # Ray's workers stand back for all else on a busy machine
    words = ["replay-batch", "--where", "requests > 0", "--run", "night", "--ray", "local", "--format", "json"]
    engine = ["--engine", f"vllm:{vllm.model_dir}", *SMALL]
    (ran,) = program.batch([*words, "--actors", "2", *engine], timeout_s=840)
    again, *refused = program.batch(
        [*words, *engine],
        [*words, "--run", "more", "--engine", vllm.url],
        [*words, "--run", "more", *engine, "--model", "x"],
        ["replay-batch", "--where", "true", "--actors", "2"],
        ["replay-batch", "--where", "true", "--run", "more", "--ray", f"127.0.0.1:{free_port()}", *engine],
        code=None,
        timeout_s=600,
    )
    rows = traffic.sql("SELECT engine, verdict, count(*) AS n FROM replays WHERE verdict IS NOT NULL GROUP BY ALL")

    assert 8 == sum(json.loads(ran.stdout)["verdicts"].values())
    assert {"identical", "numeric_drift"} >= {row["verdict"] for row in rows}
    assert ["Ray actor 0", "Ray actor 1"] == sorted({row["engine"].partition(" in ")[2] for row in rows})
    assert 8 == sum(row["n"] for row in rows)
    assert (0, True) == (again.code, "8 done before" in again.stderr)
    faults = ("--ray needs one --engine vllm:MODEL", "--model is for engines behind a URL", "--actors is for --ray", "join Ray cluster")
    assert [True] * 4 == [fault in each.stderr for fault, each in zip(faults, refused, strict=True)], [each.stderr for each in refused]
    assert [2, 2, 2, 8] == [each.code for each in refused]


def test_an_engines_errors_come_back_whole() -> None:
    """A host answers with the error, and pickling keeps its class, line and hint; its fault is that of the engine."""
    answer = Hosted().load("/nowhere/at/all", {})
    assert isinstance(answer, UsageError)
    back = pickle.loads(pickle.dumps(answer))

    assert (UsageError, str(answer), answer.hint) == (type(back), str(back), back.hint)
    assert "no model lies at /nowhere/at/all" in str(back)


class Disconnected:
    """An actor as a client of `ray://` has it once the connection is gone: asking raises, before anything is waited for."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("Request can't be sent because the Ray client has already been disconnected.")


def test_a_connection_that_is_gone_when_an_actor_is_asked_is_one_line() -> None:
    """Whatever it is asked: a run takes it for an engine that died, and gives its sessions to the others."""
    cluster = Cluster.__new__(Cluster)
    cluster._ray = pytest.importorskip("ray")
    engine = ActorEngine(cluster, Disconnected(), "vllm in Ray actor 0")
    forced = Forced(Request(None), (1,), (2,))
    for asked in (engine.step, engine.fingerprint, lambda: engine.render(forced.request), lambda: engine.begin(forced)):
        with pytest.raises(EngineUnavailable, match=r"ask Ray actor: Request can.t be sent .* \(vllm in Ray actor 0\)"):
            asked()


def test_a_cluster_has_room_for_so_many() -> None:
    """An actor for each engine that the GPUs serve, one without GPUs; more than there is room for is refused by name."""

    assert (4, 2) == room({"CPU": 16, "GPU": 8}, {"tensor_parallel_size": 2}, None)
    assert (1, 0) == room({"CPU": 2}, {}, None)
    assert (2, 1) == room({"CPU": 8, "GPU": 4}, {}, 2)
    for has, actors, fault in (
        ({"CPU": 2.0}, 99, "99 actors of 1 CPU need more than the cluster's 2"),
        ({"CPU": 9.0, "GPU": 1.0}, 2, "1 GPU"),
    ):
        with pytest.raises(UsageError, match=fault):
            room(has, {}, actors)


def test_without_ray_or_a_cluster_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint says what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="Ray is not installed here") as caught:
        Cluster("auto")

    assert "tokentape[ray]" in caught.value.hint
