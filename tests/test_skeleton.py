"""The frame that everything hangs in: rooms and their arrows, names, locks, make targets, containers."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts import demo

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("schemas", "store", "ingest", "replay", "lifecycle", "tokentape")
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
RIVALS = "rivals"
"""The lock of what benchmarks run beside: an environment apart, with pins of its own."""


def project() -> dict[str, Any]:
    """pyproject.toml as a tree."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names(requirements: list[str]) -> set[str]:
    """Normalised distribution names of requirements."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", text, maxsplit=1)[0]).lower() for text in requirements}


def locked(name: str) -> set[str]:
    """Names that a lock pins."""
    return names(re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_arrows_go_down_only() -> None:
    """import-linter keeps the layers: tokentape, then ingest, replay and lifecycle apart, then store, then schemas."""
    answer = subprocess.run([_tool("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert answer.returncode == 0, answer.stdout
    assert "1 kept, 0 broken" in answer.stdout


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def test_no_other_distribution_owns_our_names() -> None:
    """No installed distribution but ours provides a root package of one of our names."""
    owners = importlib.metadata.packages_distributions()
    foreign = {room: set(owners.get(room, [])) - {"tokentape"} for room in ROOMS}

    assert foreign == {room: set() for room in ROOMS}


def test_rooms_are_imported_from_this_checkout() -> None:
    """What the tests import is this code and no installed copy of it."""
    found = {room: Path(importlib.import_module(room).__file__ or "").parent for room in ROOMS}

    assert found == {room: ROOT / room for room in ROOMS}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_holds_names_versions_and_hashes_only(lock: Path) -> None:
    """No address of a registry, every requirement pinned exactly and with a hash."""
    text = lock.read_text(encoding="utf-8")
    requirements = re.findall(r"^\S.*?(?=^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    unpinned = [each.splitlines()[0] for each in requirements if "==" not in each.splitlines()[0] or "--hash=sha256:" not in each]

    assert "://" not in text
    assert requirements
    assert unpinned == []


def test_locks_are_in_step_with_the_project() -> None:
    """Everything that pyproject.toml asks for is locked where it is installed from; `make lock` writes the locks."""
    listed = project()["dependency-groups"]
    groups = {name: [entry for entry in of if isinstance(entry, str)] for name, of in listed.items()}
    for name, of in listed.items():
        groups[name] += [entry for included in of if isinstance(included, dict) for entry in listed[included["include-group"]]]
    core = names(project()["project"]["dependencies"])
    missing = {
        "core": core - locked("core"),
        "test": (core | names(groups["test"])) - locked("test"),
        "engine": (core | names(groups["test"]) | names(groups["engine"])) - locked("engine"),
        "boot": names(groups["boot"]) - locked("boot"),
        "tools": names(groups["tools"]) - locked("tools"),
    }

    assert missing == {"core": set(), "test": set(), "engine": set(), "boot": set(), "tools": set()}


def test_locks_agree_on_versions() -> None:
    """A package has the same version in every lock, marker by marker, so that tests run on what users install."""
    versions: dict[str, set[frozenset[str]]] = {}
    for lock in [lock for lock in LOCKS if lock.stem != RIVALS]:
        found: dict[str, set[str]] = {}
        for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", lock.read_text(encoding="utf-8"), flags=re.MULTILINE):
            found.setdefault(name, set()).add(version)
        for name, several in found.items():
            versions.setdefault(name, set()).add(frozenset(several))

    assert {name: several for name, several in versions.items() if len(several) > 1} == {}


def test_the_demo_opens_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the demo the page is served on its tape, a browser is sent to the session, and Ctrl-C ends all of it."""
    monkeypatch.setattr(demo, "TOKENTAPE", ROOT / ".venv" / "bin" / "tokentape")
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr(demo, "CONFIG", tmp_path / "demo.toml")
    monkeypatch.setattr(demo, "PAGE_PORT", 0)
    (tmp_path / "demo.toml").write_text(f'data = "{tmp_path / "data"}"\n')
    opened: list[httpx.Response] = []

    def browser(url: str) -> None:
        opened.append(httpx.get(url))
        raise KeyboardInterrupt

    monkeypatch.setattr("webbrowser.open", browser)
    demo.page("01990000-0000-7000-8000-00000000cafe")

    assert [answer.status_code for answer in opened] == [200]
    assert "<title>tokentape" in opened[0].text
    assert list((tmp_path / "data" / "run").glob("*.json")) == []


@pytest.mark.parametrize("target", ["setup", "up", "demo", "test", "lint", "bench", "services-up", "services-down", "lock", "help"])
def test_make_target_exists(target: str) -> None:
    """Each documented target is known to make."""
    answer = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False, env=_plain())

    assert answer.returncode == 0, answer.stderr


