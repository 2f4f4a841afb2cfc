"""Training data out of the tape: each format says all of an answer and where it comes from, or refuses it by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from replay.dataset import Example, Left, examples_of
from replay.dataset_formats import Inexpressible, to_openai, to_sharegpt
from replay.fold import fold
from schemas.settings import Settings
from tests.conftest import VllmService
from tests.tape import incident
from tests.traffic_rig import Traffic, ask

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Lisbon"}'}}


def test_recorded_answers_become_examples(deployment: Settings, vllm: VllmService) -> None:
    """All three formats hold request, answer and provenance; what says the same comes once; SQL filters."""
    traffic = Traffic(deployment, vllm)
    answers = traffic.record(
        [ask("Weather in Oslo?", tools=TOOLS, tool_choice="none"), ask("Hello", temperature=1.0, seed=2, n=2)],
        **{"x-tokentape-tags": "good"},
    )
    traffic.record([ask("Hello", temperature=1.0, seed=2, n=2)])
    openai, sharegpt, parquet = (traffic.folder / name for name in ("a.jsonl", "b.jsonl", "c.parquet"))
    tagged = "session_id IN (SELECT session_id FROM sessions WHERE list_contains(tags, 'good'))"
    said = traffic.run("dataset", "--where", "true", "--format", "openai", "-o", str(openai)).stderr
    traffic.run("dataset", "--where", tagged, "--format", "sharegpt", "-o", str(sharegpt))
    traffic.run("dataset", "--where", "true", "--no-dedupe", "--format", "parquet", "-o", str(parquet))
    lines = [json.loads(line) for line in openai.read_text().splitlines()]
    shared = [json.loads(line) for line in sharegpt.read_text().splitlines()]
    rows = pyarrow.parquet.read_table(parquet).to_pylist()
    first, texts = answers[0]["choices"][0]["message"]["content"], {choice["message"]["content"] for choice in answers[1]["choices"]}
    (recorded,) = traffic.sql(
        f"SELECT session_id, generation_id, model FROM generations WHERE generation_id = '{lines[0]['metadata']['generation']}'"
    )

    assert (3, 3, 5) == (len(lines), len(shared), len(rows))
    assert "2 answers left out: the same as one before" in said
    assert [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", "content": first}] == lines[0]["messages"]
    assert TOOLS == lines[0]["tools"]
    assert texts == {line["messages"][-1]["content"] for line in lines[1:]}
    assert (recorded["session_id"], vllm.model, False, ["good"], "length") == tuple(
        lines[0]["metadata"][name] for name in ("session", "model", "edited", "tags", "finish_reason")
    )
    assert [{"from": "human", "value": "Weather in Oslo?"}, {"from": "gpt", "value": first}] == shared[0]["conversations"]
    assert [TOOLS[0]["function"]] == json.loads(shared[0]["tools"])
    assert [24] * 5 == [len(row["token_ids"]) for row in rows] == [len(row["logprobs"]) for row in rows]
    assert first == rows[0]["messages"][-1]["content"]
    assert rows[0]["prompt_token_ids"]


def test_what_is_no_example_is_refused_or_counted(tmp_path: Path, vllm: VllmService) -> None:
    """A text completion is named; --skip counts it; nothing is half-written, and no file is written over unasked."""
    traffic = Traffic(Settings(data=tmp_path / "data"), vllm)
    traffic.record([ask("Hello", max_tokens=3)])
    traffic.record([{"prompt": "Hello", "max_tokens": 3}], "/v1/completions")
    file = tmp_path / "out.jsonl"
    words = ["--format", "openai", "-o", str(file)]
    refused = traffic.complaint("dataset", "--where", "true", *words)
    missing = file.exists()
    traffic.run("dataset", "--where", "true", *words, "--skip")
    again = traffic.complaint("dataset", "--where", "true", *words)
    nothing = traffic.complaint("dataset", "--where", "false", *words, "--force")
    wrong = traffic.complaint("dataset", "--where", "no_such", *words, "--force", code=4)

    assert "a request to /v1/completions is no conversation" in refused
    assert (False, "there is a file already") == (missing, again.partition(": ")[2].partition(" (")[0])
    assert ("no answer makes an example", True) == (nothing.partition(": ")[2], "no_such" in wrong)
    assert 1 == len(file.read_text().splitlines())
    assert ["data", "out.jsonl", "tokentape.toml"] == sorted(path.name for path in tmp_path.iterdir())


def test_an_incident_keeps_its_tools_reasoning_and_edits() -> None:
    """The answer that was edited says so, with its tool call and what it thought before; failed ones make no example."""
    state = fold(incident().events)
    found = [one for generation in state.generations.values() for one in examples_of(state, generation)]
    made, left = [one for one in found if isinstance(one, Example)], [one for one in found if isinstance(one, Left)]
    called = to_openai(made[2])

    assert [False, False, True] == [example.provenance["edited"] for example in made]
    assert ["it did not end well"] * 2 == [one.reason for one in left]
    assert ["get_weather"] == [call["function"]["name"] for call in called["messages"][-1]["tool_calls"]]
    assert called["messages"][-1]["reasoning_content"].startswith("The incident began")
    assert "get_weather" == called["tools"][0]["function"]["name"]
    assert made[0].digest() == made[1].digest() != made[2].digest()
    with pytest.raises(Inexpressible, match="one tool call in a turn and nothing beside it"):
        to_sharegpt(made[2])


def example(*messages: dict[str, Any]) -> Example:
    """An example of these messages."""
    return Example(list(messages), TOOLS, {"generation": "g", "sequence": 0}, (), (), ())


USER = {"role": "user", "content": "Hi"}


def test_sharegpt_has_tools_and_thoughts() -> None:
    """A call, its result, and an answer that was thought about."""
    thought = {"role": "assistant", "content": "Sunny.", "reasoning_content": "Hm."}
    found = to_sharegpt(
        example(
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "19"},
            thought,
        )
    )

    assert ["system", "human", "function_call", "observation", "gpt"] == [turn["from"] for turn in found["conversations"]]
    assert {"name": "get_weather", "arguments": {"city": "Lisbon"}} == json.loads(found["conversations"][2]["value"])
    assert "<think>\nHm.\n</think>\n\nSunny." == found["conversations"][4]["value"]


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "texts only"),
        ([USER, USER], "no human as turn 2"),
        ([USER, {"role": "assistant", "tool_calls": [CALL, CALL]}], "one tool call"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "are none"),
        ([{"role": "critic", "content": "no"}], "no role 'critic'"),
    ],
)
def test_sharegpt_refuses_what_it_has_no_words_for(messages: list[dict[str, Any]], fault: str) -> None:
    """Each by its name."""
    with pytest.raises(Inexpressible, match=fault):
        to_sharegpt(example(*messages))
