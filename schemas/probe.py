"""Which questions tell the environment behind an OpenAI-compatible server, and how its answers are read. No I/O: a generator
yields questions and is sent answers, so that the gateway (asyncio) and the replay engines (whatever client) ask the same.

vLLM tells its version, models, cache layout and, in dev mode, its whole configuration. Tokenizer, chat template and
weights are not told; fixed inputs probe them: the ids of a text, the ids of a conversation, and the scores that the model
gives a fixed prompt. An upstream of another kind is only asked for its models: a probe there would cost its owner money.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple

from schemas.environment import capture
from schemas.events import EnvironmentCaptured
from schemas.requests import dump, load

ORIGIN = "http"

PROBE_TEXT = "The quick brown fox, 12345 times: naïve façade, 東京 — \U0001f98a\n\tdef f(x): return x**2  # <|end|>"
"""Letters, digits, accents, CJK, an emoji, code and a special-looking token: tokenizers differ on at least one of them."""

PROBE_MESSAGES = [
    {"role": "system", "content": "You are a probe."},
    {"role": "user", "content": "Say: naïve 東京."},
    {"role": "assistant", "content": "naïve 東京."},
    {"role": "user", "content": "Again?"},
]
"""Each role once and a second turn: templates differ in roles, separators and what they add."""

DRIFT_NATS = 0.25
"""Two probes of one model differ by less than this with the composition of batches; the first capture then stands."""

DEFAULTS = "sampling.defaults"
"""The item that says which sampling parameters a server puts in for requests that name none: vLLM takes them from the model's
`generation_config.json`. Only values that choose other tokens than plain sampling stand in it."""
_PLAIN: dict[str, tuple[float, ...]] = {
    "repetition_penalty": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "temperature": (1,), "top_k": (0, -1), "top_p": (1,),
    "min_p": (0,),
}  # fmt: skip

_LOGPROB_DIGITS = 3  # keeps rounding noise of 32-bit kernels out of the digest

_SECRET = re.compile(r"key|token(?!izer|s$|s_|_ids?$)|secret|passw|auth|credential", re.IGNORECASE)

_UNKNOWN_OPENAI = ("version", "tokenizer", "chat_template", "weights", "dtype", "quantization", "hardware", "configuration", "sampling")
_UNKNOWN_VLLM = ("weights",)
_UNKNOWN_WITHOUT_CONFIG = ("dtype", "quantization", "hardware", "configuration", "libraries", "attention_backend", "model_runner")


class Ask(NamedTuple):
    """One question: a path below the server's base URL; `body` is JSON to POST, None for a GET."""

    path: str
    body: bytes | None = None


Answer = bytes | None
"""The body of a 200 answer, None for any other answer or none in time."""

Questions = Generator[Ask, Answer, EnvironmentCaptured]

VERSION = Ask("/version")
"""The question whose answer tells vLLM from others; it needs no credential."""


INSTANCE = Ask("/metrics")
"""The question whose answer tells one start of vLLM from the next; it needs no credential."""

_STARTED = re.compile(rb"^process_start_time_seconds (\S+)", re.MULTILINE)


def instance_of(answer: Answer) -> bytes | None:
    """Which start of a server answered `INSTANCE`; None where it does not tell, as several processes behind one port do not."""
    found = _STARTED.search(answer or b"")
    return found[1] if found else None


def kind_of(answer: Answer) -> str:
    """`vllm` if the answer to `VERSION` is one that vLLM gives, else `openai`."""
    version = _json(answer)
    return "vllm" if isinstance(version, dict) and isinstance(version.get("version"), str) else "openai"


