"""vLLM in this process: recorded tokens are decoded again by trace replay where the runner has it, and scored as a prompt elsewhere.

Trace replay (vLLM 0.32, V2 runner) uses the kernels that first said the tokens. It takes no sequence that fills the context,
and no CPU has it; scoring takes everything that fits. Either way one sequence is one request, so n > 1, structured output,
stop words and penalties need no support: what was said is forced, however it came to be chosen.

On a CPU chunked prefill is off and the token budget holds the longest prompt, since vLLM ends there when the prompt of a
seeded request is split.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from replay.engines.base import Alternatives, Forced, Generated, Refused, Request, Scored, Spoken
from replay.engines.loading import ALTERNATIVES_MAX, check_version, said, start
from replay.sampling import effective
from schemas.errors import EngineUnavailable, UsageError
from schemas.events import EnvironmentCaptured
from schemas.probe import PROBE_MESSAGES, PROBE_TEXT, probed, sampling_defaults
from schemas.requests.recorded import SHAPING, as_generation, media_of
from store.digests import FileDigests
from store.fingerprint import environment_of, worker_facts

T = TypeVar("T")

PASSED_ON = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop", "stop_token_ids", "ignore_eos", "bad_words",
)  # fmt: skip
"""Fields of a request that are vLLM's own sampling parameters by the same name."""
NOT_FREE = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "logit_bias")
"""Fields that a free generation in this process does not carry out; forcing does not need them."""


GROUP_SHARE, GROUP_STEPS = 8, 16
"""Where tokens are decoded, places that became free are filled together: an eighth of all, or what there are after so many steps. A step
that takes a prompt in as well cannot be one graph of CUDA's: filled one by one, they took 45 s for what took 31 s in groups of a
twentieth (1B model, 512 places, H200)."""


class _Asked(NamedTuple):
    """A sequence as vLLM is asked for it, and what takes the numbers out of the answer; the scores are then made of them."""

    text: Sequence[int]
    parameters: Any
    read: Callable[[Any], Callable[[], Scored]]


