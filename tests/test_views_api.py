"""What the views Compare and Engine ask for: replays and generations token by token, runs of many replays, steps and KV connectors."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from replay.compare import run_compare
from replay.comparison import generations_document, replay_document
from replay.fold import fold
from schemas import events as e
from schemas.errors import UnknownName, UsageError
from schemas.settings import Settings
from store.directory import KINDS, SessionDirectory, Viewer, Wanted
from store.merge import merge
from tests.api_rig import Api, put, serving
from tests.tape import FOLLOW_UP, QUESTION, Tape, engine_run, finish, ident, incident
from tests.test_api import configured
from tests.test_compare import Scorer, Sink, scored, taped
from tokentape.cli import main
from tokentape.commands.query import sessions
from tokentape.installation import Installation
from tokentape.lines import session_line

RECORDED = [-1.0, -2.0, -3.0, -0.5]
MOVED = [-1.0, -2.0, -9.0, -0.5]
SESSION = str(uuid.UUID(bytes=taped(RECORDED).session_id))
RUN = str(uuid.UUID(bytes=Tape("engine run").session_id))


def replayed(present: list[float], run: str | None = None) -> Sink:
    """What a replay recorded whose engine scored the tokens so."""
    sink = Sink()
    run_compare(taped(RECORDED).events, Scorer(lambda _: scored(present)), sink, run=run)
    return sink


def answers(
    name: str,
    ids: list[int],
    logprobs: list[float],
    *,
    question: Any = QUESTION,
    alternatives: e.ChunkAlternatives | None = None,
    **fields: Any,
) -> Tape:
    """A session of one generation that said these tokens."""
    tape = Tape(name)
    g = tape.request(name, [question], 0, **fields)
    tape.started(g, 1, 1)
    texts = [f"w{token} " for token in ids]
    tape.tokens(g, 0, [float(i) for i in range(len(ids))], texts, ids=ids, logprobs=logprobs, alternatives=alternatives)
    finish(tape, g, 0, [len(ids)], 100)
    return tape


def beside(first: Tape, second: Tape) -> dict[str, Any]:
    """The comparison of the only generations of two sessions."""
    return generations_document(fold(first.events), fold(second.events))


def test_a_replay_beside_what_it_replayed() -> None:
    """Each token with what the engine thought then and thinks now, the drift between, and the first token that tells."""
    found = replay_document(fold(replayed(MOVED).events()), fold(taped(RECORDED).events))
    (sequence,) = found["sequences"]

    assert (found["kind"], found["verdict"], sequence["first_telling"]) == ("replay", "model_differs", 2)
    assert sequence["first"]["logprob"] == RECORDED
    assert sequence["second"] == {"logprob": MOVED, "rank": [1, 1, 1, 1]}
    assert sequence["drift"] == [0, 0, pytest.approx(6), 0]
    assert found["environment"]["lines"] == ["one side's environment is not known"]


@pytest.mark.parametrize(
    ("ids", "logprobs", "fields", "verdict", "telling", "says"),
    [
        ([1, 2, 3], [-1.0, -2.0, -3.0], {}, "identical", None, "3 logprobs equal"),
        ([1, 2, 3], [-1.0, -2.0, -9.0], {}, "model_differs", 2, "floors off"),
        ([1, 2, 4], [-1.0, -2.0, -3.0], {}, "sampling_differs", 2, "the first says 'w3 ', the second 'w4 '; choices were not seeded"),
        ([1, 2], [-1.0, -2.0], {"temperature": 0}, "sampling_differs", 2, "the second nothing more"),
        ([1, 3], [-1.0, -2.0], {"seed": 7}, "sampling_differs", 1, "asked with seed 1, temperature 0.8 and seed 7, temperature 0.8"),
        ([1, 2, 3], [-1.0, -2.0, -3.0], {"question": FOLLOW_UP}, "inconclusive", None, "the prompts differ"),
    ],
)  # fmt: skip
def test_two_generations(ids: list[int], logprobs: list[float], fields: Any, verdict: str, telling: int | None, says: str) -> None:
    """As far as they say the same they are judged by drift; where they part is what tells; other prompts are not compared."""
    seeded: dict[str, Any] = {"seed": 1} if "seed" in fields else {}
    found = beside(answers("a", [1, 2, 3], [-1.0, -2.0, -3.0], **seeded), answers("b", ids, logprobs, **fields))

    assert (found["verdict"], found["sequences"][0]["first_telling"]) == (verdict, telling)
    assert says in found["reason"]


def test_alternatives_of_what_is_compared() -> None:
    """What else each token might have been stands with it where a client asked for that, on either side, and is None elsewhere."""
    told = e.ChunkAlternatives(counts=[2, 1], texts=["a", "b", "c"], logprobs=[-0.5, -1.5, -0.25])
    first, second = answers("a", [1, 2], [-0.5, -0.25], alternatives=told), answers("b", [1, 2], [-0.5, -0.25])
    (sequence,) = beside(first, second)["sequences"]
    (replay,) = replay_document(fold(replayed(MOVED).events()), fold(taped(RECORDED).events))["sequences"]

    assert [[(one["text"], one["logprob"]) for one in token] for token in sequence["first"]["alternatives"]] == [
        [("a", -0.5), ("b", -1.5)],
        [("c", -0.25)],
    ]
    assert (sequence["second"]["alternatives"], replay["first"]["alternatives"]) == (None, None)


def test_what_cannot_be_compared() -> None:
    """A session without a replay, and a generation that is not there, are said in a line."""
    state = fold(taped(RECORDED).events)
    with pytest.raises(UsageError, match="records no replay"):
        replay_document(state, state)
    with pytest.raises(UnknownName, match="no generation 'ffff'"):
        generations_document(state, state, "ffff")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the installation that `api` serves."""
    return tmp_path_factory.mktemp("views")


