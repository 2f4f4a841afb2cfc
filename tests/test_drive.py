"""Traffic again: every recorded request at its time whatever becomes of the others, and a report beside the record."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from replay.drive.arrivals import Arrival, Past, arrivals_of_trace, in_order
from replay.drive.client import Driven, Target
from replay.drive.driver import Driving, drive
from replay.drive.report import report_of
from replay.drive.traces import Row, read_trace
from schemas.settings import Settings
from scripts.native.processes import free_port
from tests.conftest import VllmService
from tests.gateway_rig import DONE, Peer, Rig, broken, chunk
from tests.program import ROOT
from tests.traffic_rig import Traffic, ask

CHAT = "/v1/chat/completions"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_a_day_is_driven_again(deployment: Settings, vllm: VllmService) -> None:
    """At 50 times its pace and flat out: as many requests, tokens of the recorded lengths, times on both sides; the tape tells it."""
    traffic = Traffic(deployment, vllm)
    traffic.record([ask(f"Which request came {number}th?", temperature=1.0, seed=number, max_tokens=8 + number) for number in range(3)])
    traffic.record([{"prompt": "The engine", "max_tokens": 5}], "/v1/completions")
    rig = Rig(traffic.settings)
    try:
        (paced,) = traffic.rows("drive", "--where", "outcome = 'finished'", "--speed", "50", "--to", rig.url)
    finally:
        rig.close()
    (flat,) = traffic.rows("drive", "--where", "tokens > 5", "--speed", "max", "--to", vllm.url, "--limit", "3", "--in-flight", "2")
    shown = traffic.run("drive", "--where", "tokens = 5", "--speed", "9", "--to", f"{vllm.url}/v1", "--limit", "1").stdout
    (again,) = traffic.sql("SELECT count(*) AS n, sum(tokens) AS tokens FROM sessions WHERE list_contains(tags, 'drive')")

    assert ({}, 4, 32, 4, 32) == (paced["errors"], *(paced[side][name] for side in ("driven", "record") for name in ("requests", "tokens")))
    assert (4, 32) == (again["n"], again["tokens"])
    assert ({}, 3, 27) == (flat["errors"], flat["driven"]["requests"], flat["driven"]["tokens"])
    assert {"requests": 1.0, "tokens": 1.0}.items() <= flat["ratio"].items()
    assert None not in [
        value for side in ("driven", "record") for time in ("first_token_ms", "whole_ms") for value in flat[side][time].values()
    ]
    assert "sent late by" in shown


def arrivals(count: int) -> list[Arrival]:
    """Requests that are due at once."""
    return [Arrival(0, CHAT, {"model": "m", "messages": [], "number": number}) for number in range(count)]


def test_no_request_waits_for_an_answer() -> None:
    """A server that answers nobody before the last request has come is driven to the end: the loop is open."""
    come, everybody = 0, asyncio.Event()

    async def act(peer: Peer) -> None:
        nonlocal come
        come += 1
        if come == 20:
            everybody.set()
        await everybody.wait()
        await peer.begin_stream()
        await peer.send(chunk("a") + chunk("b", finish="stop") + DONE)

    with broken(act) as upstream:
        report = report_of(drive(arrivals(20), Target(upstream.url), speed=1.0, in_flight=1))

    assert (20, 0, 40) == (report.driven.requests, report.driven.failed, report.driven.tokens)
    assert b"x-tokentape-tags: drive" in upstream.heads[0].lower()


def test_what_goes_wrong_is_counted_by_its_name() -> None:
    """A status, a stream that ends early, an error within it, a body that is no stream, a cut connection; the others go on."""

    async def act(peer: Peer) -> None:
        number = json.loads(peer.body)["number"]
        if number == 0:
            await peer.whole(b"429 Too Many Requests", b"application/json", b"{}")
            return
        if number == 4:
            peer.writer.transport.abort()
            return
        await peer.begin_stream()
        said = {1: chunk("a"), 2: chunk("a") + b'data: {"error": {"message": "no"}}\n\n', 3: b"data: {nonsense\n\n"}
        await peer.send(said.get(number, chunk("a") + DONE))

    with broken(act) as upstream:
        report = report_of(drive(arrivals(6), Target(upstream.url), speed=None, in_flight=6))

    expected = {"status 429", "stream ended early", "error in mid-stream", "not a stream of events", "connection lost"}
    assert dict.fromkeys(expected, 1) == report.errors
    assert (6, 5) == (report.driven.requests, report.driven.failed)
    nobody = drive(arrivals(1), Target(f"http://127.0.0.1:{free_port()}"), speed=None, in_flight=1)
    assert {"cannot connect": 1} == report_of(nobody).errors


DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from replay.drive.arrivals import Arrival
from replay.drive.client import Target
from replay.drive.driver import drive
from replay.drive.report import report_of
far = [Arrival(at, {CHAT!r}, {{"model": "m", "messages": []}}) for at in (0, 0, 10**12)]
report = report_of(drive(far, Target(sys.argv[1]), speed=1.0, in_flight=1))
print(report.driven.requests, report.errors, report.stopped, report.planned)
"""