class VllmEngine:
    """A model in a folder (or of a hub), loaded into this process. `options` are vLLM's engine arguments, such as `dtype`.

    Raises:
        UsageError: vLLM is not installed, of an unsupported version, or takes no such model or option.
    """

    def __init__(self, model: str, *, options: dict[str, Any] | None = None, digests: Path | None = None) -> None:
        """`digests` is where the digests of the weights are kept, so that they are read once."""
        self._model = model
        self._digests = FileDigests(digests)
        self._fault: str | None = None
        check_version()
        self._llm, self._tracing = start(model, options or {})
        config, scheduling = self._llm.llm_engine.vllm_config.model_config, self._llm.llm_engine.vllm_config.scheduler_config
        self._places: int = scheduling.max_num_seqs
        self._group = self._places // GROUP_SHARE if self._tracing else 0  # 0: vLLM takes in what there is
        self._names = count()
        self._held: deque[tuple[str, _Asked]] = deque()
        self._held_steps = 0
        self._begun: dict[str, Callable[[Any], Callable[[], Scored]]] = {}
        self._set = sampling_defaults(config.get_diff_sampling_param())  # what `vllm serve` puts in for what a request does not name
        self._vocabulary: int = config.get_vocab_size()
        self.context: int = config.max_model_len

    @property
    def name(self) -> str:
        """`vllm` and the model."""
        return f"vllm {self._model}"

    def fingerprint(self, recorded: EnvironmentCaptured | None = None) -> EnvironmentCaptured:
        """The environment, weights by content, and the same probes as are asked over HTTP.

        Raises:
            EngineUnavailable: the engine has failed.
        """
        facts = self._do(lambda: self._llm.collective_rpc(worker_facts)[0])
        tokenizer = self._llm.get_tokenizer()
        text = list(tokenizer.encode(PROBE_TEXT))
        chat = self.render(Request(None, {"messages": PROBE_MESSAGES}))
        asked = self._scoring(text[:1], text[1:], 1, others=True)
        scores = asked.read(self._run([asked.text], [asked.parameters])[0])()
        choices = [int(_likeliest(each)) for each in scores.alternatives if each is not None]
        items = probed(text, None if isinstance(chat, Refused) else list(chat), (choices, [x or 0.0 for x in scores.logprobs]), recorded)
        if template := getattr(tokenizer, "chat_template", None):
            items["chat_template.sha256"] = _sha256(template if isinstance(template, str) else json.dumps(template, sort_keys=True))
        return environment_of(self._llm.llm_engine.vllm_config, facts, self._digests, items)

    def render(self, request: Request) -> tuple[int, ...] | Refused:
        """The prompt's ids by the model's own template, or of a text as it stands."""
        try:
            document, tokenizer = as_generation(request.endpoint, request.document), self._llm.get_tokenizer()
        except UsageError as error:
            return Refused(str(error.fault))
        prompt, messages = document.get("prompt"), document.get("messages")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return tuple(prompt)
        if isinstance(prompt, str):
            try:
                return tuple(tokenizer.encode(prompt, add_special_tokens=document.get("add_special_tokens") is not False))
            except Exception as error:  # tokenizers are programs of the model's author
                return Refused(f"the tokenizer does not take this prompt: {said(error)}")
        if not isinstance(messages, list) or not messages:
            return Refused("the request has neither messages nor a prompt")
        if strange := _not_rendered(document):
            return Refused(f"prompts with {strange} are not rendered in this process")
        try:
            return self._rendered(document)
        except Exception as error:  # templates are programs of the model's author
            return Refused(f"the chat template does not take these messages: {said(error)}")

    def _rendered(self, document: dict[str, Any]) -> tuple[int, ...]:
        """The ids that vLLM's server makes of these messages, by its own code, which is the same in each supported version."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        config = self._llm.llm_engine.vllm_config.model_config
        fields = {name: document[name] for name in SHAPING if document.get(name) is not None}
        asked = ChatCompletionRequest.model_validate(copy.deepcopy(fields))  # it changes what it is given
        tools = [tool.model_dump() for tool in asked.tools] if asked.tools else None
        ids_at_once = getattr(type(self._llm.get_tokenizer()), "IS_MISTRAL_TOKENIZER", False) or config.enable_prompt_embeds
        told = asked.build_chat_params(None, "auto").with_defaults({"tools": tools, "tokenize": ids_at_once})
        length = asked.build_tok_params(config)
        if length.truncate_prompt_tokens is None:
            length = replace(length, max_total_tokens=None)  # whether it fits is for who sends it to say
        _, (prompt,) = self._llm.renderer.render_chat([asked.messages], told, length)
        return tuple(prompt["prompt_token_ids"])

    def render_all(self, requests: Sequence[Request]) -> list[tuple[int, ...] | Refused]:
        """As `render`, for several."""
        return [self.render(request) for request in requests]

    def generate(self, request: Request) -> Generated | Refused:
        """The answer to a request, generated freely.

        Raises:
            EngineUnavailable: the engine has failed.
        """
        return self.generate_all([request])[0]

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """Answers to several requests, worked on in one batch.

        Raises:
            EngineUnavailable: the engine has failed.
        """
        prepared = [self._prepared(request) for request in requests]
        ready = [each for each in prepared if not isinstance(each, Refused)]
        outputs = iter(self._run([prompt for prompt, _ in ready], [parameters for _, parameters in ready]) if ready else [])
        return [each if isinstance(each, Refused) else _generated(next(outputs)) for each in prepared]

    def _prepared(self, request: Request) -> tuple[tuple[int, ...], Any] | Refused:
        prompt = self.render(request)
        if isinstance(prompt, Refused):
            return prompt
        document = as_generation(request.endpoint, request.document)
        if found := [name for name in NOT_FREE if document.get(name)]:
            return Refused(f"free generation in this process does not carry out {found[0]}")
        fields = {name: value for name, value in effective(document, self._set).items() if name in PASSED_ON}
        fields.setdefault("max_tokens", document.get("max_completion_tokens") or self.context - len(prompt))
        try:
            return self._allowed(prompt, fields["max_tokens"]) or (prompt, _parameters(**fields, logprobs=0, detokenize=True))
        except (ValueError, TypeError) as error:
            return Refused(f"it takes no such request: {said(error)}")

    def force(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        """Logprob, rank and top logprob of each token, by trace replay or scoring.

        Raises:
            EngineUnavailable: the engine has failed.
        """
        return self.force_all([Forced(request, prompt_token_ids, token_ids)])[0]

    def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
        """As `force`, in one batch.

        Raises:
            EngineUnavailable: the engine has failed.
        """
        asked = [self._asked(each) for each in several]
        ready = [each for each in asked if not isinstance(each, Refused)]
        outputs = iter(self._run([each.text for each in ready], [each.parameters for each in ready]) if ready else [])
        return [each if isinstance(each, Refused) else each.read(next(outputs))() for each in asked]

    def begin(self, forced: Forced) -> str | Refused:
        """See `Continuous.begin`. Until `step` has told the end of all that was begun, nothing but `render` may be asked.

        Raises:
            EngineUnavailable: the engine has failed.
        """
        asked = self._asked(forced)
        if isinstance(asked, Refused):
            return asked
        name = f"forced-{next(self._names)}"
        self._do(lambda: self._held.append((name, asked)))
        return name

    def step(self) -> list[tuple[Hashable, Callable[[], Scored]]]:
        """See `Continuous.step`.

        Raises:
            EngineUnavailable: the engine has failed.
        """
        ready = min(self._places - len(self._begun), len(self._held)) if self._group else len(self._held)
        if ready >= self._group or self._held_steps >= GROUP_STEPS or not self._begun:
            self._do(lambda: self._take_in(ready))
            self._held_steps = 0
        elif ready:
            self._held_steps += 1
        ended = [output for output in self._do(self._llm.llm_engine.step) if output.finished]
        return [(output.request_id, self._begun.pop(output.request_id)(output)) for output in ended]

    def _take_in(self, count: int) -> None:
        from vllm.sampling_params import RequestOutputKind

        for _ in range(count):
            name, asked = self._held.popleft()
            asked.parameters.output_kind = RequestOutputKind.FINAL_ONLY
            self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(asked.text)}, asked.parameters)
            self._begun[name] = asked.read

    def _asked(self, forced: Forced) -> _Asked | Refused:
        """How vLLM is made to say a sequence: decoded one by one, as when it was first said, or scored as a prompt."""
        prompt, ids, likeliest = forced.prompt_token_ids, forced.token_ids, self._likeliest(forced.request)
        others = forced.request.alternatives > 0
        if refused := self._allowed((*prompt, *ids), 0):
            return refused
        if not (self._tracing and prompt and len(prompt) + len(ids) <= self.context):
            return self._scoring(prompt, ids, likeliest, others=others)
        parameters = _parameters(max_tokens=len(ids), temperature=0, logprobs=likeliest, trace_decode_token_ids=list(ids))
        score = partial(_scored, ids=ids, how="decoding", others=others, whole=likeliest >= self._vocabulary)
        return _Asked(prompt, parameters, lambda output: partial(score, _told(output.outputs[0].logprobs, 0)))

    def _scoring(self, prompt: Sequence[int], ids: Sequence[int], likeliest: int, *, others: bool) -> _Asked:
        """A sequence that fills the context is scored without its last token, as one must be left to sample."""
        full = len(prompt) + len(ids) >= self.context
        scored, whole = ids[:-1] if full else ids, likeliest >= self._vocabulary
        score = partial(_scored, ids=scored, how="scoring", others=others, whole=whole, last_unknown=full)
        parameters = _parameters(max_tokens=1, temperature=0, prompt_logprobs=likeliest)
        return _Asked((*prompt, *scored), parameters, lambda output: partial(score, _told(output.prompt_logprobs, len(prompt))))

    def _likeliest(self, request: Request) -> int:
        return max(1, min(request.alternatives, ALTERNATIVES_MAX, self._vocabulary))

    def _allowed(self, ids: Sequence[int], more: int) -> Refused | None:
        """Why these ids cannot go in, if they cannot."""
        strange = next((token for token in ids if not 0 <= token < self._vocabulary), None)
        if strange is not None:
            return Refused(f"token id {strange} is out of vocabulary (0 to {self._vocabulary - 1}): another tokenizer or model recorded it")
        if not ids or len(ids) + more > self.context:
            return Refused(f"{len(ids) + more} tokens do not fit into the engine's context of {self.context}: raise max_model_len")
        return None

    def _run(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs: list[Any] = self._do(lambda: self._llm.generate(inputs, list(parameters), use_tqdm=False))
        return outputs

    def _do(self, work: Any) -> Any:
        """What the engine answers; once it has failed it is not asked again.

        Raises:
            EngineUnavailable: it fails, or has failed.
        """
        if self._llm is None or self._fault:
            raise EngineUnavailable(self._fault or "it is closed", operation="ask engine", place=self.name, hint="start it again")
        try:
            return work()
        except Exception as error:
            self._fault = f"the engine failed: {said(error)}"
            hint = "its log says more; what was compared before stands"
            raise EngineUnavailable(self._fault, operation="ask engine", place=self.name, hint=hint) from error

    def close(self) -> None:
        """End the engine and let go of its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None


