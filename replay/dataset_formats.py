"""Files of training examples: OpenAI's chat format, ShareGPT with tools, and Parquet with token ids and logprobs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet

from replay.dataset import Example
from replay.words import content_text

ROWS_PER_GROUP = 1_000
"""Examples that are held in memory for one row group."""
FROM = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
"""ShareGPT's names of the roles."""
ASKING, ANSWERING = ("human", "observation"), ("gpt", "function_call")
"""Whose turns take turns in ShareGPT."""

_MESSAGE = pa.struct(
    [(name, pa.string()) for name in ("role", "content", "parts", "reasoning_content", "refusal", "tool_calls", "tool_call_id", "name")]
)
SCHEMA = pa.schema(
    [
        ("messages", pa.list_(_MESSAGE)),
        ("tools", pa.string()),
        *((name, pa.string()) for name in ("session", "generation")),
        ("sequence", pa.int32()),
        *((name, pa.string()) for name in ("model", "recorded_at")),
        ("edited", pa.bool_()),
        ("tags", pa.list_(pa.string())),
        *((name, pa.string()) for name in ("finish_reason", "environment", "tenant")),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
    ]
)
"""Columns of the Parquet file. Tool calls, tools and content that is no plain text (`parts`) are JSON texts."""


class Inexpressible(ValueError):
    """A format has no words for an example; the message says for what."""


Write = Callable[[Example], None]


@contextmanager
def writing(path: Path, kind: str) -> Iterator[Write]:
    """A function that adds an example to a file of this kind (openai, sharegpt, parquet); it raises Inexpressible."""
    if kind == "parquet":
        with pyarrow.parquet.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            rows: list[dict[str, Any]] = []

            def flush() -> None:
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    rows.clear()

            def add(example: Example) -> None:
                rows.append(to_row(example))
                if len(rows) == ROWS_PER_GROUP:
                    flush()

            yield add
            flush()
        return
    convert = {"openai": to_openai, "sharegpt": to_sharegpt}[kind]
    with path.open("wb") as file:
        yield lambda example: _put(file.write, convert(example))


def to_openai(example: Example) -> dict[str, Any]:
    """A line of OpenAI's format for fine-tuning by chats; provenance stands under `metadata`."""
    tools = {"tools": example.tools} if example.tools else {}
    return {"messages": example.messages, **tools, "metadata": example.provenance}


def to_sharegpt(example: Example) -> dict[str, Any]:
    """A conversation of ShareGPT in the dialect with tools (`function_call`, `observation`); reasoning stands in `<think>`.

    Raises:
        Inexpressible: parts that are no text, text beside a tool call, several calls at once, or turns that do not alternate.
    """
    turns = [_turn(message) for message in example.messages]
    spoken = [turn["from"] for turn in turns if turn["from"] != "system"]
    for number, speaker in enumerate(spoken):
        if speaker not in (ANSWERING if number % 2 else ASKING):
            raise Inexpressible(f"ShareGPT has no {speaker} as turn {number + 1}: asking and answering take turns there")
    tools = {"tools": json.dumps([tool.get("function", tool) for tool in example.tools], ensure_ascii=False)} if example.tools else {}
    return {"id": f"{example.provenance['generation']}:{example.provenance['sequence']}", "conversations": turns, **tools} | {
        "metadata": example.provenance
    }


def _turn(message: dict[str, Any]) -> dict[str, str]:
    speaker, content = FROM.get(str(message.get("role"))), message.get("content")
    if speaker is None:
        raise Inexpressible(f"ShareGPT has no role {message.get('role')!r}")
    if isinstance(content, list) and any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
        raise Inexpressible("ShareGPT has texts only, and a message has other parts")
    text = content_text(content) or str(message.get("refusal") or "")
    thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
    calls = message.get("tool_calls") or []
    if calls:
        if len(calls) > 1 or text or thoughts:
            raise Inexpressible("ShareGPT has one tool call in a turn and nothing beside it")
        return {"from": "function_call", "value": _call(calls[0].get("function") or {})}
    return {"from": speaker, "value": f"<think>\n{thoughts}\n</think>\n\n{text}" if thoughts else text}


def _call(function: dict[str, Any]) -> str:
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except ValueError as error:
        raise Inexpressible("ShareGPT has arguments as JSON, and those of a tool call are none") from error
    return json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False)


def to_row(example: Example) -> dict[str, Any]:
    """A row of the Parquet file."""
    tokens = {name: list(getattr(example, name)) for name in ("prompt_token_ids", "token_ids", "logprobs")}
    tools = json.dumps(example.tools, ensure_ascii=False) if example.tools else None
    return {"messages": [_message(message) for message in example.messages], "tools": tools, **example.provenance, **tokens}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    content, calls = message.get("content"), message.get("tool_calls")
    plain = content is None or isinstance(content, str)
    return {
        "role": message.get("role"),
        "content": content if plain else None,
        "parts": None if plain else json.dumps(content, ensure_ascii=False),
        "reasoning_content": message.get("reasoning_content") or message.get("reasoning"),
        "refusal": message.get("refusal"),
        "tool_calls": json.dumps(calls, ensure_ascii=False) if calls else None,
        **{name: message.get(name) for name in ("tool_call_id", "name")},
    }


def _put(write: Callable[[bytes], Any], document: dict[str, Any]) -> None:
    write(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))
