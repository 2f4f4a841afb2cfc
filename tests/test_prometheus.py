"""The alert rules and the Grafana board before a real Prometheus: it loads them, and every metric that they name is one of ours."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from schemas.settings import Settings
from scripts.native.processes import free_port
from scripts.native.tools import prometheus
from tests.gateway_rig import HELLO, running
from tests.lender import say
from tests.program import ROOT, until
from tokentape.api.metrics import Metrics
from tokentape.installation import Installation

DEPLOY = ROOT / "deploy"
RULES: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "tokentape.json").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + [target["expr"] for panel in PANELS for target in panel["targets"]]
GRAFANA = {"$__rate_interval": "1m", "$__range": "1h", "$instance": ".*"}
"""What Grafana puts in the place of its variables."""


def named(expression: str) -> set[str]:
    """The metrics that an expression names."""
    return set(re.findall(r"\btokentape_\w+", expression))


def told(text: str) -> set[str]:
    """The names of all samples that may stand in an answer of /metrics, also those of which none does yet."""
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    return {family.name + ending for family in text_string_to_metric_families(text) for ending in endings[family.type]}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway that counted a generation that failed, for there is no upstream; it exports spans, to nobody."""
    nobody = f"http://127.0.0.1:{free_port()}"
    with running(tmp_path_factory.mktemp("prometheus"), nobody, telemetry={"otlp_endpoint": nobody}) as rig:
        rig.post({"messages": HELLO})
        yield rig.url


@contextlib.contextmanager
def watching(folder: Path, target: str) -> Iterator[str]:
    """A Prometheus with our rules and our settings, but for the address and the pace."""
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    settings["scrape_configs"][0]["static_configs"] = [{"targets": [target.removeprefix("http://")]}]
    settings["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in settings["rule_files"]]
    file, url = folder / "prometheus.yml", f"http://127.0.0.1:{free_port()}"
    file.write_text(yaml.safe_dump(settings))
    flags = [f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={url.removeprefix('http://')}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([prometheus(say)[0], *flags], stdout=log, stderr=log, cwd=folder)
    try:
        until(lambda: _ready(url) or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.HTTPError:
        return False


def test_every_metric_is_one(gateway: str, tmp_path: Path) -> None:
    """What rules, board and the board's variables name is told by a gateway or the API; a name that is not would never speak."""
    with contextlib.closing(Installation(Settings(data=tmp_path))) as kept:
        kept.log.append([])
        there = told(httpx.get(f"{gateway}/metrics").text) | told(Metrics(kept).text().decode())
    wanted = set().union(*map(named, [*EXPRESSIONS, *(variable.get("definition", "") for variable in BOARD["templating"]["list"])]))

    assert len(wanted) > 20
    assert wanted - there == set()


def test_rules_speak_and_are_silent() -> None:
    """By Prometheus' own tests of rules, which play series of samples to them."""
    for words in (("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules.test.yml")):
        ran = subprocess.run([prometheus(say)[1], *words], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False)

        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_real_prometheus(gateway: str, tmp_path: Path) -> None:
    """It reads the gateway, evaluates each rule without an error, and answers each question of the board."""

    def ask(path: str, **query: str) -> Any:
        answer = httpx.get(f"{url}/api/v1/{path}", params=query).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    with watching(tmp_path, gateway) as url:
        until(lambda: ask("query", query="sum(tokentape_generations_failed_total)")["result"] or None)
        found = until(lambda: _evaluated(ask("rules")))
        for expression in EXPRESSIONS:
            for variable, value in GRAFANA.items():
                expression = expression.replace(variable, value)
            ask("query", query=expression)
        failed = ask("query", query='tokentape_generations_failed_total{error_type="upstream_unreachable"}')["result"]

    assert {rule["name"] for rule in found} == {rule["alert"] for rule in ALERTS}
    assert failed[0]["value"][1] == "1"


def _evaluated(answer: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rules once each was evaluated."""
    rules = [rule for group in answer["groups"] for rule in group["rules"]]
    assert not [rule for rule in rules if rule["health"] == "err"]
    return rules if all(rule["health"] == "ok" for rule in rules) else None


def test_what_a_rule_says() -> None:
    """Each has a severity and says what is wrong and what it means; panels have names of their own."""
    assert all(rule["labels"]["severity"] in ("info", "warning", "critical") for rule in ALERTS)
    assert all({"summary", "description"} <= rule["annotations"].keys() for rule in ALERTS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS) == len({panel["id"] for panel in PANELS})
