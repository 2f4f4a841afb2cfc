"""Bring up, look at and take down the real services: Apache Kafka, MinIO, vLLM.

    python scripts/services.py up [--state DIR] [kafka minio vllm]
    python scripts/services.py status [--state DIR]
    python scripts/services.py down [--state DIR]

They run as plain processes on free ports of 127.0.0.1; with a Docker engine Kafka and MinIO are
containers of docker-compose.yml. DIR/state.json (mode 0600, it holds credentials) says where they
listen and which processes they are; ``down`` ends those and no others. Needs only Python ≥ 3.11.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.native import compose
from scripts.native.component import Address, Component
from scripts.native.kafka import Kafka
from scripts.native.minio import Minio
from scripts.native.processes import Process, ServiceError, alive, free_port, port_in_use, spawn, stop
from scripts.native.tools import Say, locked
from scripts.native.vllm import Vllm

NAMES = ("kafka", "minio", "vllm")
DEFAULT = ("kafka", "minio")
ATTEMPTS = 3
"""Starts with new ports after another program took one between choosing and binding it."""
PROGRESS_S = 10.0
"""Pause between two progress lines of a service that takes its time."""
CLASH = ("address already in use", "address is already in use", "failed to bind", "specified port is already in use")
"""What the services say, in lower case, when somebody else has their port."""


def say_on_stderr(line: str) -> None:
    """Print one progress line where it does not mix with results."""
    print(line, file=sys.stderr, flush=True)


class Services:
    """The services of one state directory. Every method takes the directory's lock, so that two callers do not collide.

    ``tied`` binds native services to the life of this process: they end with it even when it is killed.
    ``components`` replaces how a service is run (a vLLM with another model).
    """

    def __init__(
        self, state: Path, *, say: Say = say_on_stderr, tied: bool = False, components: Sequence[Component] = (), docker: bool | None = None
    ) -> None:
        self.state = state.resolve()
        self.path = self.state / "state.json"
        self._say = say
        self._tied = tied
        self._docker = docker
        known: dict[str, Component] = {"kafka": Kafka(), "minio": Minio(), "vllm": Vllm()}
        self._components = {**known, **{component.name: component for component in components}}

    def up(self, names: Sequence[str] = DEFAULT, *, ports: Mapping[str, int] | None = None) -> dict[str, Address]:
        """Start what of ``names`` does not run yet, wait until all answer, and return their addresses.

        ``ports`` fixes the clients' port of a service by its name. When one cannot be started those of
        this call are stopped again and ServiceError is raised.
        """
        wanted = dict(ports or {})
        with self._locked() as entries:
            missing = [name for name in names if not self._runs(entries.get(name))]
            try:
                for name in missing:
                    self._begin(entries, name, wanted.get(name))
                for name in missing:
                    self._await(entries, name, fixed=name in wanted)
            except BaseException:
                for name in missing:
                    self._end(entries, name)
                raise
            return {name: dict(entries[name]["address"]) for name in names}

    def down(self) -> list[str]:
        """Stop everything that this directory started and forget it; returns the names of what ran."""
        with self._locked() as entries:
            running = [name for name in entries if self._runs(entries[name])]
            for name in reversed(list(entries)):
                self._end(entries, name)
            return running

    def stop(self, name: str) -> None:
        """Stop one service and keep its data, port and credentials; ``start`` brings it back."""
        with self._locked() as entries:
            entry = self._entry(entries, name)
            if entry.get("compose"):
                compose.call(self.state, _addresses(entries), "stop", name)
            elif entry["process"]:
                stop(Process(**entry["process"]), grace_s=self._components[name].grace_s)
                entry["process"] = None

    def start(self, name: str) -> None:
        """Start a stopped service again at the same address and wait until it answers."""
        with self._locked() as entries:
            entry = self._entry(entries, name)
            if entry.get("compose"):
                compose.call(self.state, _addresses(entries), "start", name)
            elif not self._runs(entry):
                self._spawn(entries, name)
            self._await(entries, name, fixed=True)

    def status(self) -> dict[str, dict[str, str]]:
        """For each service known here: ``running``, ``not answering`` or ``stopped``, its address without secrets, its log."""
        return {name: self._describe(name, entry) for name, entry in self._read().items()}

    def address(self, name: str) -> Address:
        """Address of one service, with credentials."""
        return dict(self._entry(self._read(), name)["address"])

    def process(self, name: str) -> Process | None:
        """The native process of a service; None when it is stopped or a container."""
        found = self._entry(self._read(), name).get("process")
        return Process(**found) if found else None

    def _describe(self, name: str, entry: Mapping[str, Any]) -> dict[str, str]:
        running = self._runs(entry)
        answers = running and self._components[name].ready(entry["address"])
        shown = {key: value for key, value in entry["address"].items() if key not in ("access_key", "secret_key")}
        return {"state": "running" if answers else "not answering" if running else "stopped", **shown, "log": str(entry.get("log", ""))}

    def _begin(self, entries: dict[str, Any], name: str, port: int | None) -> None:
        """Configure one service on new ports and start it, without waiting."""
        component = self._components[name]
        if port is not None and port_in_use(port):
            raise ServiceError(f"{name}: port {port} of 127.0.0.1 is in use; choose another or leave it out for a free one")
        ports = {each: free_port() for each in component.ports}
        if port is not None:
            ports[component.ports[0]] = port
        if self._by_compose(name):
            entries[name] = {"address": compose.address(name, ports), "compose": compose.project(self.state), "process": None}
            self._write(entries)
            compose.call(self.state, _addresses(entries), "up", "-d", "--wait", name)
            return
        home = self.state / name
        home.mkdir(exist_ok=True)
        known = entries.get(name, {}).get("address", {})
        address = component.configure(home, ports, self._say)
        kept = {key: known[key] for key in ("access_key", "secret_key") if key in known}
        entries[name] = {"address": {**address, **kept}, "process": None, "log": str(home / f"{name}.log")}
        self._spawn(entries, name)

    def _spawn(self, entries: dict[str, Any], name: str) -> None:
        """Start the process of a configured service and write down which one it is before anything else can happen."""
        entry = entries[name]
        home = self.state / name
        launch = self._components[name].launch(home, entry["address"], self._say)
        entry["log_from"] = Path(entry["log"]).stat().st_size if Path(entry["log"]).exists() else 0
        entry["process"] = asdict(spawn(launch.argv, log=Path(entry["log"]), env=launch.env, cwd=home, tied=self._tied))
        self._write(entries)

    def _await(self, entries: dict[str, Any], name: str, *, fixed: bool) -> None:
        """Wait until a started service answers, starting it anew on other ports when it lost a race for one."""
        component = self._components[name]
        for _ in range(ATTEMPTS):
            if self._wait_ready(entries[name], component):
                component.warm(entries[name]["address"])
                return
            said = _last_words(entries[name])
            if fixed or not any(word in said.lower() for word in CLASH):
                raise ServiceError(f"{name} ended before it was ready: {_telling_line(said)} (log: {entries[name].get('log')})")
            self._say(f"{name}: another program took its port; trying again on other ports")
            self._begin(entries, name, None)
        raise ServiceError(f"{name}: no free port in {ATTEMPTS} attempts")

    def _wait_ready(self, entry: Mapping[str, Any], component: Component) -> bool:
        """True once it answers, False when it ended before; raises ServiceError when patience is over."""
        began = told = time.monotonic()
        while not component.ready(entry["address"]):
            now = time.monotonic()
            if not self._runs(entry):
                return False
            if now - began > component.patience_s:
                raise ServiceError(f"{component.name} does not answer after {component.patience_s:.0f} s (log: {entry.get('log')})")
            if now - told >= PROGRESS_S:
                told = now
                self._say(f"{component.name} is starting … {now - began:.0f} s")
            time.sleep(0.2)
        return self._runs(entry)

    def _end(self, entries: dict[str, Any], name: str) -> None:
        """Stop one service, delete its data and forget it."""
        entry = entries.get(name)
        if entry is None:
            return
        if entry.get("compose"):
            others = any(other.get("compose") for each, other in entries.items() if each != name)
            arguments = ("rm", "--stop", "--force", name) if others else ("down", "--volumes")  # the last one takes the volumes along
            compose.call(self.state, _addresses(entries), *arguments)
        elif entry.get("process"):
            stop(Process(**entry["process"]), grace_s=self._components[name].grace_s)
        shutil.rmtree(self.state / name / "data", ignore_errors=True)
        del entries[name]
        self._write(entries)

    def _runs(self, entry: Mapping[str, Any] | None) -> bool:
        if entry is None:
            return False
        if entry.get("compose"):
            return True
        return bool(entry.get("process")) and alive(Process(**entry["process"]))

    def _by_compose(self, name: str) -> bool:
        """Whether this service is a container here; the engine is asked once."""
        if self._docker is None:
            self._docker = compose.available()
        return self._docker and name in compose.SERVICES

    @staticmethod
    def _entry(entries: Mapping[str, Any], name: str) -> Any:
        if name not in entries:
            raise ServiceError(f"{name} was not brought up here; known: {', '.join(entries) or 'nothing'}")
        return entries[name]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        """The entries under the directory's lock, written back at the end."""
        self.state.mkdir(parents=True, exist_ok=True)
        with locked(self.state / ".lock"):
            entries = self._read()
            yield entries
            self._write(entries)

    def _read(self) -> dict[str, Any]:
        """Entries by name; empty when there is no state yet."""
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8"))["services"])
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceError(f"{self.path} is not a state file of this script; name another --state or remove it") from error

    def _write(self, entries: Mapping[str, Any]) -> None:
        """Write the state by rename, readable by this user only; without entries the file goes away."""
        if not entries:
            self.path.unlink(missing_ok=True)
            return
        fresh = self.path.with_suffix(".new")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump({"version": 1, "services": entries}, file, indent=2)
        fresh.rename(self.path)


