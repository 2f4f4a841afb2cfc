"""An engine core in this process, built as the recorded one was and driven through its calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unittest import mock

from replay.engines.loading import check_model
from replay.exact.run import Request, Run
from replay.exact.scheduler import replaying
from replay.exact.script import Script, decisions
from schemas.enginerun import facts, versions
from schemas.errors import ConflictError, EngineUnavailable, UsageError

_OPERATION = "exact replay"
_MODEL, _WEIGHTS = "config.model_config.model", "config.model_config.weights"
_SEEDED_CHUNK = "CPU Generator does not use offset"


class ExactEngine:
    """The engine of one replay. A context: its workers end with it."""

    def __init__(
        self, run: Run, script: Script, *, model: str | None = None, changed: dict[str, Any] | None = None, forced: bool = False
    ) -> None:
        """Raises `EngineUnavailable` when vLLM cannot be built, `UsageError` for a version that is not supported."""
        vllm = _vllm()
        self.version: str = vllm.__version__
        self._run, self._script = run, script
        arguments = {**run.arguments, **({"model": model, "tokenizer": model} if model else {}), **(changed or {})}
        self.model = arguments["model"]
        try:
            self.config = _config(arguments, changed or {})
            chosen = self.config.scheduler_config.get_scheduler_cls()
            base = next(c for c in chosen.__mro__ if c.__module__.startswith("vllm."))
            self._core = _core(self.config, replaying(base, script, self._request, forced=forced))
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EngineUnavailable(f"the engine cannot be built: {first}", operation=_OPERATION, place=str(self.model)) from error

    def __enter__(self) -> ExactEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._core.shutdown()

    def facts(self) -> dict[str, Any]:
        """What this engine is built of, under the keys of the tape."""
        workers = self._core.model_executor.collective_rpc(facts.worker_facts)
        found = facts.facts_of(self.config, version=self.version, workers=workers)
        found[_WEIGHTS] = facts.weights_digest(Path(self.model))
        return found

    def outputs(self) -> Iterator[tuple[int, str, list[int], list[float]]]:
        """Step by step: the step, the request's name, its new tokens and their logprobs (none if not asked for).

        Raises:
            Diverged: the engine decides otherwise than recorded.
            EngineUnavailable: it fails.
        """
        while not self._script.over:
            try:
                outputs, executed = self._core.step_fn()
                self._core.post_step(executed)
            except RuntimeError as error:
                raise _failed(error) from error
            for part in (outputs or {}).values():
                for output in part.outputs:
                    scores = output.new_logprobs
                    logprobs = scores.logprobs[:, 0].tolist() if scores is not None else []
                    yield self._script.step, output.request_id, output.new_token_ids, logprobs

    def _request(self, request: Request) -> Any:
        """The recorded request as the engine core takes it."""
        import msgspec
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        document = request.document
        made = EngineCoreRequest(
            request_id=document["request_id"],
            prompt_token_ids=list(request.prompt),
            mm_features=None,
            sampling_params=msgspec.convert(request.parameters, SamplingParams, strict=False, str_keys=True),
            pooling_params=None,
            arrival_time=document["arrival_time"],
            lora_request=None,
            cache_salt=document["cache_salt"],
            data_parallel_rank=None,
            priority=document["priority"],
        )
        return self._core.preprocess_add_request(made)[0]


def check(run: Run, *, forced: bool, model: str | None = None) -> None:
    """Say what keeps a run from being replayed before anything is built.

    Raises:
        ConflictError: it has what cannot be done again.
        UsageError: no model lies where it is to be loaded from.
    """
    if run.hindrances:
        raise ConflictError(
            f"this run cannot be replayed exactly: {'; '.join(run.hindrances)}", operation=_OPERATION, hint="`tokentape replay` compares it"
        )
    by_content = run.facts.get(_WEIGHTS) is not None  # so it was a folder, whatever its name looks like
    if lies_at := model or run.arguments.get("model"):
        check_model(lies_at, operation=_OPERATION, hub=not by_content, hint="--model FOLDER says where it is")
    on_cpu = str(run.facts.get("config.device_config.device")) == "cpu"
    chunked = run.facts.get("config.scheduler_config.enable_chunked_prefill")
    if on_cpu and chunked and (cut := _cut_while_seeded(run)) is not None:
        raise ConflictError(
            f"request {cut} has a seed and its prompt is computed in parts, at which vLLM on a CPU ends ({_SEEDED_CHUNK})",
            operation=_OPERATION,
            hint="record with enable_chunked_prefill=False, or without seeds",
        )


def check_room(script: Script, changed: dict[str, Any]) -> None:
    """An engine has room for as much as its arguments say: decisions that need more cannot be imposed on it.

    Raises:
        ConflictError: these arguments leave too little, and are named.
    """
    steps = script.run.steps[script.first_step :]
    live = [request for number, request in script.run.requests.items() if number >= script.first_request]
    needed = {
        "max_num_seqs": (max(len(step.rows) for step in steps), "sequences in one step"),
        "max_num_batched_tokens": (max(sum(step.rows.values()) for step in steps), "tokens in one step"),
        "max_model_len": (max((len(r.prompt) + len(_said(script.run, r)) for r in live), default=0), "tokens in one sequence"),
    }
    for name, (least, what) in needed.items():
        given = changed.get(name)
        if isinstance(given, int) and given < least:
            fault = f"{name}={given} is too little: the recorded engine had {least:,} {what}, which cannot be imposed on that"
            raise ConflictError(fault, operation=_OPERATION, hint=f"--engine-arg {name}={least} at the least")


def _said(run: Run, request: Request) -> Sequence[int]:
    said = run.said.get(request.place)
    return said.token_ids if said is not None else ()


def _cut_while_seeded(run: Run) -> int | None:
    """The first seeded request of which a step computed only a part of the prompt."""
    left = {number: len(request.prompt) for number, request in run.requests.items() if request.parameters.get("seed") is not None}
    for decided in decisions(run):
        for number, tokens in decided.rows.items():
            if left.get(number, 0) > tokens > 1 and number not in decided.cached:
                return number
            left.pop(number, None)
    return None


def refuse_differences(run: Run, present: dict[str, Any], *, forced: bool) -> list[tuple[str, Any, Any]]:
    """What is another than recorded: key, recorded, present. In forced mode the schedule's own parts may be.

    Raises:
        ConflictError: what would move the numbers is.
    """
    same = {_MODEL} if run.facts.get(_WEIGHTS) is not None and run.facts[_WEIGHTS] == present.get(_WEIGHTS) else set()  # wherever it lies
    keys = sorted(run.facts.keys() - same)
    found = [(key, run.facts[key], present.get(key)) for key in keys if run.facts[key] != present.get(key)]
    mine = [each for each in found if not (forced and each[0].startswith(("config.cache_config.", "config.scheduler_config.")))]
    if mine:
        said = "; ".join(f"{key.removeprefix('config.')}: recorded {before}, now {after}" for key, before, after in mine)
        hint = "build the engine as it was, or give another schedule with --forced --engine-arg"
        raise ConflictError(f"the engine is not the recorded one: {said}", operation=_OPERATION, hint=hint)
    return found


def _failed(error: RuntimeError) -> Exception:
    if _SEEDED_CHUNK in str(error):
        why = "vLLM on a CPU cannot compute a seeded request's prompt in parts"
        return EngineUnavailable(why, operation=_OPERATION, hint="record with enable_chunked_prefill=False")
    return EngineUnavailable((str(error).splitlines() or [repr(error)])[0], operation=_OPERATION)


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        hint = "pip install 'tokentape[vllm]'"
        raise UsageError("exact replay needs vLLM in this environment", operation=_OPERATION, hint=hint) from error
    versions.check(vllm.__version__, operation=_OPERATION)
    return vllm


def _config(arguments: dict[str, Any], changed: dict[str, Any]) -> Any:
    """A configuration. Of what was recorded another version may not know all, which the facts tell; what is asked for now it must know."""
    from vllm.engine.arg_utils import EngineArgs

    known = EngineArgs.__dataclass_fields__
    if unknown := sorted(changed.keys() - known.keys()):
        hint = ", ".join(get_close_matches(unknown[0], known)) or "vLLM's own names, such as max_num_seqs=16"
        raise UsageError(f"vLLM has no engine argument {', '.join(unknown)}", operation=_OPERATION, hint=hint)
    return EngineArgs(**{name: value for name, value in arguments.items() if name in known}).create_engine_config()


def _core(config: Any, scheduler: type) -> Any:
    """An engine core with this scheduler, which is made for one replay: a configuration that held it could not be sent to workers."""
    from vllm.config import SchedulerConfig
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor

    with mock.patch.object(SchedulerConfig, "get_scheduler_cls", return_value=scheduler):
        return EngineCore(config, Executor.get_class(config), log_stats=False)