@pytest.fixture(scope="module")
def api(data: Path) -> Iterator[Api]:
    """An API over a session, three replays of it, two of one run, and a recorded engine."""
    settings = configured(Settings(data=data))
    put(settings, [stored.event for tape in (taped(RECORDED), incident()) for stored in tape.events])
    for present, run in ((RECORDED, None), (MOVED, "nightly")):
        put(settings, [stored.event for stored in replayed(present, run).events()])
    put(settings, engine_run())
    with serving(settings) as api:
        yield api.by("admin", owner="root")


def test_replays_and_their_run(api: Api) -> None:
    """The replays of a session, newest first; a run counts its verdicts and leads to its sessions, and each to its tokens."""
    replays = api("GET", f"debug-sessions/{SESSION}/replays")["replays"]
    (run,) = api("GET", "replay-runs")["runs"]
    rows = api("GET", "replay-runs/nightly?verdict=model_differs")
    compared = api("GET", f"debug-sessions/{rows['replays'][0]['recorded_in']}/comparison")

    assert {row["verdict"] for row in replays} == {"identical", "model_differs"}
    assert (run["run"], run["sessions"], run["verdicts"]) == ("nightly", 1, {"model_differs": 1})
    assert rows["replays"][0]["session_id"] == SESSION
    assert rows["replays"][0]["drift_max"] == pytest.approx(6)
    assert compared["sequences"][0]["first_telling"] == 2
    assert api("GET", "replay-runs/nightly?verdict=identical")["total"] == 0


def test_whose_replays_are_seen(api: Api) -> None:
    """Another tenant sees neither run nor comparison; who may not see the session that was replayed does not see its replay."""
    stranger = api.by("reader", tenant="blue")
    (run,) = api("GET", "replay-runs/nightly")["replays"]

    assert stranger("GET", "replay-runs")["runs"] == []
    stranger("GET", f"debug-sessions/{run['recorded_in']}/comparison", status=404)
    stranger("GET", f"debug-sessions/{SESSION}/replays", status=404)


