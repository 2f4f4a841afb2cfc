"""The main job in front of you: real clients, real vLLM, the tape, SQL, time travel, cold tier, proof and replay.

    make demo [DEPLOYMENT=embedded|distributed] [OPEN=1]

Each step prints the command line that it runs; retype any of them afterwards, from the same folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai

from scripts.native.processes import ServiceError
from scripts.native.vllm import MODEL, Vllm
from scripts.services import Services

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("demo-output")
CONFIG = OUTPUT / "demo.toml"
TOKENTAPE = Path(".venv/bin/tokentape")
PAGE_PORT = 8401
BOLD, DIM, GREEN, RED, CYAN, OFF = (
    ("\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[36m", "\033[0m") if sys.stdout.isatty() else ("",) * 6
)

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def say(text: str) -> None:
    """One line for the person who watches."""
    print(text, flush=True)


def heading(number: int, text: str) -> None:
    """The beginning of a step."""
    say(f"\n{BOLD}{CYAN}{number:2}. {text}{OFF}")


def tokentape(*arguments: str, expect: int = 0) -> str:
    """Run one command of the program in front of the user and return what it printed; ends the demo on another exit code."""
    command = [str(TOKENTAPE), "--config", str(CONFIG), *arguments]
    say(f"\n{BOLD}$ {shlex.join(command)}{OFF}")
    ran = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": str(shutil.get_terminal_size((118, 40)).columns)},
    )
    print(ran.stdout, end="", flush=True)
    if ran.returncode != expect:
        raise ServiceError(f"`{shlex.join(command)}` ended with exit code {ran.returncode}, expected {expect}")
    if expect:
        say(f"{DIM}exit code {ran.returncode}, as it should be{OFF}")
    return ran.stdout


def ask(*arguments: str) -> list[dict[str, Any]]:
    """The rows of a query, for the demo's own use."""
    command = [str(TOKENTAPE), "--config", str(CONFIG), "sql", "--format", "json", *arguments]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def write_config(deployment: str, upstream: str, services: dict[str, dict[str, str]]) -> None:
    """The settings file of this demo: what differs from the defaults."""
    lines = [f'data = "{OUTPUT}/data"', "", "[gateway]", "port = 0", f'upstream = "{upstream}"', ""]
    if deployment == "distributed":
        stamp = time.strftime("%Y%m%d%H%M%S")
        lines += [
            "[log]",
            'kind = "kafka"',
            f'bootstrap_servers = "{services["kafka"]["bootstrap_servers"]}"',
            f'topic = "demo.{stamp}"',
            "",
        ]
        lines += ["[cold]", 'kind = "minio"', f'endpoint = "{services["minio"]["endpoint"]}"', f'bucket = "demo-{stamp}"']
        lines += [f'access_key = "{services["minio"]["access_key"]}"', f'secret_key = "{services["minio"]["secret_key"]}"', ""]
    CONFIG.write_text("\n".join(lines), encoding="utf-8")
    CONFIG.chmod(0o600)


