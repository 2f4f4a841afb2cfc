"""The engines that replay asks, each by the same contract; and the four verdicts, from the command line, with real engines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay.engines import loading
from replay.engines.apart import Apart
from replay.engines.base import Alternatives, Engine, Forced, Generated, Refused, Request, Scored
from replay.engines.loading import check_version, parsed_options
from replay.engines.openai import Answer, OpenAIEngine
from replay.engines.recorded import RecordedEngine
from replay.engines.vllm import VllmEngine
from replay.fold import fold
from replay.measurement import measure
from replay.sampling import Sampler, _masked
from schemas.environment import classify, compare
from schemas.errors import EngineUnavailable, UsageError
from schemas.events import EnvironmentCaptured
from schemas.probe import item
from schemas.requests.recorded import CHAT, COMPLETIONS
from schemas.settings import GatewaySettings, Settings
from schemas.sink import SessionContext, new_id
from scripts.tiny_model import perturb
from tests.conftest import VllmService
from tests.engine_case import DOCUMENT, MESSAGES, EngineCase
from tests.program import Program, until
from tests.recording import opened
from tests.tape import Tape, finish
from tokentape.engines import made_engine
from tokentape.installation import Installation
from tokentape.supervisor import announced

CONTEXT = 512
pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM in this process warns of its own and of torch's deprecations


@pytest.fixture(scope="module")
def loaded(vllm: VllmService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """vLLM in this process, with the model of the shared server in 32 bits."""
    os.environ["VLLM_API_KEY"] = "a-secret-of-this-test"
    options = {"dtype": "float32", "max_model_len": CONTEXT, "max_num_seqs": 64}
    engine = VllmEngine(str(vllm.model_dir), options=options, digests=tmp_path_factory.mktemp("digests") / "digests.json")
    yield engine
    engine.close()
    del os.environ["VLLM_API_KEY"]


class TestInProcess(EngineCase):
    @pytest.fixture
    def engine(self, loaded: VllmEngine) -> Engine:
        """vLLM in this process."""
        return loaded

    @pytest.fixture
    def model(self) -> str | None:
        """It has but one."""
        return None

    @pytest.mark.parametrize(("group", "steps", "expected"), [(4, 16, [8, 0, 4, 0, 4, 0, 4]), (7, 2, [8, 0, 0, 6, 0, 0, 6])])
    def test_places_are_filled_a_group_at_a_time(
        self, loaded: VllmEngine, group: int, steps: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two of these prompts go into a step, and two end with each: so many places, or steps, are waited for; then all are filled."""
        said = self.said(loaded, None)
        forced = Forced(Request(None, DOCUMENT), (said.prompt_token_ids * CONTEXT)[: CONTEXT * 2 // 5], said.sequences[0].token_ids)
        monkeypatch.setattr(loaded, "_places", 8)
        monkeypatch.setattr(loaded, "_group", group)
        monkeypatch.setattr("replay.engines.vllm.GROUP_STEPS", steps)
        left, taken = {loaded.begin(forced) for _ in range(21)}, []
        while left:
            before = len(loaded._held)
            left -= {name for name, read in loaded.step() if isinstance(read(), Scored)}
            taken.append(before - len(loaded._held))

        assert expected == taken[: len(expected)]
        assert 21 == sum(taken)


class TestApart(EngineCase):
    @pytest.fixture(scope="class")
    def engine(self, vllm: VllmService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
        """vLLM in a process of its own."""
        digests = tmp_path_factory.mktemp("apart") / "digests.json"
        engine = Apart(str(vllm.model_dir), options={"dtype": "float32", "max_model_len": CONTEXT, "max_num_seqs": 64}, digests=digests)
        yield engine
        engine.close()

    @pytest.fixture
    def model(self) -> str | None:
        """It has but one."""
        return None

    def test_prompts_are_rendered_while_it_works(self, engine: Apart) -> None:
        """The answers of both come by one pipe, and none is taken for the other's."""
        said = self.said(engine, None)
        forced = Forced(Request(None, DOCUMENT), said.prompt_token_ids, said.sequences[0].token_ids)
        left, rendered = [engine.begin(forced) for _ in range(100)], 0
        while left:
            assert said.prompt_token_ids == engine.render(Request(None, DOCUMENT))
            rendered += 1
            for name, read in engine.step():
                left.remove(name)
                assert isinstance(read(), Scored)

        assert rendered > 1

    def test_long_questions_and_answers_pass_each_other(self, engine: Apart) -> None:
        """More than the pipe holds is asked while as much is answered: neither side waits for the other."""
        said = self.said(engine, None)
        request = Request(None, {**DOCUMENT, "user": "x" * 8192}, alternatives=1024)
        forced = Forced(request, said.prompt_token_ids, said.sequences[0].token_ids)
        left = {engine.begin(forced) for _ in range(20)}
        until(lambda: engine._told.poll(0) or None)
        left |= {engine.begin(forced) for _ in range(100)}
        while left:
            left -= {name for name, read in engine.step() if isinstance(read(), Scored)}

    def test_z_its_end_is_told(self, engine: Apart) -> None:
        """What is asked for joins those at work; a process that is gone is an outage, for those at work and for who asks later."""
        said = self.said(engine, None)
        forced = Forced(Request(None, DOCUMENT), said.prompt_token_ids, said.sequences[0].token_ids)
        names = [engine.begin(forced), engine.begin(replace(forced, token_ids=(10**6,)))]
        ended: dict[Any, Any] = {}
        while len(ended) < 2:
            ended |= {name: read() for name, read in engine.step()}

        assert (Scored, Refused) == tuple(type(ended[name]) for name in names)
        engine.begin(forced)
        engine._process.kill()
        with pytest.raises(EngineUnavailable, match="its process has ended with code -9"):
            list(iter(engine.step, None))
        with pytest.raises(EngineUnavailable, match="its process has ended with code -9"):
            engine.render(Request(None, DOCUMENT))


class TestOverHttp(EngineCase):
    @pytest.fixture
    def engine(self, vllm: VllmService) -> Iterator[Engine]:
        """The shared server."""
        made = OpenAIEngine(vllm.url)
        yield made
        made.close()

    @pytest.fixture
    def model(self, vllm: VllmService) -> str | None:
        """What it serves."""
        return vllm.model


class TestRecorded(EngineCase):
    @pytest.fixture
    def engine(self, loaded: VllmEngine) -> Engine:
        """The tape of one answer."""
        said = loaded.generate(Request(None, DOCUMENT))
        assert isinstance(said, Generated)
        return RecordedEngine(fold(tape_of(said, "tiny", loaded.fingerprint(), **DOCUMENT).events))

    @pytest.fixture
    def model(self) -> str | None:
        """The name on the tape."""
        return "tiny"


def tape_of(said: Generated, model: str, environment: EnvironmentCaptured | None, **parameters: Any) -> Tape:
    """The session that recorded this answer to MESSAGES."""
    tape = Tape("engines")
    if environment:
        tape.add(environment)
    fields = {name: value for name, value in parameters.items() if name not in ("messages", "n")}
    g = tape.request(
        "g", MESSAGES, 0, model=model, parameters={**fields, "n": len(said.sequences)}, n=len(said.sequences),
        seed=parameters.get("seed"), temperature=parameters.get("temperature"), environment_id=environment and environment.environment_id,
    )  # fmt: skip
    tape.started(g, 1, 1, said.prompt_token_ids)
    for sequence in said.sequences:
        tokens = len(sequence.token_ids)
        offsets, texts = [float(i) for i in range(tokens)], ["x"] * tokens
        tape.tokens(g, 0, offsets, texts, index=sequence.index, ids=sequence.token_ids, logprobs=sequence.logprobs)
    finish(tape, g, 0, [len(sequence.token_ids) for sequence in said.sequences], 100)
    return tape


def test_a_fingerprint_tells_content_and_no_secrets(loaded: VllmEngine, vllm: VllmService, tmp_path: Path) -> None:
    """Weights by content whatever folder they lie in, read once; what steers vLLM; nothing named like a credential."""
    environment = loaded.fingerprint()
    keys = {pair.key for pair in environment.items}

    assert {} == item(environment, "sampling.defaults")
    assert {"weights.sha256", "tokenizer.sha256", "chat_template.sha256", "model.vocabulary", "config.model_config.dtype"} <= keys
    assert {"version", "library.torch", "hardware.cpu", "engine.runner", "engine.attention_backends", "engine.threads"} <= keys
    assert {"config.scheduler_config.max_num_seqs", "engine.split_kv", "env.VLLM_CPU_KVCACHE_SPACE"} <= keys
    assert "a-secret-of-this-test" not in environment.model_dump_json()
    assert not [key for key in keys if str(vllm.model_dir) in str(item(environment, key))]
    read = loaded._digests.read_bytes
    assert environment == loaded.fingerprint()
    assert read == loaded._digests.read_bytes > 0


def test_the_same_model_over_http_differs_in_what_both_tell_only(loaded: VllmEngine, vllm: VllmService) -> None:
    """Tokenizer and template are found to be the same; what only one side can know is no difference."""
    over_http = OpenAIEngine(vllm.url)
    differences = compare(over_http.fingerprint(), loaded.fingerprint())
    over_http.close()

    assert not {"probe.tokenizer", "probe.chat_template", "version", "weights.sha256"} & {d.key for d in differences}
    assert all(d.recorded is not None and d.present is not None for d in differences)


def test_variables_that_only_place_work_are_no_numbers() -> None:
    """Devices, logs and mirrors belong to scheduling; what may change a kernel is numeric."""
    placing = (
        "env.CUDA_VISIBLE_DEVICES",
        "env.CUDA_LAUNCH_BLOCKING",
        "env.VLLM_LOGGING_LEVEL",
        "env.VLLM_TRACE_FUNCTION",
        "env.HF_ENDPOINT",
    )

    assert {"scheduling"} == {classify(key) for key in placing}
    assert "numeric" == classify("env.VLLM_BATCH_INVARIANT") == classify("env.OMP_NUM_THREADS")


def test_a_seeded_prompt_longer_than_vllms_usual_step_does_no_harm(loaded: VllmEngine) -> None:
    """Seeded requests whose prompts vLLM would split, and which then end it on a CPU, are answered."""
    document = {"prompt": [5] * 400, "max_tokens": 2, "temperature": 1.0, "seed": 1}
    answers = loaded.generate_all([Request(None, document)] * 6)

    assert [True] * 6 == [isinstance(answer, Generated) for answer in answers]


def test_a_sequence_that_fills_the_context_is_scored_but_for_its_last_token(loaded: VllmEngine) -> None:
    """One token must be left to sample."""
    scored = loaded.force(Request(None), (5,) * (CONTEXT - 8), (6,) * 8)

    assert isinstance(scored, Scored)
    assert [True] * 7 + [False] == [value is not None for value in scored.logprobs]


def test_structured_output_is_forced_and_not_generated(loaded: VllmEngine) -> None:
    """Recorded tokens can be forced however they were chosen; a free answer would have to obey the grammar."""
    request = Request(None, {**DOCUMENT, "response_format": {"type": "json_object"}})

    assert isinstance(loaded.force(request, (1, 2, 3), (4, 5)), Scored)
    refused = loaded.generate(request)
    assert isinstance(refused, Refused)
    assert "response_format" in refused.reason


def test_what_a_request_does_not_name_is_what_the_model_s_files_say(loaded: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `vllm serve` has it; what the request names goes before."""
    document = {"messages": MESSAGES, "max_tokens": 12, "seed": 3}
    greedy, drawn = (loaded.generate(Request(None, {**document, "temperature": temperature})) for temperature in (0, 1.0))
    monkeypatch.setattr(loaded, "_set", {"temperature": 0.0})

    assert greedy != drawn
    assert greedy == loaded.generate(Request(None, document))
    assert drawn == loaded.generate(Request(None, {**document, "temperature": 1.0}))


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "ü"]}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}
CALLED = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "2"}]
BEGUN = [*MESSAGES, {"role": "assistant", "content": "The first was"}]


@pytest.mark.parametrize(
    "document",
    [
        {"messages": MESSAGES},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]},
        {"messages": CALLED},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "x", "tool_calls": []}]},
        {"messages": CALLED, "tools": [TOOL], "tool_choice": "auto"},
        {"messages": BEGUN, "add_generation_prompt": False},
        {"messages": BEGUN, "add_generation_prompt": False, "continue_final_message": True},
        {"messages": MESSAGES, "chat_template_kwargs": {"tools": [TOOL], "enable_thinking": False}},
        {"messages": MESSAGES, "add_special_tokens": True, "reasoning_effort": "low", "documents": [{"title": "t", "text": "x"}]},
        {"messages": [{"role": "user", "content": "long " * 3000}]},
        {"prompt": "a text", "add_special_tokens": False},
    ],
)
def test_prompts_are_those_of_a_server(document: dict[str, Any], loaded: VllmEngine, vllm: VllmService) -> None:
    """Each field that shapes one has its effect, and arguments of tool calls are what templates are written for."""
    over_http = OpenAIEngine(vllm.url)
    endpoint = COMPLETIONS if "prompt" in document else CHAT
    theirs = over_http.render(Request(vllm.model, document, endpoint=endpoint))
    over_http.close()

    assert isinstance(theirs, tuple), theirs
    assert theirs == loaded.render(Request(None, document, endpoint=endpoint))


def test_what_a_request_tells_its_template_reaches_it(loaded: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments of the template as the request names them, in a process as over HTTP; whoever asks is not changed by it."""
    template = "{{ enable_thinking }}|{{ reasoning_effort }}|{{ documents or '' }}|{{ messages[0].content }}"
    tokenizer = loaded._llm.get_tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", template)
    given = {"documents": [{"title": "t", "text": "x"}], "reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}
    for fields, expected in (
        ({"chat_template_kwargs": {"enable_thinking": False}}, "False|||one"),
        ({"reasoning_effort": "none"}, "False|none||one"),
        (given, "True|none|[{'title': 't', 'text': 'x'}]|one"),
    ):
        document = {"messages": [{"role": "user", "content": "one"}], **fields}
        asked: list[dict[str, Any]] = []
        over_http = OpenAIEngine("http://127.0.0.1:1")
        monkeypatch.setattr(over_http, "_post", lambda path, sent, asked=asked: asked.append(sent) or Answer(200, {"tokens": [1]}))
        before = json.dumps(document)
        rendered = loaded.render(Request(None, document))

        assert isinstance(rendered, tuple), rendered
        assert expected == tokenizer.decode(rendered)
        assert (1,) == over_http.render(Request(None, document))
        told = {name: asked[0]["chat_template_kwargs"].get(name, "") for name in ("enable_thinking", "reasoning_effort", "documents")}
        assert expected == f"{told['enable_thinking']}|{told['reasoning_effort']}|{told['documents']}|one"
        assert before == json.dumps(document)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
        ({"mm_processor_kwargs": {"fps": 1}}, "mm_processor_kwargs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}]}, "image_url"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, "function"),
    ],
)
def test_a_prompt_that_is_not_rendered_here_is_refused_by_name(fields: dict[str, Any], named: str, loaded: VllmEngine) -> None:
    """Templates of a request's own, and media, which would be fetched; what no template takes is said in vLLM's words."""
    refused = loaded.render(Request(None, {"messages": MESSAGES, **fields}))

    assert isinstance(refused, Refused)
    assert named in refused.reason
    assert "\n" not in refused.reason


def test_both_go_on_from_token_ids(loaded: VllmEngine, vllm: VllmService) -> None:
    """What a greedy answer said after its eighth token is said again after it; pieces spell the text, and stop words end it."""
    over_http = OpenAIEngine(vllm.url)
    for engine, model in ((loaded, None), (over_http, vllm.model)):
        said = engine.generate(Request(model, {"messages": MESSAGES, "max_tokens": 20, "temperature": 0}))
        assert isinstance(said, Generated)
        ids = said.sequences[0].token_ids
        document = {"prompt": [*said.prompt_token_ids, *ids[:8]], "max_tokens": 12, "temperature": 0}
        further = engine.generate(Request(model, document, endpoint=COMPLETIONS))
        assert isinstance(further, Generated)
        rest = further.sequences[0]
        stopped = engine.generate(Request(model, {**document, "stop": [rest.text[6:9]]}, endpoint=COMPLETIONS))

        assert ids[8:] == rest.token_ids
        assert said.sequences[0].text.endswith(rest.text)
        assert rest.text == "".join(rest.pieces) != ""
        assert isinstance(stopped, Generated)
        assert (rest.text.partition(rest.text[6:9])[0], "stop") == (stopped.sequences[0].text, stopped.sequences[0].finish_reason)
    over_http.close()


def test_an_engine_calibrates_itself(loaded: VllmEngine) -> None:
    """Its own noise, by condition, and the noise function behind its seeded tokens, which it makes again."""
    found = measure(loaded, None, sequences=8, tokens=24)

    assert 4 == len(found.conditions)
    assert found.tokens > 400
    assert found.fits(loaded.fingerprint())
    assert ("vllm-0.32-v1-cpu", 0) == (found.noise, found.noise_misses)
    assert found.noise_tokens > 100


def test_masks_are_vllms(loaded: VllmEngine) -> None:
    """top_k, top_p and min_p keep what vLLM's own sampler keeps; top_p over a part of the vocabulary is not guessed at."""
    torch = pytest.importorskip("torch")
    topk = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    rng = np.random.default_rng(0)
    raw = rng.normal(0, 3, 50)
    logprobs = (raw - np.log(np.exp(raw).sum())).astype(np.float32)
    place = Alternatives(np.arange(50), logprobs, whole=True)
    for k, p in ((5, 1.0), (0, 0.8), (20, 0.5)):
        masked = _masked(place, Sampler(0, 0.7, k, p, 0.0))
        theirs = topk.apply_top_k_top_p_pytorch(
            torch.from_numpy(logprobs / np.float32(0.7)).unsqueeze(0), torch.tensor([k or 50]), torch.tensor([p])
        )

        assert masked is not None
        assert (np.isfinite(masked) == np.isfinite(theirs.numpy()[0])).all()
    assert _masked(place._replace(whole=False), Sampler(0, 0.7, 0, 0.8, 0.0)) is None


class Dying:
    """The parts of vLLM's `LLM` that force asks, dying in mid-batch."""

    def __init__(self, alive: Any) -> None:
        self.llm_engine = alive.llm_engine

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As an engine core that was killed does."""
        raise RuntimeError("EngineCore encountered an issue.\nSee stack trace above")


def test_an_engine_that_dies_is_not_asked_again(loaded: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and the same line for whatever comes after."""
    monkeypatch.setattr(loaded, "_llm", Dying(loaded._llm))
    monkeypatch.setattr(loaded, "_fault", None)
    for _ in range(2):
        with pytest.raises(EngineUnavailable) as caught:
            loaded.force_all([Forced(Request(None), (1,), (2,))] * 3)

        assert "the engine failed: EngineCore encountered an issue." in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("found", "fault"), [("0.23.1", "valid is 0.24 to 0.32"), ("0.33.0", "valid is 0.24 to 0.32"), ("1.0", "not supported")]
)
def test_another_version_of_vllm_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, found: str, fault: str) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr(loading, "version", lambda package: found)
    with pytest.raises(UsageError, match=fault) as caught:
        check_version()

    assert f"vLLM {found}" in str(caught.value)


def test_an_unknown_model_and_a_wrong_option_are_one_line(tmp_path: Path, vllm: VllmService) -> None:
    """A folder that is not there, one without a model, an option that vLLM has not, a word that is none."""
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UsageError, match="no model lies at"):
            VllmEngine(str(folder))
    with pytest.raises(UsageError, match="no_such_option") as caught:
        VllmEngine(str(vllm.model_dir), options={"no_such_option": 1})
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="is no engine option"):
        parsed_options(["dtype"])
    assert {"dtype": "float32", "max_num_seqs": 8, "enforce_eager": True} == parsed_options(
        ["dtype=float32", "max-num-seqs=8", "enforce_eager=true"]
    )


