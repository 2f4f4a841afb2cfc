"""Suites: recorded answers become a file, green against the engine that gave them, red after its weights changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from replay.engines.base import Generated, Refused, Request, Spoken
from replay.suite import read_suite
from replay.trials import axes_of, determinism, grid
from schemas.errors import UsageError
from schemas.settings import Settings
from scripts.tiny_model import perturb
from tests.conftest import VllmService
from tests.test_compare import Scorer, scored
from tests.traffic_rig import Traffic, ask

CHAT = (("user", "Tell me."), ("assistant", "What?"), ("user", "Why \x07\n?"))
ASKED = [
    ask("Which request came first?", user="ann@example.com"),
    ask("Weather in Oslo?", temperature=1.0, seed=3, n=2),
    ask("", messages=[{"role": role, "content": text} for role, text in CHAT]),
]


def record(traffic: Traffic) -> Path:
    """A suite of what was asked."""
    traffic.record(ASKED)
    file = traffic.folder / "suite.json"
    traffic.run("suite", "record", "--where", "outcome = 'finished'", "-o", str(file))
    return file


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> tuple[Traffic, Path]:
    """An installation, and a suite of its answers."""
    traffic = Traffic(Settings(data=tmp_path_factory.mktemp("suite") / "data"), vllm)
    return traffic, record(traffic)


def test_a_suite_is_green_on_the_engine_that_gave_it(deployment: Settings, vllm: VllmService) -> None:
    """Each answer is a case with its own verdict on the tape and in JUnit's words; recorded again it is the same file, without names."""
    traffic = Traffic(deployment, vllm)
    file = record(traffic)
    text, report = file.read_text(), traffic.folder / "out.xml"
    traffic.run("suite", "record", "--where", "outcome = 'finished'", "-o", str(file), "--force")
    rows = traffic.rows("suite", "run", str(file), "--junit", str(report), "--run", "ci")
    tree = ElementTree.parse(report).getroot()
    taped = traffic.sql("SELECT verdict FROM replays JOIN sessions USING (session_id) WHERE workflow = 'ci' AND verdict IS NOT NULL")

    assert file.read_text() == text
    assert [word for word in ("ann@example.com", "sk-test", "127.0.0.1", "key-") if word in text] == []
    assert len(ASKED) == len(rows) == len(taped) == len(tree.findall("testsuite/testcase"))
    assert {row["verdict"] for row in rows} <= {"identical", "numeric drift"}
    assert [24, 48, 24] == [row["tokens"] for row in rows]
    assert ("3", "0", "0") == tuple(tree[0].attrib[name] for name in ("tests", "failures", "errors"))
    assert "Why ‹0007›⏎?" in tree[0][2].attrib["name"]


@pytest.mark.filterwarnings("ignore")  # vLLM in this process warns of its own and of torch's deprecations
def test_a_suite_is_red_after_the_weights_changed(recorded: tuple[Traffic, Path], vllm: VllmService, tmp_path: Path) -> None:
    """The same shape and tokenizer with other weights: exit code 6, every case named in the report, the first one in the line."""
    traffic, file = recorded
    changed, report = tmp_path / "changed", tmp_path / "out.xml"
    perturb(vllm.model_dir, changed, noise=0.05)
    small = [word for name in ("max_model_len=512", "max_num_seqs=16") for word in ("--engine-option", name)]
    fault = traffic.complaint("suite", "run", str(file), "--engine", f"vllm:{changed}", *small, "--junit", str(report), code=6)
    tree = ElementTree.parse(report).getroot()

    assert "3 of 3 cases failed; the first:" in fault
    assert ["model_differs"] * 3 == [failure.attrib["type"] for failure in tree.iter("failure")]


def test_what_cannot_be_judged_is_an_error(recorded: tuple[Traffic, Path], tmp_path: Path) -> None:
    """A model that the engine does not serve makes every case inconclusive, and that is not green; a wrong --model is refused."""
    traffic, file = recorded
    report, other = tmp_path / "out.xml", tmp_path / "other.json"
    suite = json.loads(file.read_text())
    other.write_text(json.dumps({**suite, "cases": [{**case, "model": "nobody"} for case in suite["cases"]]}))
    assert "serves no model 'nobody'" in traffic.complaint("suite", "run", str(file), "--model", "nobody", code=2)
    traffic.complaint("suite", "run", str(other), "--junit", str(report), code=6)

    assert ("0", "3") == tuple(ElementTree.parse(report).getroot()[0].attrib[name] for name in ("failures", "errors"))


def test_cases_under_a_grammar_are_told(vllm: VllmService, tmp_path: Path) -> None:
    """They are asked again by the other commands; their logprobs cannot pass for the model's own."""
    traffic, file = Traffic(Settings(data=tmp_path / "data"), vllm), tmp_path / "suite.json"
    traffic.record([ask("Which?", response_format={"type": "json_object"}), ask("Which?")])
    said = traffic.run("suite", "record", "--where", "outcome = 'finished'", "-o", str(file))

    assert "1 case under a grammar: suite run cannot judge and fails them" in " ".join(said.stderr.split())