@contextlib.contextmanager
def running(part: str, *arguments: str) -> Iterator[str]:
    """`tokentape up` while the block runs; yields the URL of one of its parts."""
    command = [str(TOKENTAPE), "--config", str(CONFIG), *arguments]
    say(f"\n{BOLD}$ {shlex.join(command)} &{OFF}")
    with (OUTPUT / "up.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield _url(process, part)
    finally:
        process.terminate()
        process.wait(60)


def _url(process: subprocess.Popen[bytes], part: str) -> str:
    """Wait until a part says where it listens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for path in (OUTPUT / "data" / "run").glob(f"{part}-*.json"):
            with contextlib.suppress(ValueError, KeyError):
                return str(json.loads(path.read_text())["url"])
        time.sleep(0.1)
    tail = (OUTPUT / "up.log").read_text(errors="replace").splitlines()[-3:]
    raise ServiceError(f"the {part} did not start: {' | '.join(tail)}")


def conversations(url: str) -> str:
    """What clients do in a day: stream, fan out, offer tools, hang up, fail. Returns the session of the first conversation."""
    client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-demo-not-a-secret", max_retries=0)
    session = "01990000-0000-7000-8000-00000000cafe"
    named = {"extra_headers": {"x-tokentape-session": session, "x-tokentape-user": "responder-7", "x-tokentape-tags": "demo,refund"}}
    history: list[Any] = [{"role": "system", "content": "You are a calm assistant of a web shop."}]
    for question in ("My order has not arrived. What happened?", "Who decided that, and when?"):
        history.append({"role": "user", "content": question})
        say(f"{GREEN}client:{OFF} {question}")
        answer = ""
        for chunk in client.chat.completions.create(
            model=MODEL, messages=history, stream=True, max_tokens=48, temperature=0.8, seed=7, **named
        ):
            piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
            answer += piece
            print(f"{DIM}{piece}{OFF}", end="", flush=True)
        print()
        history.append({"role": "assistant", "content": answer})

    say(f"{GREEN}client:{OFF} two alternatives at once (n=2)")
    texts = ["", ""]
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Write an apology."}],
        n=2,
        stream=True,
        max_tokens=24,
        temperature=1.0,
        extra_headers={"x-tokentape-tags": "demo,n2"},
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    for index, text in enumerate(texts):
        say(f"  {DIM}[{index}] {text.strip()[:90]!r}{OFF}")

    say(f"{GREEN}client:{OFF} a tool schema, answered in one piece")
    whole = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Weather in Lisbon?"}],
        tools=TOOLS,
        max_tokens=32,
        temperature=0.0,
        extra_headers={"x-tokentape-tags": "demo,tools"},
    )
    answered = whole.choices[0]
    said = answered.message.content or str(answered.message.tool_calls)
    say(f"  {DIM}{answered.finish_reason}: {said[:90]!r}{OFF}")

    say(f"{GREEN}client:{OFF} hangs up in the middle of a long answer")
    with client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me everything."}],
        stream=True,
        max_tokens=1500,
        extra_headers={"x-tokentape-tags": "demo,hangup"},
    ) as stream:
        for number, _ in enumerate(stream):
            if number == 12:
                break

    say(f"{GREEN}client:{OFF} asks for a model that does not exist")
    try:
        client.chat.completions.create(
            model="gpt-nonexistent", messages=[{"role": "user", "content": "Hello?"}], extra_headers={"x-tokentape-tags": "demo,failing"}
        )
    except openai.NotFoundError as error:
        say(f"  {DIM}{type(error).__name__}: {str(error)[:100]}{OFF}")
    return session


def debug(url: str) -> None:
    """One request is stopped, edited and let go; its client just waits for an answer."""
    heading(3, "Debug mode: a request stops at a breakpoint, is edited and let go")
    tokentape("breakpoints", "add", "demo-refunds", "--tag", "refund", "--where", 'contains(last, "refund")')
    _holds(url, "demo-refunds")
    say(f"\n{GREEN}client:{OFF} I want a refund.   {DIM}(its request stops; the client hears that it waits){OFF}")
    session = "01990000-0000-7000-8000-0000000d1b06"
    answers: list[str] = []
    client = threading.Thread(target=lambda: answers.append(_refund(url, session)), daemon=True)
    client.start()
    request = _stopped()
    tokentape("breakpoints")
    tokentape("stopped", "show", request)
    tokentape("stopped", "edit", request, "--set", "messages.-1.content=Tell me about the sea.", "--reason", "no refunds today")
    tokentape("stopped", "release", request, "--reason", "shown in the demo")
    client.join(60)
    if not answers:
        raise ServiceError("the released request was not answered")
    say(f"{GREEN}client:{OFF} got {DIM}{answers[0].strip()[:90]!r}{OFF}")
    tokentape("breakpoints", "remove", "demo-refunds")
    say("the tape has the request as submitted and as edited, and who changed it why:")
    tokentape("show", session)
    tokentape("sql", "SELECT recorded_at, actor, patch, reason FROM edits ORDER BY recorded_at")


def _holds(url: str, name: str) -> None:
    """Return when the gateway has read a breakpoint, which takes it some milliseconds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{url}/api/v1/breakpoints", timeout=10) as answer:
            if name in {known["breakpoint_id"] for known in json.load(answer)["breakpoints"]}:
                return
        time.sleep(0.02)
    raise ServiceError(f"the gateway does not know the breakpoint {name}")


def _refund(url: str, session: str) -> str:
    """What the client of the stopped request gets in the end."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-demo-not-a-secret", max_retries=0) as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "I want a refund."}],
            stream=True,
            max_tokens=24,
            temperature=0.8,
            seed=7,
            extra_headers={"x-tokentape-session": session, "x-tokentape-tags": "demo,refund"},
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def _stopped() -> str:
    """The end of the id of the request that waits, by which a person names it."""
    command = [str(TOKENTAPE), "--config", str(CONFIG), "stopped", "list", "--format", "json"]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        if lines:
            return str(json.loads(lines[0])["generation"])[-8:]
    raise ServiceError("no request stopped at the breakpoint")


def look(session: str) -> None:
    """Sessions, a timeline, time travel and SQL over the hot tier."""
    heading(4, "What is on the tape")
    tokentape("sessions")
    heading(5, "An incident timeline")
    tokentape("timeline", session)
    heading(6, "Time travel: the same session as it stood in the middle of the first answer")
    moment = ask(
        f"SELECT event_id FROM events WHERE session_id = uuid_blob('{session}') AND kind = 'token_chunk' "
        'ORDER BY "offset" LIMIT 1 OFFSET 1'
    )[0]["event_id"]
    tokentape("show", session, "--at", moment)
    heading(7, "SQL over the hot tier")
    tokentape("sql", SQL)


SQL = (
    "SELECT outcome, count(*) AS generations, sum(completion_tokens) AS tokens, round(avg(first_token_ms), 1) AS first_token_ms_avg "
    "FROM generations GROUP BY outcome ORDER BY generations DESC"
)


def custody(deployment: str, services: dict[str, dict[str, str]]) -> None:
    """Tier, the same SQL over cold, verify good, a flipped byte found."""
    heading(8, "Hot becomes cold: Parquet segments, each entered in a signed ledger")
    tokentape("tier", "--now")
    heading(9, "The same SQL, answered from the cold tier")
    tokentape("sql", SQL)
    heading(10, "Proof: everything is as it was written")
    tokentape("verify")
    heading(11, "Somebody flips one bit in a segment")
    with flipped_bit(deployment, services) as key:
        say(f"{RED}flipped one bit of {key}{OFF}")
        tokentape("verify", expect=10)
    say("the bit is put back")
    tokentape("verify")


@contextlib.contextmanager
def flipped_bit(deployment: str, services: dict[str, dict[str, str]]) -> Iterator[str]:
    """One bit of one segment is wrong while the block runs; yields the segment's key."""
    if deployment == "embedded":
        path = sorted((OUTPUT / "data" / "cold" / "events").rglob("*.parquet"))[0]
        good = path.read_bytes()
        _overwrite(path, _flip(good))
        try:
            yield str(path.relative_to(OUTPUT / "data" / "cold"))
        finally:
            _overwrite(path, good)
        return
    import io

    import minio

    from tokentape import config

    cold = config.load(file=CONFIG).cold
    client = minio.Minio(cold.endpoint, services["minio"]["access_key"], services["minio"]["secret_key"], secure=False)
    found = next(iter(client.list_objects(cold.bucket, prefix="events/", recursive=True)))
    key = str(found.object_name)
    good = client.get_object(cold.bucket, key).read()
    # The locked version cannot be changed; whoever holds the credentials can only put another one on top of it.
    wrong = client.put_object(cold.bucket, key, io.BytesIO(_flip(good)), len(good))
    try:
        yield key
    finally:
        client.remove_object(cold.bucket, key, version_id=wrong.version_id)


def _flip(good: bytes) -> bytes:
    middle = len(good) // 2
    return good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]