# the command line


def record(settings: Settings, tape: Tape) -> str:
    """Put a session on an installation's tape; its id."""
    session = SessionContext(new_id(), "default", "gateway")
    with opened(settings) as (recorder, _):
        for stored in tape.events:
            recorder.record(session, stored.event.payload)
    return session.session_id.hex()


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> Program:
    """An embedded installation before the shared server."""
    folder = tmp_path_factory.mktemp("verdicts")
    return Program(folder, Settings(data=folder / "data", gateway=GatewaySettings(upstream=vllm.url)))


SEEDED: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 96, "temperature": 1.0, "seed": 11, "n": 2}


def test_four_right_verdicts_from_the_command_line(installation: Program, loaded: VllmEngine, vllm: VllmService, tmp_path: Path) -> None:
    """Nothing changed; the seed ignored; the weights changed; the dtype changed: each is called what it is."""
    server = OpenAIEngine(vllm.url)
    environment, said = server.fingerprint(), server.generate(Request(vllm.model, SEEDED))
    elsewhere = server.generate(Request(vllm.model, {**SEEDED, "seed": 999}))
    server.close()
    local = loaded.generate(Request(None, SEEDED))
    assert isinstance(said, Generated)
    assert isinstance(elsewhere, Generated)
    assert isinstance(local, Generated)
    changed = tmp_path / "changed"
    perturb(vllm.model_dir, changed, noise=1e-3)
    settings = installation.settings
    unchanged, ignored, mine = (
        record(settings, tape)
        for tape in (
            tape_of(said, vllm.model, environment, **SEEDED),
            tape_of(elsewhere, vllm.model, environment, **SEEDED),
            tape_of(local, vllm.model, loaded.fingerprint(), **SEEDED),
        )
    )
    small = [word for name in (f"max_model_len={CONTEXT}", "max_num_seqs=64") for word in ("--engine-option", name)]
    calibrated, same, seed, weights, dtype, listed = installation.batch(
        ["calibrate", "--sequences", "12", "--tokens", "96"],  # as long as what is replayed
        ["replay", unchanged, "--format", "json"],
        ["replay", ignored, "--format", "json"],
        ["replay", mine, "--engine", f"vllm:{changed}", *small, "--engine-option", "dtype=float32", "--format", "json"],
        ["replay", mine, "--engine", f"vllm:{vllm.model_dir}", *small, "--engine-option", "dtype=bfloat16", "--format", "json"],
        ["env", "list", "--format", "json"],
        timeout_s=240,  # two engines are loaded in it
    )

    assert "seeded choices again" in calibrated.text
    assert same.rows[0]["verdict"] in ("identical", "numeric_drift")
    assert "192 of 192 seeded choices made again" in _reasons(same.rows[0])
    assert "sampling_differs" == seed.rows[0]["verdict"]
    assert seed.rows[0]["generations"][0]["sequences"][0]["first_telling"] < 20
    assert "model_differs" == weights.rows[0]["verdict"]
    assert "weights.sha256" in {difference["key"] for difference in weights.rows[0]["differences"]}
    assert "numeric_drift" == dtype.rows[0]["verdict"]
    assert "config.model_config.dtype" in {difference["key"] for difference in dtype.rows[0]["differences"]}
    ids = [row["environment_id"] for row in listed.rows]
    shown, differs = installation.batch(["env", "show", ids[0][:12]], ["env", "diff", ids[-2], ids[-1]])
    assert "weights" in shown.text
    assert "what the model is: it may answer differently" in differs.text