def questions(kind: str | None = None, *, previous: EnvironmentCaptured | None = None) -> Questions:
    """Ask for the environment: send each answer back in, the generator returns the event.

    `kind` is `vllm`, `openai`, `anthropic` or `gemini`, None to find out; `previous` is an earlier capture of the same server, whose scores
    stand as long as the new ones differ by no more than noise.
    """
    version = None
    if kind in (None, "vllm"):
        version = yield VERSION
        kind = kind or kind_of(version)
    items: dict[str, Any] = {"kind": kind}
    models = _models(_json((yield Ask("/v1beta/models" if kind == "gemini" else "/v1/models"))), items)
    if kind != "vllm":
        return _event(items, {*_UNKNOWN_OPENAI} | (set() if models else {"models"}))
    unknown = {*_UNKNOWN_VLLM} | _version(version, items)
    unknown |= _cache((yield INSTANCE), items)
    unknown |= _server_info((yield Ask("/server_info?config_format=json")), items)
    _tokenizer_info((yield Ask("/tokenizer_info")), items)
    if not models:
        return _event(items, unknown | {"models", "tokenizer", "chat_template", "probe", "sampling"})
    model = _base_model(models)
    unknown |= _sampling((yield Ask("/v1/completions/render", dump({"model": model, "prompt": PROBE_TEXT}))), items)
    for name, body in (("tokenizer", {"prompt": PROBE_TEXT}), ("chat_template", {"messages": PROBE_MESSAGES})):
        unknown |= _tokens(name, (yield Ask("/tokenize", dump({"model": model, **body}))), items)
    unknown |= _score((yield Ask("/v1/completions", dump({"model": model, **_SCORING}))), items, previous)
    return _event(items, unknown)


def _event(items: Mapping[str, Any], unknown: set[str]) -> EnvironmentCaptured:
    return capture([(key, dump(value, sort_keys=True).decode()) for key, value in items.items()], origin=ORIGIN, unknown=unknown)


def item(event: EnvironmentCaptured, key: str) -> Any:
    """The value of one item, None if it is not there."""
    return next((load(pair.value.encode()) for pair in event.items if pair.key == key), None)


def _json(body: bytes | None) -> Any:
    try:
        return None if body is None else load(body)
    except ValueError:
        return None


def _models(answer: Any, items: dict[str, Any]) -> list[dict[str, Any]]:
    """What is served and from where, ordered by name; how long a text each takes stands apart, it is no part of a model."""
    listed = answer.get("data", answer.get("models")) if isinstance(answer, dict) else None
    found = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    found = [{"id": str(entry.get("name")).removeprefix("models/"), **entry} for entry in found]  # Google's have a name
    entries = sorted(found, key=lambda entry: str(entry.get("id")))
    models = [{name: entry[name] for name in ("id", "root", "parent", "owned_by") if name in entry} for entry in entries]
    if models:
        items["models"] = models
        items["limits.max_model_len"] = {str(entry.get("id")): entry.get("max_model_len") for entry in entries}
    return models


def _base_model(models: list[dict[str, Any]]) -> str:
    """A model that is no adapter on top of another."""
    return str(next((model for model in models if not model.get("parent")), models[0]).get("id"))


def _version(answer: Answer, items: dict[str, Any]) -> set[str]:
    version = _json(answer)
    if not isinstance(version, dict):
        return {"version"}
    items["version"] = version.get("version")
    return set()