def _overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(0o444)


def replay(session: str, same: str, changed: str) -> None:
    """Compare replay against the same model and against a changed one."""
    heading(12, "Replay: are these tokens what this model says? The same engine")
    tokentape("replay", session, "--mode", "compare", "--engine", same)
    heading(13, "The same question to a model whose weights were changed a little")
    tokentape("replay", session, "--mode", "compare", "--engine", changed, "--loose")
    tokentape("sql", "SELECT engine, verdict, tokens, drift_max, noise_floor FROM replays ORDER BY started_at")


class ChangedModel(threading.Thread):
    """Starts a second vLLM, whose weights were perturbed, while the demo goes on.

    The thread lives until `finish`: a service that is tied to its starter ends with the thread that started it.
    """

    def __init__(self, services: Services) -> None:
        super().__init__(daemon=True)
        self._services = services
        self._ready, self._finished = threading.Event(), threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Start it and stay; what went wrong is raised by `url`."""
        try:
            self._services.up(["vllm"])
        except BaseException as error:
            self._error = error
        self._ready.set()
        self._finished.wait()

    def url(self) -> str:
        """Its address, once it answers."""
        began = time.monotonic()
        while not self._ready.wait(10):
            say(f"{DIM}the changed model is still starting … {time.monotonic() - began:.0f} s{OFF}")
        if self._error is not None:
            raise self._error
        return self._services.address("vllm")["url"]

    def finish(self) -> None:
        """Let the thread end."""
        self._finished.set()


def models() -> tuple[Path, Path]:
    """A tiny model made on the spot, and a copy with noise on its weights: a twentieth of their spread."""
    original, changed = OUTPUT / "models" / "original", OUTPUT / "models" / "changed"
    quiet = {**os.environ, "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    for arguments in ([str(original)], [str(changed), "--from", str(original), "--perturb", "0.05"]):
        subprocess.run([sys.executable, "-m", "scripts.tiny_model", *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=quiet)
    return original.resolve(), changed.resolve()


def page(session: str) -> None:
    """Serve the page, open a browser on the session, where there is one, and wait for Ctrl-C."""
    with running("api", "--set", f"api.port={PAGE_PORT}", "up", "--only", "api") as url, contextlib.suppress(KeyboardInterrupt):
        say(f"The page: {url}/#/session/{session}   (Ctrl-C ends it)")
        webbrowser.open(f"{url}/#/session/{session}")
        threading.Event().wait()


def run(deployment: str, *, show: bool = False) -> None:
    """All steps; `show` opens the page at the end."""
    began = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    with contextlib.ExitStack() as stack:
        heading(1, "A real engine: a tiny Llama made on the spot, served by vLLM on the CPU")
        original, changed = models()
        engines = [
            Services(OUTPUT / "engine", say=say, tied=True, components=[Vllm(original)]),
            Services(OUTPUT / "changed", say=lambda _: None, tied=True, components=[Vllm(changed)]),
        ]
        for services in engines:
            stack.callback(services.down)
        infrastructure = Services(OUTPUT / "services", say=say, tied=True)
        addresses: dict[str, dict[str, str]] = {}
        if deployment == "distributed":
            stack.callback(infrastructure.down)
            say("starting Apache Kafka and MinIO")
            addresses = infrastructure.up(["kafka", "minio"])
        say("starting vLLM (about two minutes on two cores) …")
        upstream = engines[0].up(["vllm"])["vllm"]["url"]
        second = ChangedModel(engines[1])
        stack.callback(second.finish)
        write_config(deployment, upstream, addresses)
        heading(2, "Clients talk to it through the gateway")
        with running("gateway", "up") as url:
            session = conversations(url)
            second.start()
            debug(url)
            look(session)
            custody(deployment, addresses)
            replay(session, upstream, second.url())
            heading(14, "How it stands")
            tokentape("status")
            tokentape("jobs", "history")
        made = sum(path.stat().st_size for path in (OUTPUT / "data").rglob("*") if path.is_file())
        say(f"\n{BOLD}done in {time.monotonic() - began:.0f} s.{OFF}")
        say(f"The tape is {OUTPUT}/data ({made / 1e6:.1f} MB): log/, hot/, cold/ and the ledger.")
        if show:
            page(session)
    if deployment == "embedded":
        say(f"Nothing runs any more, and everything still answers: {TOKENTAPE} --config {CONFIG} timeline {session}")
        served = f"{TOKENTAPE} --config {CONFIG} --set api.port={PAGE_PORT} up --only api"
        say(f"To look at it: {served}   then http://127.0.0.1:{PAGE_PORT}/#/session/{session}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 with one line when something cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", choices=("embedded", "distributed"), default="embedded")
    parser.add_argument("--open", action="store_true", help="open the page at the end, and serve it until Ctrl-C")
    given = parser.parse_args(argv)
    os.chdir(ROOT)
    try:
        run(given.deployment, show=given.open)
    except (ServiceError, subprocess.CalledProcessError) as error:
        print(f"{RED}demo: {error}{OFF}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
