"""Tours: one small engine is recorded, and every tour explains what the tape has of it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.conftest import VllmService
from tokentape.cli import main
from tokentape.tours.engine import load
from tokentape.tours.pages import PAIRS, SINGLE

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def tour(data: Path, *arguments: str, code: int = 0, stdin: str = "") -> str:
    """What `tokentape tour …` prints."""
    ran = CliRunner().invoke(main, ["--data", str(data), "tour", *arguments], input=stdin, env={"COLUMNS": "160"})
    assert code == ran.exit_code, ran.output
    return ran.output


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> tuple[Path, str, str]:
    """The data directory, the engine run, and what the first tour said."""
    data = tmp_path_factory.mktemp("tour") / "data"
    said = tour(data, "continuous-batching", "--model", str(vllm.model_dir))
    return data, re.findall(r"engine run ([0-9a-f-]{36})", said)[0], said


@needs_vllm
@pytest.mark.timeout(1200)
class TestRun:
    """One run; its own tour draws it, and all others explain it again."""

    def test_who_was_in_which_step(self, told: tuple[Path, str, str]) -> None:
        """Each request has a row: it waits, computes its prompt in one step and then a token a step, three at most side by side."""
        drawn = dict(re.findall(r"^ +(r\d|in all) (.*)$", told[2], re.MULTILINE))
        wanted = {f"r{i + 1}": asked["parameters"]["max_tokens"] for i, asked in enumerate(load("shared"))}

        assert wanted == {name: marks.count("■") + marks.count("▓") for name, marks in drawn.items() if name != "in all"}
        assert {1} == {marks.count("▓") for name, marks in drawn.items() if name != "in all"}
        assert "3" == max(drawn["in all"])
        assert "░" in drawn["r4"]

    def test_a_generation(self, told: tuple[Path, str, str]) -> None:
        """The longest answer: a prompt computed at once, and a line for each of its forty tokens."""
        said = tour(told[0], "generation", "--engine-run", told[1])

        assert "step 0: 134 of 134 prompt tokens computed at once, 0 from the cache" in said
        assert list(range(40)) == [int(i) for i in re.findall(r"^ +(\d+) +\d+ +-?\d+\.\d{4} ", said, re.MULTILINE)]

    def test_blocks(self, told: tuple[Path, str, str]) -> None:
        """The longest sequence holds five blocks for 134 tokens, a sixth from the 161st on; another request found two of them."""
        said = tour(told[0], "paged-attention", "--engine-run", told[1])

        assert ["134 tokens  ▣▣▣▣□", "161 tokens  ▣▣▣▣▣□"] == re.findall(r"(\d+ tokens  ▣*□)", said)
        assert "r4 found 64 tokens, 2 blocks, that another sequence had left" in said

    def test_initialisation_and_profile(self, told: tuple[Path, str, str]) -> None:
        """What was decided before the first step, and all tokens accounted for in the profile."""
        begun, profile = (tour(told[0], name, "--engine-run", told[1]) for name in ("initialisation", "profiling"))
        counted = [int(tokens) for tokens in re.findall(r"^ +(?:prompts|tokens) +\d+ +(\d+) ", profile, re.MULTILINE)]
        asked = load("shared")

        assert "64 blocks of 32 tokens: room for 2,048 tokens" in begun
        assert re.search(r"max_num_seqs +3", begun)
        assert sum(len(each["prompt"]) + each["parameters"]["max_tokens"] - 1 for each in asked) - 64 == sum(counted)

    @pytest.mark.parametrize("name", PAIRS)
    def test_a_run_beside_itself(self, told: tuple[Path, str, str], name: str) -> None:
        """What compares two runs finds no drift between a run and itself."""
        said = tour(told[0], name, "--engine-run", f"{told[1]},{told[1]}")

        assert "over 126 tokens: mean 0, largest 0 nats" in said
        assert 6 == len(re.findall(r"^ +r\d +\d+ +the end ", said, re.MULTILINE))

    def test_stepping(self, told: tuple[Path, str, str]) -> None:
        """With --step each page waits for Enter; input that has ended waits for nobody."""
        said = tour(told[0], "initialisation", "--engine-run", told[1], "--step", stdin="\n")

        assert 4 == said.count("Enter goes on")


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["nowhere"], 2, "'nowhere' is not one of"),
        (["generation", "--engine-run", "zz"], 2, "'zz' is no id"),
        (["generation", "--engine-run", "01" * 16], 3, "01010101"),
        (["kv-quantisation", "--engine-run", "01" * 16], 2, "kv-quantisation explains 2 runs, not 1"),
        (["generation", "--model", "/nowhere"], 2, "no model lies at /nowhere"),
    ],
)
def test_what_cannot_be_toured(tmp_path: Path, arguments: list[str], code: int, word: str) -> None:
    """One line, and no engine is started."""

    assert word in tour(tmp_path, *arguments, code=code)


def test_tours_are_listed(tmp_path: Path) -> None:
    """Without a name the tours are told; every one of them is."""
    said = tour(tmp_path)

    assert [] == [name for name in (*SINGLE, *PAIRS) if name not in said]
