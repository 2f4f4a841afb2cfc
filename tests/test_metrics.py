"""`/metrics` of the gateway: what it counts is what the tape says, in a format that Prometheus' own parser reads."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from ingest.gateway.metrics import BETWEEN_TOKENS_S, histogram_family
from schemas.events import GenerationFinished
from schemas.histogram import Histogram
from tests.conftest import VllmService
from tests.gateway_rig import DONE, HELLO, Peer, Rig, broken, chunk, running
from tests.program import until


def measured(rig: Rig) -> dict[str, float]:
    """Every sample by its name and labels."""
    answer = httpx.get(f"{rig.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[f"{sample.name}{sorted(sample.labels.values())}"] = sample.value
    return found


def test_a_real_stream_is_counted(tmp_path: Path, vllm: VllmService) -> None:
    """Tokens, times and ends are those of the tape."""
    with running(tmp_path, vllm.url) as rig:
        before = measured(rig)
        list(rig.client().chat.completions.create(model=vllm.model, messages=HELLO, stream=True, max_tokens=9, n=2))
        events = rig.wait_for("generation_finished")
        rig.recorder.flush(10)
        found = measured(rig)
    finished = next(event.payload for event in events if isinstance(event.payload, GenerationFinished))

    assert before["tokentape_tokens_generated_total[]"] == 0
    assert found["tokentape_tokens_generated_total[]"] == finished.tokens_recorded == 18
    assert found["tokentape_tokens_prompt_total[]"] == finished.prompt_tokens
    assert found["tokentape_first_token_seconds_count[]"] == found["tokentape_generation_seconds_count[]"] == 1
    assert 1 <= found["tokentape_between_tokens_seconds_count[]"] <= 16
    assert found["tokentape_requests_total['/v1/chat/completions']"] == found["tokentape_generations_finished_total[]"] == 1
    assert found["tokentape_generations_open[]"] == 0
    assert found["tokentape_recorder_recorded_total[]"] > 18
    assert found["tokentape_recorder_dropped_total[]"] == found["tokentape_recorder_queue[]"] == 0
    assert found["tokentape_recorder_log_available[]"] == 1
    assert found["tokentape_recorder_encode_seconds_count[]"] >= 5


def test_open_streams_and_failures(tmp_path: Path) -> None:
    """A stream is open while it runs; an upstream that breaks off is counted by how."""
    go = threading.Event()

    async def breaks(peer: Peer) -> None:
        await peer.begin_chunked()
        await peer.chunk(chunk("a"))
        await asyncio.to_thread(go.wait, 30)

    with broken(breaks) as upstream, running(tmp_path, upstream.url) as rig:
        asking = threading.Thread(target=rig.post, args=({"messages": HELLO, "stream": True},))
        asking.start()
        during = until(lambda: found if (found := measured(rig))["tokentape_tokens_generated_total[]"] else None)
        go.set()
        asking.join()
        rig.wait_for("generation_failed")
        found = measured(rig)

    assert during["tokentape_generations_open[]"] == 1
    assert found["tokentape_generations_open[]"] == 0
    assert found["tokentape_generations_failed_total['upstream', 'upstream_disconnected']"] == 1


def test_no_state_is_kept_of_what_ended(tmp_path: Path) -> None:
    """After many streams nothing of them is left in the meter."""

    async def answers(peer: Peer) -> None:
        await peer.begin_chunked()
        await peer.chunk(chunk("a") + chunk("b", index=1) + chunk(finish="stop") + DONE)
        await peer.chunk(b"")

    with broken(answers) as upstream, running(tmp_path, upstream.url) as rig:
        for _ in range(20):
            rig.post({"messages": HELLO, "stream": True})
        found: Any = measured(rig)

    assert found["tokentape_generations_open[]"] == 0
    assert found["tokentape_generations_finished_total[]"] == 20


def test_a_histogram_counts_each_time_once() -> None:
    """A bound belongs to its bucket, what is larger than all goes into the last."""
    histogram = Histogram(BETWEEN_TOKENS_S)
    for us in (0, 1_000, 1_001, 99_999_999):
        histogram.observe(us)
    samples = {
        sample.labels["le"]: sample.value for sample in histogram_family("x", "y", histogram).samples if sample.name == "tokentape_x_bucket"
    }

    assert (samples["0.001"], samples["0.0025"], samples["+Inf"]) == (2, 3, 4)