def test_files_that_are_no_suites_are_one_line(recorded: tuple[Traffic, Path], tmp_path: Path) -> None:
    """Missing, not JSON, of a later version, with a field that nobody knows; a condition that chooses nothing; a file in the way."""
    traffic, file = recorded
    document = json.loads(file.read_text())
    bad = {
        "text": "no json",
        "list": "[]",
        "later": json.dumps({**document, "version": 2}),
        "field": json.dumps({**document, "cases": [{**document["cases"][0], "surprise": 1}]}),
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
    for words, code, fault in (
        (["run", str(tmp_path / "nothing")], 2, "read suite: No such file"),
        (["run", str(tmp_path / "text")], 5, "it is not JSON"),
        (["run", str(tmp_path / "list")], 5, "it is no suite"),
        (["run", str(tmp_path / "later")], 5, "it is of version 2, this program reads 1"),
        (["run", str(tmp_path / "field")], 5, "cases.0.surprise: extra inputs are not permitted"),
        (["run", str(file), "--engine", "http://127.0.0.1:9"], 8, "does not answer"),
        (["record", "--where", "false", "-o", str(tmp_path / "new")], 2, "no answer makes a case"),
        (["record", "--where", "no_such = 1", "-o", str(tmp_path / "new")], 4, "no_such"),
        (["record", "--where", "true", "-o", str(file)], 2, "there is a file already"),
        (["grid", str(file), "--vary", "temperature"], 2, "'temperature' is no axis"),
    ):
        assert fault in traffic.complaint("suite", *words, code=code), words
    assert not (tmp_path / "new").exists()


def test_trials_from_the_command_line(recorded: tuple[Traffic, Path], vllm: VllmService) -> None:
    """A grid has a row for each combination and counts what vLLM refuses; determinism has one for each case; stress counts."""
    traffic, file = recorded
    rows = traffic.rows("suite", "grid", str(file), "--vary", "temperature=0,1.5", "--vary", "max_tokens=4,8")
    repeated = traffic.rows("suite", "determinism", str(file))
    stressed = traffic.rows("suite", "stress", str(file), "--to", vllm.url, "--requests", "7", "--in-flight", "4")[0]
    refused = traffic.complaint("suite", "stress", str(file), "--to", vllm.url, "--requests", "2", "--model", "nobody", code=6)

    assert ({}, 7, 3 * 24 + 2 * 48 + 2 * 24) == (stressed["errors"], stressed["driven"]["requests"], stressed["driven"]["tokens"])
    assert "2 of 2 requests failed: status 404" in refused
    assert [(0, 4), (0, 8), (1.5, 4), (1.5, 8)] == [(row["temperature"], row["max_tokens"]) for row in rows]
    assert [(2, 1, 4), (2, 1, 8)] == [(row["answers"], row["refused"], row["tokens_mean"]) for row in rows[:2]]  # n = 2 is not greedy
    assert [(4, 0), (4, 0)] == [(row["answers"], row["refused"]) for row in rows[2:]]
    assert rows[0]["logprob_mean"] > rows[2]["logprob_mean"]
    assert rows[1]["common_prefix_mean"] > rows[3]["common_prefix_mean"]
    assert [True] * 3 == [row["same"] for row in repeated]


class Speaker(Scorer):
    """An engine that says a token more each time it is asked, unless it is `steady`."""

    def __init__(self, steady: bool) -> None:
        super().__init__(lambda ids: scored([]))
        self.steady, self.requests = steady, list[Request]()

    def generate(self, request: Request) -> Generated | Refused:
        """As many tokens as it was asked times, of the first case only."""
        self.requests.append(request)
        if len(request.document["messages"]) > 1:
            return Refused("too long")
        tokens = (5, 6, 7) if self.steady else tuple(range(5, 5 + len(self.requests)))
        return Generated((Spoken(0, "", tokens, (-1.0,) * len(tokens)),))

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """One after another."""
        return [self.generate(request) for request in requests]


def test_an_engine_that_is_not_deterministic_is_told_from_the_token_on(recorded: tuple[Traffic, Path]) -> None:
    """Where two answers part is named; a refusal is neither the same nor another; seeds are those of the record, or one for all."""
    suite = read_suite(recorded[1])
    steady, moving = Speaker(steady=True), Speaker(steady=False)
    same = [one.same for one in determinism(suite, steady, times=3)]
    reasons = [one.reason for one in determinism(suite, moving)]
    (point,) = grid(suite, Speaker(steady=True), axes_of(["seed=9"]))

    assert [True, True, None] == same
    assert [1, 1, 1, 3, 3, 3, 1, 1, 1] == [request.document["seed"] for request in steady.requests]
    assert ["sequence 0 is another from token 1 on", "sequence 0 is another from token 3 on", "too long"] == reasons
    assert (2, 1, 3.0, -1.0, 0.0, 2) == (
        point.answers,
        point.refused,
        point.tokens_mean,
        point.logprob_mean,
        point.as_recorded,
        point.distinct,
    )


def test_an_axis_is_given_once() -> None:
    """Values are JSON where they can be, words where not."""
    with pytest.raises(UsageError, match="given twice"):
        axes_of(["a=1", "a=2"])

    expected: dict[str, Any] = {"temperature": [0, 0.5], "reasoning_effort": ["low", "high"]}
    assert expected == axes_of(["temperature=0,0.5", "reasoning_effort=low,high"])