def _addresses(entries: Mapping[str, Any]) -> dict[str, Address]:
    return {name: entry["address"] for name, entry in entries.items()}


def _last_words(entry: Mapping[str, Any]) -> str:
    """What the service said since its last start, the last 20 kB of it."""
    try:
        with Path(entry["log"]).open("rb") as file:
            file.seek(int(entry["log_from"]))
            return file.read()[-20_000:].decode(errors="replace")
    except (OSError, KeyError):
        return ""


def _telling_line(said: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower() or "exception" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:300]


def load(state_file: Path) -> dict[str, Address]:
    """Addresses out of a state.json that somebody else wrote, by service name."""
    return _addresses(Services(state_file.parent)._read())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code (1 with one line on stderr when something cannot be had)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("up", "down", "status"))
    parser.add_argument("names", nargs="*", metavar="SERVICE", help=f"of {', '.join(NAMES)}; default: {' '.join(DEFAULT)}")
    parser.add_argument("--state", type=Path, default=Path(".tokentape-services"), help="state directory (default: %(default)s)")
    parser.add_argument("--port", action="append", default=[], metavar="SERVICE=PORT", help="listen there instead of on a free port")
    parser.add_argument("--native", action="store_true", help="plain processes even where a Docker engine answers")
    parser.add_argument("--model", type=Path, help="model folder for vLLM instead of the tiny one")
    arguments = parser.parse_intermixed_args(argv)
    commands: dict[str, Callable[[Services, argparse.Namespace], int]] = {"up": _up, "down": _down, "status": _status}
    try:
        _check_names(arguments.names)
        components = [Vllm(arguments.model.resolve())] if arguments.model else []
        return commands[arguments.command](
            Services(arguments.state, components=components, docker=False if arguments.native else None), arguments
        )
    except ServiceError as error:
        say_on_stderr(f"services: {error}")
        return 1


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in NAMES:
            raise ServiceError(f"there is no service {name!r}; valid: {', '.join(NAMES)}")


def _ports(pairs: Sequence[str]) -> dict[str, int]:
    """``--port`` values as numbers by service; raises ServiceError for what is not SERVICE=PORT."""
    ports = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if name not in NAMES or not number.isdecimal() or not 0 < int(number) < 65_536:
            raise ServiceError(f"--port {pair}: give SERVICE=PORT, such as kafka=9092")
        ports[name] = int(number)
    return ports


def _up(services: Services, arguments: argparse.Namespace) -> int:
    services.up(arguments.names or DEFAULT, ports=_ports(arguments.port))
    return _status(services, arguments)


def _down(services: Services, arguments: argparse.Namespace) -> int:
    stopped = services.down()
    say_on_stderr(f"stopped: {', '.join(stopped) or 'nothing was running'}")
    return 0


def _status(services: Services, arguments: argparse.Namespace) -> int:
    found = services.status()
    for name, entry in found.items():
        where = entry.get("url") or entry.get("endpoint") or entry.get("bootstrap_servers")
        print(f"{name:6} {entry['state']:14} {where}")
    print(f"state  {services.path}" if found else "nothing was brought up here")
    return 0 if all(entry["state"] == "running" for entry in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