def test_ctrl_c_ends_it_with_the_report_so_far() -> None:
    """While one request hangs and another is due in days: the one that ended counts, the one that hangs is unfinished."""
    process: list[subprocess.Popen[str]] = []
    come = 0

    async def act(peer: Peer) -> None:
        nonlocal come
        come += 1
        await peer.begin_stream()
        await peer.send(chunk("a"))
        if come == 1:
            await peer.send(DONE)
            return
        process[0].send_signal(signal.SIGINT)
        await peer.gone()

    with broken(act) as upstream:
        process.append(subprocess.Popen([sys.executable, "-c", DRIVER, upstream.url], stdout=subprocess.PIPE, text=True))
        said = process[0].communicate(timeout=90)[0]

    assert "2 {'unfinished': 1} True 3\n" == said


def test_a_report_measures_both_sides_alike() -> None:
    """Percentiles, rates over the span, and ratios of driven to recorded; lateness is of sending; nothing known is no figure."""
    past = Past(100_000, (10_000, 30_000), 400_000, 5, failed=False)
    first = Driven(Arrival(0, CHAT, {}, past), 0, 0, 200_000, [20_000, 60_000], 800_000, 5)
    second = Driven(Arrival(600_000, CHAT, {}, past), 600_000, 4_000, None, [], 900_000, 0, "status 500")
    document = report_of(Driving([first, second], 2, 2.0)).document()

    assert (5, 2.5, 1) == tuple(document["driven"][name] for name in ("tokens", "tokens_per_s", "failed"))
    assert (10, 10.0, 0) == tuple(document["record"][name] for name in ("tokens", "tokens_per_s", "failed"))
    assert (20.0, 2.0, 2.0) == (
        document["record"]["between_tokens_ms"]["p50"],
        *(document["ratio"][n] for n in ("first token p50", "between tokens p50")),
    )
    assert {"p50": 2.0, "p99": 3.96} == document["lateness_ms"]
    assert report_of(Driving([], 3, 0.1, stopped=True)).document()["driven"]["first_token_ms"] == {"p50": None, "p99": None}