def test_steps_of_an_engine(api: Api) -> None:
    """A run in stretches, and a few steps with who was in each and whose session that is; one that is not there is not."""
    (run,) = api("GET", "engine-runs")["runs"]
    whole = api("GET", f"engine-runs/{RUN}")
    some = api("GET", f"engine-runs/{RUN}?first=100&limit=2")
    shared = [[entry["generation_id"] for entry in step["entries"]] for step in some["steps"]]

    assert (run["engine_run"], run["steps"], run["generations"]) == (RUN, 240, 4)
    assert (run["state"], run["ended"]) == ("recording", None)
    assert (len(whole["step"]), whole["every"], max(whole["running"])) == (240, 1, 3)
    assert sum(whole["preempted"]) == 1
    assert shared == [[str(uuid.UUID(bytes=ident(name))) for name in ("e2", "e3")]] * 2
    assert set(some["sessions"].values()) == {RUN}
    api("GET", f"engine-runs/{SESSION}", status=404)
    assert api.by("analyst", tenant="blue")("GET", "engine-runs")["runs"] == []


def test_a_connector_and_why_it_found_nothing(api: Api) -> None:
    """The same as `tokentape kv` says."""
    found = api("GET", f"engine-runs/{RUN}/kv")

    assert [one["rate"] for one in found["requests"]] == [0, 0, pytest.approx(2 / 3), 0]
    assert found["requests"][0]["why"].startswith("a new prompt")
    api("GET", f"engine-runs/{SESSION}/kv", status=404)


def test_a_list_that_grows_is_the_list_made_at_once(tmp_path: Any) -> None:
    """Looked at after each thing that came, in whatever part it stands, and after a merge: the same rows as of who looks only then."""
    settings = Settings(data=tmp_path)
    whole = incident().events
    pieces = [
        whole[:40],
        taped(RECORDED).events,
        whole[40:104],
        replayed(MOVED, "nightly").events(),
        whole[104:],
        answers("a", [1], [-1.0]).events,
    ]
    every = Wanted(replays=True)
    with Installation(settings) as installation:
        grown = SessionDirectory(settings, installation.catalog)
        for piece in pieces:
            put(settings, [stored.event for stored in piece])
            installation.freshen()
            grown.sessions(Viewer(), every)
        merge(settings, installation.catalog)
        made = SessionDirectory(settings, installation.catalog)
        rows = [directory.sessions(Viewer(), every).rows for directory in (grown, made)]
        runs = [directory.runs(Viewer()) for directory in (grown, made)]
        some = grown.sessions(Viewer(), every, limit=2, offset=1)
        grown.close()
        made.close()

    assert rows[0] == rows[1]
    assert runs[0] == runs[1]
    assert (len(rows[0]), rows[0][0]["tags"], {row["verdict"] for row in rows[0]}) == (
        4,
        ["eu", "incident", "prod"],
        {None, "model_differs"},
    )
    assert (some.rows, some.total) == (rows[0][1:3], 4)


def test_kinds_of_sessions(tmp_path: Path) -> None:
    """What engines, connectors and replays wrote stands in no list of conversations, and in the list of its kind alone."""
    settings = Settings(data=tmp_path)
    put(settings, [*(stored.event for stored in answers("a", [1], [-1.0]).events), *engine_run()])
    put(settings, [stored.event for stored in (*taped(RECORDED).events, *replayed(MOVED).events())])
    with (
        Installation(settings) as installation,
        contextlib.closing(SessionDirectory(settings, installation.catalog)) as directory,
    ):
        installation.freshen()
        every = [*KINDS.values(), "conversation"]
        rows = [directory.sessions(Viewer(), Wanted(kinds=kinds)).rows for kinds in (*((kind,) for kind in every), tuple(every))]
        asked = [len(directory.sessions(Viewer(), wanted).rows) for wanted in (Wanted(), Wanted(replays=True))]

    assert [[session_line(row)["kind"] for row in found] for found in rows[:4]] == [["replay"], ["engine"], ["kv"], ["conversation"] * 2]
    assert (len(rows[4]), asked) == (5, [2, 3])