def _parameters(**fields: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"detokenize": False, **fields}, flat_logprobs=True)


def _not_rendered(document: dict[str, Any]) -> str | None:
    """What of a chat's prompt is not rendered here: a template of the request's own, which a server takes only if told to, and media."""
    given = document.get("chat_template_kwargs")
    if isinstance(given, dict) and given.get("chat_template") is not None:
        return "a chat_template of their own"
    found = [name for name in ("chat_template", "mm_processor_kwargs", "media_io_kwargs") if document.get(name) is not None]
    return next(iter([*found, *media_of(document)]), None)


class _Told(NamedTuple):
    """vLLM's flat logprobs of some places as arrays: where each place begins and ends in the others; rank 0 is none."""

    begins: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]


def _told(found: Any, start: int) -> _Told:
    """Those from the place `start` on."""
    begins, ends = np.array(found.start_indices[start:], np.int32), np.array(found.end_indices[start:], np.int32)
    first = int(begins[0]) if len(begins) else 0
    ranks = [rank or 0 for rank in found.ranks[first:]]
    numbers = np.array(found.token_ids[first:], np.int64), np.array(found.logprobs[first:], np.float32), np.array(ranks, np.int32)
    return _Told(begins - first, ends - first, *numbers)


def _scored(told: _Told, ids: Sequence[int], how: str, *, others: bool, whole: bool = False, last_unknown: bool = False) -> Scored:
    """The scores of `ids`, one a place; of a text's very first token vLLM tells none. `others` asks for the alternatives as well."""
    begins, ends = told.begins[: len(ids)], told.ends[: len(ids)]
    there = np.flatnonzero(begins < ends)
    own, lasts = begins[there], ends[there]
    # vLLM tells the forced token first, wherever it ranks; nothing rests on that.
    wanted = np.array(ids, np.int64)[there]
    for i in np.flatnonzero(told.token_ids[own] != wanted).tolist():
        own[i] += np.flatnonzero(told.token_ids[own[i] : lasts[i]] == wanted[i])[0]
    tops = np.maximum.reduceat(told.logprobs[: lasts[-1]], begins[there]) if len(there) else own
    places = there.tolist() if len(there) < len(ids) else None

    def spread(values: list[T]) -> tuple[T | None, ...]:
        return tuple(values) if places is None else _spread(values, places, len(ids))

    ranks = [rank or None for rank in told.ranks[own].tolist()]
    alternatives: tuple[Alternatives | None, ...] = ()
    if others:
        bounds = zip(begins[there].tolist(), lasts.tolist(), strict=True)
        alternatives = spread([Alternatives(told.token_ids[begin:end], told.logprobs[begin:end], whole) for begin, end in bounds])
    scored = Scored(spread(told.logprobs[own].tolist()), spread(ranks), spread(tops.tolist()), alternatives, how)
    return scored.with_last_unknown() if last_unknown else scored


def _spread(values: Sequence[T], places: Sequence[int], count: int) -> tuple[T | None, ...]:
    """Values at their places, None at all others of `count`."""
    found: list[T | None] = [None] * count
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return tuple(found)


def _generated(output: Any) -> Generated:
    return Generated(tuple(map(_spoken, output.outputs)), tuple(output.prompt_token_ids))


def _spoken(each: Any) -> Spoken:
    told, begins = each.logprobs, each.logprobs.start_indices
    pieces = tuple(told.decoded_tokens[b] or "" for b in begins)
    spelled = pieces if "".join(pieces) == each.text else ()
    logprobs = tuple(told.logprobs[b] for b in begins)
    return Spoken(each.index, each.text, tuple(each.token_ids), logprobs, each.finish_reason, spelled)


def _likeliest(place: Alternatives) -> np.int64:
    """The likeliest token, of a tie the one with the smallest id."""
    smallest: np.int64 = place.token_ids[place.logprobs == place.logprobs.max()].min()
    return smallest


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