_SAMPLE = re.compile(r"^vllm:cache_config_info\{(.*)\}\s", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def _cache(answer: Answer, items: dict[str, Any]) -> set[str]:
    """The labels of the metric that describes the KV cache; the first engine stands for all."""
    text = (answer or b"").decode(errors="replace")
    sample = _SAMPLE.search(text)
    if not sample:
        return {"cache"}
    items.update({f"cache.{name}": value for name, value in _LABEL.findall(sample[1]) if name != "engine"})
    return set()


def _server_info(answer: Answer, items: dict[str, Any]) -> set[str]:
    """The configuration, told in dev mode only, flattened to `config.SECTION.FIELD`."""
    info = _json(answer)
    if not isinstance(info, dict):
        return {*_UNKNOWN_WITHOUT_CONFIG}
    items.update(flat("config", info.get("vllm_config"), 2))
    for section in ("vllm_env", "system_env"):
        items.update(flat(section, info.get(section), 1))
    if isinstance(lines := items.get("system_env.env_vars"), str):
        items["system_env.env_vars"] = "".join(line for line in lines.splitlines(keepends=True) if not is_secret(line.partition("=")[0]))
    return set()


def sampling_defaults(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of the sampling parameters that a server sets those that choose other tokens than plain sampling does."""
    return {name: found[name] for name, plain in _PLAIN.items() if found.get(name) not in (None, *plain)}


def _sampling(answer: Answer, items: dict[str, Any]) -> set[str]:
    """What a request without sampling parameters is sampled by: told by the endpoint that renders, where it is switched on, and by a
    configuration that takes nothing from the model's files."""
    rendered = _json(answer)
    first = rendered[0] if isinstance(rendered, list) and rendered else None
    parameters = first.get("sampling_params") if isinstance(first, dict) else None
    if parameters is None and items.get("config.model_config.generation_config") == "vllm":
        parameters = items.get("config.model_config.override_generation_config") or {}
    if not isinstance(parameters, dict):
        return {"sampling"}
    items[DEFAULTS] = sampling_defaults(parameters)
    return set()


def flat(prefix: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Entries to this depth; what is named like a secret is left out at every depth."""
    if isinstance(value, dict) and depth:
        for name, entry in value.items():
            if not is_secret(name):
                yield from flat(f"{prefix}.{name}", entry, depth - 1)
    elif value is not None:
        yield prefix, _without_secrets(value)


def is_secret(name: str) -> bool:
    """Whether something of this name is a credential."""
    return _SECRET.search(name) is not None


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_secrets(entry) for name, entry in value.items() if not is_secret(name)}
    return [_without_secrets(entry) for entry in value] if isinstance(value, list) else value


def _tokenizer_info(answer: Answer, items: dict[str, Any]) -> None:
    """The tokenizer's configuration, told only where the server was started for it; kept as a digest, it is large."""
    info = _json(answer)
    if isinstance(info, dict):
        items["tokenizer_info.sha256"] = hashlib.sha256(dump(info, sort_keys=True)).hexdigest()


def probed(
    text_ids: list[int], chat_ids: list[int] | None, scores: tuple[list[int], list[float]], previous: EnvironmentCaptured | None
) -> dict[str, Any]:
    """The probe's items of an engine that is asked in its own process; the same as over HTTP."""
    items: dict[str, Any] = {"probe.tokenizer": _ids_digest(text_ids)}
    if chat_ids is not None:
        items["probe.chat_template"] = _ids_digest(chat_ids)
    items["probe.choices"], items["probe.logprobs"] = _steady((scores[0], [round(x, _LOGPROB_DIGITS) for x in scores[1]]), previous)
    return items


def _ids_digest(ids: list[int]) -> str:
    """32 hex digits tell tokenizers apart; the ids themselves would only be long."""
    return hashlib.sha256(dump(ids)).hexdigest()[:32]


def _tokens(name: str, answer: Answer, items: dict[str, Any]) -> set[str]:
    """The digest of a fixed input's token ids."""
    tokens = _json(answer)
    if not isinstance(tokens, dict) or not isinstance(tokens.get("tokens"), list):
        return {name}
    items[f"probe.{name}"] = _ids_digest(tokens["tokens"])
    return set()


_SCORING = {"prompt": PROBE_TEXT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
# No seed: on CPU a seeded request in a chunked prefill would end the engine.


def _score(answer: Answer, items: dict[str, Any], previous: EnvironmentCaptured | None) -> set[str]:
    """What the model makes of the fixed prompt: its own choice at each place (semantic), the prompt's logprobs (numeric)."""
    scored = _json(answer)
    try:
        scores = _scores(scored["choices"][0]["prompt_logprobs"])
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, StopIteration):
        return {"probe"}
    if scored.get("system_fingerprint"):
        items["system_fingerprint"] = scored["system_fingerprint"]
    items["probe.choices"], items["probe.logprobs"] = _steady(scores, previous)
    return set()


def _scores(entries: list[dict[str, dict[str, Any]] | None]) -> tuple[list[int], list[float]]:
    """Per token after the first: the id of rank 1 (the smallest of a tie) and the logprob of the prompt's own token.

    vLLM puts the prompt's own token first in each entry.
    """
    places = [entry for entry in entries if entry]
    tops = [
        min(int(token) for token, score in place.items() if score["rank"] == min(s["rank"] for s in place.values())) for place in places
    ]
    own = [round(float(next(iter(place.values()))["logprob"]), _LOGPROB_DIGITS) for place in places]
    return tops, own


def _steady(scores: tuple[list[int], list[float]], previous: EnvironmentCaptured | None) -> tuple[list[int], list[float]]:
    """The earlier scores where the new ones differ from them by no more than noise, so that the digest does not flutter."""
    before = (item(previous, "probe.choices"), item(previous, "probe.logprobs")) if previous else (None, None)
    choices, logprobs = before
    if not choices or not logprobs or len(logprobs) != len(scores[1]):
        return scores
    near = all(abs(old - new) <= DRIFT_NATS for old, new in zip(logprobs, scores[1], strict=True))
    same = sum(old == new for old, new in zip(choices, scores[0], strict=True)) >= 0.9 * len(choices)
    return (choices, logprobs) if near and same else scores
