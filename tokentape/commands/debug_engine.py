"""`debug-engine`: vLLM in one process, stopped where a generation begins."""

from __future__ import annotations

import importlib
import json
import pdb
import sys
from bdb import BdbQuit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from replay.engines.loading import check_version, parsed_options, start
from schemas.errors import UsageError
from schemas.settings import Settings
from tokentape import debugging
from tokentape.output import err

PORT = 5678
"""debugpy's own default."""
PROMPT = "Which request came first, and who changed it?"


@click.command("debug-engine")
@click.argument("model", required=False)
@click.option("--prompt", default=PROMPT, show_default=True, help="What to generate from.")
@click.option("--max-tokens", type=click.IntRange(1, 100_000), default=8, show_default=True, help="How many tokens.")
@click.option(
    "--debugger",
    type=click.Choice(["pdb", "debugpy", "none"]),
    default="pdb",
    show_default=True,
    help="pdb: in this terminal. debugpy: waits for an editor. none: an editor has started this.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=PORT, show_default=True, help="Where debugpy listens, on this machine only.")
@click.option("--break", "places", multiple=True, metavar="MODULE:NAME", help="pdb: stop there too, e.g. a method of vLLM's scheduler.")
@click.option("--engine-option", "options", multiple=True, metavar="NAME=VALUE", help="An engine argument, e.g. dtype=float32.")
@click.option("--log", type=click.Path(path_type=Path, dir_okay=False), help="Where vLLM logs to.  [default: DATA/debug/vllm.log]")
@click.option("--launch-json", is_flag=True, help="Print launch configurations for VS Code and end.")
@click.pass_obj
def debug_engine(
    settings: Settings,
    model: str | None,
    prompt: str,
    max_tokens: int,
    debugger: str,
    port: int,
    places: tuple[str, ...],
    options: tuple[str, ...],
    log: Path | None,
    launch_json: bool,
) -> None:
    """Step through a generation of MODEL, a folder: scheduler, worker and sampler in this one process.

    The engine has no graphs, no second process, no time-out that a pause would hit, and logs to a file without a lock, since a thread that
    a debugger stops while it logs would block all others. A recorded run is stepped through by `replay-batch --exact --debug`.
    """
    if launch_json:
        click.echo(json.dumps(debugging.launch_json(port), indent=2))
        return
    if model is None:
        raise UsageError("no model", operation="debug-engine", hint="name the folder that holds config.json")
    if places and debugger != "pdb":
        raise UsageError(f"--break is for pdb, --debugger is {debugger}", operation="debug-engine", hint="set it in the editor")
    target = log or settings.data / "debug" / "vllm.log"
    debugging.prepare(target)
    stops = [_place(place) for place in places]
    enter = _debugger(debugger, port)
    check_version()
    err.print(f"[dim]starting vLLM in this process; it logs to {target}[/dim]")
    llm, _ = start(model, {**debugging.OPTIONS, **parsed_options(options)})
    try:
        click.echo(_generate(llm, prompt, max_tokens, enter(stops)))
    except BdbQuit:
        err.print("[dim]left the debugger[/dim]")


def _generate(llm: Any, prompt: str, max_tokens: int, stop: Callable[[], None]) -> str:
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=max_tokens, temperature=0)
    stop()
    outputs = llm.generate([prompt], parameters, use_tqdm=False)  # step in: here the generation begins
    return str(outputs[0].outputs[0].text)


def _debugger(name: str, port: int) -> Callable[[list[tuple[str, int]]], Callable[[], None]]:
    """How to stop: a function of places to stop at further on, which gives the function that stops.

    Raises:
        UsageError: the debugger is not installed, or its port is taken.
    """
    if name == "none":
        return lambda _: lambda: None
    if name == "pdb":
        return _pdb
    try:
        debugpy = importlib.import_module("debugpy")
    except ImportError as error:
        raise UsageError("debugpy is not installed", operation="debug-engine", hint="pip install debugpy, or --debugger pdb") from error
    try:
        debugpy.listen(("127.0.0.1", port))
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"debugpy cannot listen: {error}", operation="debug-engine", place=f"port {port}", hint="--port another"
        ) from error

    def waiting(_: list[tuple[str, int]]) -> Callable[[], None]:
        err.print(f"[dim]waiting for an editor on 127.0.0.1:{port}[/dim]")
        debugpy.wait_for_client()
        stop: Callable[[], None] = debugpy.breakpoint
        return stop

    return waiting


def _pdb(places: list[tuple[str, int]]) -> Callable[[], None]:
    debugger = pdb.Pdb()
    for file, line in places:
        debugger.set_break(file, line)
    if not sys.stdin.isatty():
        debugger.prompt = "(Pdb) \n"
    return lambda: debugger.set_trace(sys._getframe(1))


def _place(place: str) -> tuple[str, int]:
    """File and first line of a function, found in its source: importing a module of vLLM may start half of it.

    Raises:
        UsageError: there is none.
    """
    import ast
    import importlib.util

    module, colon, path = place.partition(":")
    if not colon:
        hint = "MODULE:NAME, e.g. vllm.v1.core.sched.scheduler:Scheduler.schedule"
        raise UsageError(f"{place!r} is no place", operation="debug-engine", place="--break", hint=hint)
    try:
        found = importlib.util.find_spec(module)
    except ImportError:
        found = None
    if found is None or found.origin is None:
        raise UsageError(f"no module {module}", operation="debug-engine", place=place, hint="it has to be importable here")
    nodes: list[ast.stmt] = ast.parse(Path(found.origin).read_text(encoding="utf-8")).body
    node: ast.stmt | None = None
    for name in path.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
        node = next((each for each in nodes if isinstance(each, kinds) and each.name == name), None)
        if node is None:
            raise UsageError(f"{module} defines no {path}", operation="debug-engine", place=place, hint="a function, or CLASS.METHOD")
        nodes = node.body
    assert node is not None
    body = nodes[1] if len(nodes) > 1 and isinstance(nodes[0], ast.Expr) else nodes[0]  # past the docstring: a line that runs
    return found.origin, body.lineno


COMMANDS = [debug_engine]