def test_traces_are_read_and_prompts_made_to_their_lengths(tmp_path: Path) -> None:
    """BurstGPT's seconds and Azure's dates, out of order and with empty answers; the same prompts for the same trace."""
    burst, azure = tmp_path / "burst.csv", tmp_path / "azure.csv"
    burst.write_text(f"{BURST}9,GPT-4,7,0,7,API log\n7.5,GPT-4,3,4,7,API log\n")
    azure.write_text(f"\ufeff{AZURE}2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:03.0799600,12,2\n")
    (rows, empty), (dated, _) = read_trace(burst), read_trace(azure)
    made = in_order(arrivals_of_trace(dated, "m", (5, 6)))

    assert ([Row(5_000_000, 472, 18), Row(7_500_000, 3, 4)], 1) == (rows, empty)
    assert [(0, 12, 2), (900_000, 4808, 10)] == [(a.at_us, len(a.document["prompt"]), a.document["max_tokens"]) for a in made]
    assert made == in_order(arrivals_of_trace(dated, "m", (5, 6)))
    assert 3 == len(arrivals_of_trace(rows, "m", None)[1].document["prompt"].split())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a,b\n1,2\n", "no known trace has the columns a, b"),
        ("", "no known trace has the columns of an empty file"),
        (f"{BURST}x,GPT-4,3,4,7,API log\n", "line 3: Timestamp='x'"),
        (f"{AZURE}2023-11-16 18:17:03,12\n", "line 2: TIMESTAMP='2023-11-16 18:17:03', ContextTokens='12', GeneratedTokens=None"),
        (AZURE, "no row of it has tokens"),
        ("TIMESTAMP\0,\xff", "no known trace"),
    ],
)
def test_what_is_no_trace_is_one_line(tmp_path: Path, text: str, fault: str) -> None:
    """The hint names the columns of both kinds."""
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(Exception, match=fault.replace("(", r"\(")) as caught:
        read_trace(file)

    hint: str = caught.value.hint  # type: ignore[attr-defined]
    assert "BurstGPT: Timestamp, Request tokens, Response tokens; Azure LLM inference: TIMESTAMP, ContextTokens, GeneratedTokens" == hint


def test_a_trace_drives_a_real_engine_and_words_that_name_nothing_are_one_line(
    tmp_path: Path, vllm: VllmService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths are exact, as vLLM's tokenizer gives the ids; speeds, files, keys and endpoints that are none end it before it begins."""
    traffic = Traffic(Settings(data=tmp_path / "data"), vllm)
    file = tmp_path / "trace.csv"
    file.write_text(f"{AZURE}2023-11-16 18:17:03.97,40,6\n2023-11-16 18:17:04.00,9,3\n")
    (report,) = traffic.rows("drive", "--trace", str(file), "--to", vllm.url)
    file.write_text(f"{AZURE}2023-11-16 18:17:03.97,99999,6\n")  # more than the engine takes
    monkeypatch.setenv("EMPTY", "")
    dead = f"http://127.0.0.1:{free_port()}"
    words: list[tuple[list[str], int, str]] = [
        (["--to", vllm.url], 2, "--where and --trace exclude each other"),
        (["--where", "true", "--to", vllm.url], 2, "there is no request to send"),
        (["--where", "no_such = 1", "--to", vllm.url], 4, "no_such"),
        (["--trace", str(file), "--to", vllm.url, "--speed", "fast"], 2, "'fast' is no speed"),
        (["--trace", str(tmp_path / "none.csv"), "--to", vllm.url], 2, "read trace: No such file"),
        (["--trace", str(file), "--to", "ftp://x"], 2, "is no HTTP address"),
        (["--trace", str(file), "--to", vllm.url, "--key-env", "EMPTY"], 2, "the variable EMPTY is not set"),
        (["--trace", str(file), "--to", dead], 8, "does not answer"),
        (["--trace", str(file), "--to", vllm.url, "--model", "nobody"], 2, "it does not serve 'nobody'"),
        (["--trace", str(file), "--to", vllm.url, "--speed", "max", "--limit", "1"], 8, "every request failed: status 400"),
    ]
    complaints: list[Any] = [traffic.complaint("drive", *given, code=code) for given, code, _ in words]

    assert ({}, 2, 9) == (report["errors"], report["driven"]["requests"], report["driven"]["tokens"])
    assert report["record"] is None
    assert [True] * len(words) == [fault in said for (_, _, fault), said in zip(words, complaints, strict=True)], complaints