def _reasons(outcome: dict[str, Any]) -> str:
    sequences = [sequence for generation in outcome["generations"] for sequence in generation["sequences"]]
    total = [int(s["reason"].split("; ")[-1].split(" of ")[0]) for s in sequences]
    return f"{sum(total)} of {sum(s['tokens'] for s in sequences)} seeded choices made again"


def test_what_no_engine_can_do_is_one_line(installation: Program) -> None:
    """Unknown environments, options without an engine that takes them, a model that is not there."""
    for words, fault in (
        (["env", "show", "zzz"], "no environment 'zzz' is known"),
        (["env", "diff", "0123", "4567"], "no environment '0123' is known"),
        (["calibrate", "--engine", "recorded"], "the tape is no engine to calibrate"),
        (["calibrate", "--engine-option", "dtype=float32"], "--engine-option is for vllm:MODEL only"),
        (["calibrate", "--engine", "vllm:/nowhere/at/all"], "no model lies at /nowhere/at/all"),
    ):
        ran = installation.run(*words, code=2)

        assert fault in ran.complaint


def test_the_engine_by_default(tmp_path: Path) -> None:
    """What the gateway that runs here forwards to, even if it was started with other settings than these; without one, what they say."""
    with Installation(Settings(data=tmp_path, gateway=GatewaySettings(upstream="http://127.0.0.1:1"))) as installation:

        def chosen(part: str, upstream: str) -> str:
            with announced(tmp_path, part, upstream=upstream):
                return made_engine(installation, None, None, (), None).name

        assert "openai http://127.0.0.1:1" == chosen("indexer", "")
        assert "openai http://127.0.0.1:1" == chosen("gateway", "http://127.0.0.1:1")
        assert "openai http://127.0.0.1:2" == chosen("gateway", "http://127.0.0.1:2, http://127.0.0.1:3")