LISTS: list[tuple[list[str], str]] = [
    ([], ""),
    (["--kind", "engine"], "kind=engine"),
    (["--kind", "kv", "--kind", "replay"], "kind=kv&kind=replay"),
    (["--replays"], "replays=true"),
    (["--under-way"], "under_way=true"),
    (["--failed"], "failed=true"),
    (["--model", "tiny"], "model=tiny"),
    (["--verdict", "model_differs"], "verdict=model_differs"),
    (["--verdict", "identical"], "verdict=identical"),
    (["--tenant", "blue"], "tenant=blue"),
    (["--tag", "incident"], "tag=incident"),
    (["--since", "2026-11-23T14:06", "--until", "2026-11-24T00:00+01:00"], "since=2026-11-23T14:06:00Z&until=2026-11-23T23:00:00Z"),
    (["--limit", "1", "--offset", "1"], "limit=1&offset=1"),
    (["exact", "TIMES"], "q=exact%20times"),
]
"""The same list asked for on the command line and of the API."""


def test_the_command_line_lists_what_the_api_lists(api: Api, data: Path) -> None:
    """Each filter of the API is an option, and finds the same sessions in the same order; what is no filter is one line."""
    described = api.send("GET", f"{api.url}/openapi.json").json()["paths"]["/api/v1/debug-sessions"]["get"]["parameters"]
    filters = {one["name"] for one in described if one["in"] == "query"}
    options = {option.lstrip("-").replace("-", "_") for parameter in sessions.params for option in parameter.opts}
    ran = [CliRunner().invoke(main, ["--data", str(data), "sessions", "--format", "json", *words]) for words, _ in LISTS]
    listed = [[json.loads(line)["session_id"] for line in one.stdout.splitlines()] for one in ran]
    found = [[row["session_id"] for row in api("GET", f"debug-sessions?{query}")["sessions"]] for _, query in LISTS]
    wrong = CliRunner().invoke(main, ["--data", str(data), "sessions", "--since", "noon"])

    assert filters - options == {"q"}
    assert listed == found
    assert {query for (_, query), rows in zip(LISTS, found, strict=True) if not rows} in (
        {"under_way=true", "tenant=blue", "verdict=identical"},
        {"under_way=true", "tenant=blue", "verdict=model_differs"},
    )  # both replays ended at one moment
    assert (wrong.exit_code, wrong.stderr.splitlines()[0]) == (2, "tokentape: sessions: 'noon' is no time")


def test_compare_on_the_command_line(tmp_path: Any) -> None:
    """`compare` says the same of a replay and of two generations, and in a line what it cannot compare."""
    settings = Settings(data=tmp_path)
    sink = replayed(MOVED)
    put(
        settings,
        [stored.event for tape in (taped(RECORDED), answers("a", [1], [-1.0]), answers("b", [2], [-1.0])) for stored in tape.events],
    )
    put(settings, [stored.event for stored in sink.events()])

    def run(*words: str) -> Any:
        return CliRunner().invoke(main, ["--data", str(tmp_path), "compare", *words])

    recorded_in, first, second = (str(uuid.UUID(bytes=one)) for one in (sink.recorded[0][0].session_id, ident("a"), ident("b")))
    text, document = run(recorded_in), json.loads(run(first, "--with", second, "--format", "json").stdout)
    refused = run(first)

    assert "token 2" in text.stdout
    assert "model differs" in text.stdout
    assert (document["verdict"], document["sequences"][0]["first_telling"]) == ("sampling_differs", 0)
    assert refused.exit_code == 2