def test_ci_runs_lint_then_test() -> None:
    """What has to hold before a change is accepted is what a person runs by hand."""
    commands = re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert commands == ["lint", "test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_project_may_not_be_uploaded() -> None:
    """The classifier that makes the package index refuse an upload is there, and the licence is in the tree."""
    assert "Private :: Do Not Upload" in project()["project"]["classifiers"]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_setup_refuses_an_old_python_in_one_line(tmp_path: Path) -> None:
    """Without a Python in range the set-up names the fault and the cure, and makes nothing."""
    work = tmp_path / "work"
    (work / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", work / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dirname", "uname", "id"):
        (tools / name).symlink_to(shutil.which(name) or name)
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    answer = subprocess.run(["sh", "scripts/setup.sh"], cwd=work, env={"PATH": str(tools)}, capture_output=True, text=True, check=False)

    assert answer.returncode == 1
    assert answer.stderr.splitlines() == ["setup: no Python 3.11, 3.12 or 3.13 was found on the PATH; install one and run this again"]
    assert not (work / ".venv").exists()


def compose_file() -> dict[str, Any]:
    """docker-compose.yml as a tree, merges resolved."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return tree


def _plain() -> dict[str, str]:
    """This environment without the variables that make and compose would read."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("S3_", "KAFKA_", "MAKE", "MFLAGS", "COMPOSE_"))}


def _compose() -> list[str]:
    """The compose client of this machine, an empty list where there is none; version 1 knows an older format."""
    for client in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(client[0]):
            answer = subprocess.run([*client, "version", "--short"], capture_output=True, text=True, check=False)
            if answer.returncode == 0 and not answer.stdout.startswith("1."):
                return client
    return []


def test_compose_file_is_valid() -> None:
    """The compose client accepts the file as it stands; where there is no client, what can be read off the tree is checked."""
    client = _compose()
    command = [*client, "-f", str(ROOT / "docker-compose.yml"), "config", "--quiet"]
    answer = subprocess.run(command if client else ["true"], env=_plain(), capture_output=True, text=True, check=False)
    tree = compose_file()

    assert answer.returncode == 0, answer.stderr
    assert {key for key in tree if not key.startswith("x-")} == {"name", "services", "volumes"}
    assert [name for name, service in tree["services"].items() if "image" not in service] == []


def test_every_container_has_a_health_check_and_a_place_for_its_data() -> None:
    """Each service tells whether it works, and what it keeps stands in a named volume."""
    tree = compose_file()
    mounts = {name: service["volumes"][0].split(":")[0] for name, service in tree["services"].items()}

    assert all("test" in service["healthcheck"] for service in tree["services"].values())
    assert set(mounts.values()) == set(tree["volumes"])
    assert set(mounts) == {"kafka", "minio", "gateway", "api", "indexer", "scheduler"}


def test_no_port_is_reachable_from_outside() -> None:
    """Every published port is bound to the loopback address."""
    ports = [port for service in compose_file()["services"].values() for port in service.get("ports", [])]

    assert len(ports) == 4
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_credentials_can_be_chosen_in_one_place() -> None:
    """The S3 server and its client take both credentials from the same variables, and none stands in the file otherwise."""
    tree = compose_file()
    server = tree["services"]["minio"]["environment"]
    client = tree["services"]["gateway"]["environment"]

    assert server["MINIO_ROOT_USER"] == client["TOKENTAPE_COLD__ACCESS_KEY"] == "${S3_ACCESS_KEY:-tokentape}"
    assert server["MINIO_ROOT_PASSWORD"] == client["TOKENTAPE_COLD__SECRET_KEY"] == "${S3_SECRET_KEY:-only-on-localhost}"


def test_containers_are_configured_by_known_settings() -> None:
    """Every variable that the compose file gives to tokentape is a setting."""
    from tokentape.config import load

    environment: dict[str, str] = {}
    for service in compose_file()["services"].values():
        environment |= {name: value for name, value in service["environment"].items() if name.startswith("TOKENTAPE_")}
    settings = load(environ=environment)

    assert settings.log.bootstrap_servers == "kafka:19092"
    assert settings.cold.endpoint == "minio:9000"


def test_image_is_made_of_locked_packages() -> None:
    """Each file that the Dockerfile copies exists and passes .dockerignore, and packages come from the lock by hash."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (?!--)(.*)$", text, flags=re.MULTILINE) for word in line.split()[:-1]]
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert set(copied) == set(allowed)
    assert text.count("--require-hashes") == 2
