"""The command line: what each command says, what it does with nonsense, and what it leaves alone."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import inspect
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pyarrow.ipc
import pyarrow.parquet
import pytest

from schemas.settings import Settings
from store.log import open_log
from store.log.base import Entry
from tests.eventgen import Producer, conversation
from tests.program import ROOT, Program, Ran
from tokentape.cli import COMMANDS, main, summaries

POISON = b"\xc3\x01" + bytes(8) + b"what is this?"
"""A record of a schema that nobody knows."""


def log_conversations(settings: Settings, count: int = 6, *, poison: bool = False) -> list[str]:
    """Conversations appended to the log, with a poisoned record among them if asked; their sessions."""
    log = open_log(settings.log, settings.data)
    producer = Producer(seed=5, partitions=log.partitions)
    sessions = [producer.session() for _ in range(count)]
    for session in sessions:
        log.append(list(conversation(producer, chunks=4, session=session)))
        if poison and session is sessions[1]:
            log.append([Entry(2, bytes(16), POISON)])
    log.close()
    return [session.session_id.hex() for session in sessions]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """An embedded installation with conversations and a poisoned record on its tape, indexed."""
    folder = tmp_path_factory.mktemp("cli")
    made = Program(folder, Settings(data=folder / "data"))
    log_conversations(made.settings, poison=True)
    made.run("index")
    return made


@pytest.fixture(scope="module")
def session(program: Program) -> str:
    """One session of it."""
    return str(program.run("sessions", "--format", "json").rows[0]["session_id"])


def every_command(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Each command and subcommand as the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))


@pytest.mark.parametrize("words", list(every_command()), ids=" ".join)
def test_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Every command explains itself and each of its options."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    page = capsys.readouterr().out
    options = [line.strip() for line in page.splitlines() if line.strip().startswith("--")]

    assert ended.value.code in (0, None)
    assert page.startswith("Usage: ")
    assert [option for option in options if "  " not in option and len(option) < 24] == []


def test_the_list_of_commands_says_what_they_say() -> None:
    """What `--help` reads from the sources is what each command tells of itself."""
    context = click.Context(main)
    commands = {name: main.get_command(context, name) for name in COMMANDS}

    assert summaries() == {name: inspect.getdoc(command.callback) for name, command in commands.items() if command}


def test_help_is_quick_and_lists_every_command(tmp_path: Path) -> None:
    """`tokentape --help` shows all commands and exit codes; the frame itself loads no storage engine, no broker, no HTTP."""
    ran = Program(tmp_path, Settings(data=tmp_path / "data")).run("--help").text
    heavy = ("duckdb", "aiohttp", "kafka", "pyarrow", "minio", "uvicorn")
    ask = f"import sys, tokentape.cli; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert [name for name in COMMANDS if f"  {name} " not in ran] == []
    assert "Exit codes" in ran
    assert loaded == "[]\n"


NONSENSE = [
    (["nonsense"], 2, "No such command 'nonsense'"),
    (["--set", "nonsense", "sessions"], 2, "--set takes key=value"),
    (["--set", "log.knid=kafka", "sessions"], 2, "unknown setting 'knid'"),
    (["--nonsense", "sessions"], 2, "No such option '--nonsense'"),
    (["sql"], 2, "no statement"),
    (["sql", "SELEC 1"], 4, "syntax error"),
    (["sql", "SELECT * FROM nowhere"], 4, "nowhere"),
    (["sql", "DROP TABLE events"], 4, "query: "),
    (["sql", "SELECT 1", "--format", "xml"], 2, "'xml' is not one of"),
    (["sql", "--file", "nowhere.sql"], 2, "nowhere.sql"),
    (["sessions", "--limit", "0"], 2, "'--limit'"),
    (["show", "ffffffff"], 3, "ffffffff"),
    (["show", "not-an-id"], 2, "not-an-id"),
    (["show", "SESSION", "--at", "yesterday-ish"], 2, "yesterday-ish"),
    (["timeline", "ffffffff-0000-7000-8000-000000000000"], 3, "ffffffff"),
    (["tail", "--limit", "0"], 2, "'--limit'"),
    (["replay", "SESSION", "--mode", "dream"], 2, "'dream' is not one of"),
    (["replay", "SESSION", "--mode", "fast", "--to", "breakpoint"], 2, "no breakpoint"),
    (["replay", "SESSION", "--engine", "http://127.0.0.1:9"], 8, "127.0.0.1:9"),
    (["replay", "SESSION", "--engine", "ftp://nowhere"], 2, "ftp://nowhere"),
    (["replay-batch", "--exact", "--engine-run", "ff", "--at-once", "3"], 2, "--exact replays an engine run, not sessions"),
    (["compare", "SESSION", "--generation", "ffff"], 2, "no generation 'ffff' with tokens"),
    (["kv", "ffffffff-0000-7000-8000-000000000000"], 3, "no call of a KV connector is on the tape"),
    (["kv", "not-an-id"], 2, "'not-an-id' is no id"),
    (["breakpoints", "add"], 2, "say which requests to stop"),
    (["breakpoints", "add", "--everything", "--tag", "x"], 2, "say which requests to stop"),
    (["breakpoints", "add", "a b", "--everything"], 2, "breakpoint_id: "),
    (["breakpoints", "add", "--where", "len(last) > "], 2, "column 12: invalid syntax"),
    (["breakpoints", "add", "--where", "lst == 1"], 2, "no name 'lst'"),
    (["breakpoints", "add", "--tag", "x", "--default", "eat"], 2, "default_action: "),
    (["breakpoints", "add", "--tag", "x", "--deadline", "0"], 2, "deadline_s: "),
    (["breakpoints", "remove", "nothing"], 2, "no breakpoint is called 'nothing'"),
    (["stopped", "show", "ffffffff"], 2, "no stopped request is called 'ffffffff'"),
    (["stopped", "edit", "ff", "--set", "n=1"], 2, "no stopped request is called 'ff'"),
    (["stopped", "release"], 2, "say which requests"),
    (["stopped", "refuse", "--all", "ffffffff"], 2, "say which requests"),
    (["merge", "now"], 2, "unexpected extra argument"),
    (["tier", "--yesterday"], 2, "No such option '--yesterday'"),
    (["jobs", "run", "dishes"], 2, "no job is called 'dishes'"),
    (["jobs", "history", "--limit", "x"], 2, "'x' is not a valid integer"),
    (["quarantine", "requeue", "17"], 2, "'17' names no record"),
    (["quarantine", "show", "0", "99999"], 2, "99999"),
    (["quarantine", "show", "zero", "1"], 2, "'zero' is not a valid integer"),
    (["up", "--only", "oven"], 2, "no part is called 'oven'"),
    (["verify", "--public-key", "nowhere.pub"], 2, "nowhere.pub"),
    (["verify", "--store", "nowhere"], 2, "nowhere"),
    (["export", "SESSION", "--out", "nowhere/x.jsonl"], 2, "nowhere/"),
    (["doctor", "brain"], 2, "No such command 'brain'"),
]
"""Words, exit code, and what the one line names."""


@pytest.fixture(scope="module")
def refusals(program: Program, session: str) -> list[Ran]:
    """What each piece of nonsense was answered with."""
    return program.batch(*([session if word == "SESSION" else word for word in words] for words, _, _ in NONSENSE), code=None)


@pytest.mark.parametrize(
    ("number", "words", "code", "says"), [(i, *row) for i, row in enumerate(NONSENSE)], ids=[" ".join(row[0]) for row in NONSENSE]
)
def test_nonsense_is_one_line(number: int, words: list[str], code: int, says: str, refusals: list[Ran]) -> None:
    """Bad input of each command is one line that names what was wrong, with a hint and its exit code."""
    refused = refusals[number]

    assert refused.code == code, refused.stderr
    assert says in refused.complaint
    assert "hint: " in refused.stderr


def test_every_format_gives_the_same_rows(program: Program) -> None:
    """JSON, CSV, Arrow and Parquet parse back to the same answer; the table has a line for each row."""
    ask = "SELECT model, stream, finish_reasons, submitted_at, duration_ms FROM generations ORDER BY submitted_at"
    formats = ("json", "csv", "arrow", "parquet", "table")
    answers = program.batch(*(["sql", ask, "--format", fmt] for fmt in formats))
    made = {fmt: ran.stdout for fmt, ran in zip(formats, answers, strict=True)}
    arrow = pyarrow.ipc.open_stream(made["arrow"]).read_all().to_pylist()
    parquet = pyarrow.parquet.read_table(io.BytesIO(made["parquet"])).to_pylist()
    rows = [json.loads(line) for line in made["json"].splitlines()]
    lines = list(csv.DictReader(io.StringIO(made["csv"].decode())))

    assert len(arrow) == 6
    assert arrow == parquet
    assert [row["finish_reasons"] for row in rows] == [row["finish_reasons"] for row in arrow]
    assert [row["finish_reasons"] for row in rows] == [json.loads(line["finish_reasons"]) for line in lines]
    assert [row["duration_ms"] for row in rows] == [float(line["duration_ms"]) for line in lines]
    assert made["table"].strip().endswith(b"6 rows")
    assert program.run("sql", stdin=ask.encode()).stdout == made["table"]


def test_tail_follows_the_log(program: Program) -> None:
    """`tail` prints events as JSON, one a line, ends at its limit, and shows a record that does not read as such."""
    count = sum(end for _, end in bounds(program.settings))
    rows = program.run("tail", "--from-start", "--limit", str(count)).rows
    errors = [row for row in rows if "error" in row]

    assert len(rows) == count
    assert {"session_opened", "token_chunk"} <= {row.get("kind") for row in rows}
    assert [(row["partition"], row["bytes"]) for row in errors] == [(2, len(POISON))]


def bounds(settings: Settings) -> list[tuple[int, int]]:
    """First and next offset of each partition."""
    log = open_log(settings.log, settings.data)
    with contextlib.closing(log):
        return [log.bounds(partition) for partition in range(log.partitions)]


def test_quarantine_keeps_what_does_not_read(program: Program) -> None:
    """A poisoned record is listed with its error, shown byte for byte, counted in the status, and stays after a requeue."""
    listed = program.run("quarantine", "list", "--format", "json").rows
    place = (str(listed[0]["partition"]), str(listed[0]["offset"]))
    page, raw, again = program.batch(
        ["quarantine", "show", *place], ["quarantine", "show", *place, "--raw"], ["quarantine", "requeue", ":".join(place)]
    )

    assert [(row["partition"], row["bytes"]) for row in listed] == [(2, len(POISON))]
    assert raw.stdout == POISON
    assert "c3 01 00" in page.text
    assert "requeued: 0" in again.text
    assert program.status["missing"]["quarantined"] == 1


def test_status_and_doctor(program: Program) -> None:
    """`status` has each part of the installation, `doctor storage` tries each for real and finds nothing bad."""
    shown, found = program.batch(["status", "--format", "json"], ["doctor", "storage", "--format", "json"])
    status, findings = json.loads(shown.stdout), {row["check"]: row["state"] for row in found.rows}

    assert status.keys() == {"running", "log", "storage", "watch", "alerts", "missing", "object_store", "checkpoint", "upstreams"}
    assert status["log"]["lag"] == sum(row["end"] - row["indexed"] for row in status["log"]["partitions"])
    assert status["storage"]["hot"]["events"] > 60
    assert findings.keys() == {"data directory", "room", "duckdb extensions", "log", "object store", "ledger key"}
    assert "bad" not in findings.values()


def test_dry_runs_change_nothing(tmp_path: Path) -> None:
    """`--dry-run` says what would be done and leaves every file as it was; the run itself then does it and is entered."""
    program = Program(tmp_path, Settings(data=tmp_path / "data"))
    for _ in range(2):
        log_conversations(program.settings, 3)
        program.run("index")
    hot = program.settings.data / "hot" / "shards"
    before = digests(hot)
    dry = program.batch(*([*words, "--dry-run"] for words in (["merge"], ["tier"], ["tier", "--now"], ["jobs", "run", "verify"])))

    assert [ran.text for ran in dry if "dry run" not in ran.text] == []
    assert digests(hot).items() >= before.items()
    assert not list((program.settings.data / "cold").rglob("*.parquet"))
    assert program.run("jobs", "history", "--format", "json").rows == []

    program.batch(["merge"], ["tier", "--now"], ["jobs", "run", "verify"])
    ran, last, jobs = program.batch(
        ["jobs", "history", "--format", "json"],
        ["jobs", "history", "--job", "tier", "--limit", "1", "--format", "json"],
        ["jobs", "list", "--format", "json"],
    )

    assert [(row["job"], row["trigger"], row["outcome"]) for row in ran.rows] == [
        (job, "hand", "ok") for job in ("verify", "tier", "merge")
    ]
    assert [row["job"] for row in last.rows] == ["tier"]
    assert {row["job"] for row in jobs.rows} == {
        *("merge", "tier", "checkpoint", "blobs", "snapshots", "witness", "verify"),
        *("retention", "erasures", "compact", "iceberg", "alerts"),
    }


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_rebuild_gives_the_same_answers(program: Program) -> None:
    """`rebuild` makes hot anew; digests are equal, answers too."""
    ask = "SELECT kind, count(*) AS n FROM events WHERE kind NOT IN ('access_logged', 'producer_heartbeat') GROUP BY kind ORDER BY kind"
    query = ["sql", ask, "--format", "json"]
    before, page, after = program.batch(query, ["rebuild"], query)

    assert after.rows == before.rows
    assert "differ: none" in page.text


def test_reader_that_leaves_is_no_error(program: Program) -> None:
    """A pipe whose reader has gone ends the command without a word."""
    writer = subprocess.Popen(
        program.command("tail", "--from-start", "--limit", "60"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=program.environment
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr is not None
    said = writer.stderr.read().decode()
    writer.stderr.close()
    writer.wait(60)

    assert said == ""


def test_surprise_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What nobody foresaw is one line too, with a way to see where it happened."""
    from tokentape.installation import Installation

    def broken(self: Installation) -> None:
        raise ZeroDivisionError("nobody foresaw this\nand more")

    monkeypatch.setattr(Installation, "freshen", broken)
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(tmp_path / "data"), "sessions"])
    said = capsys.readouterr().err.splitlines()

    assert ended.value.code == 1
    assert said[0] == "tokentape: sessions: unexpected ZeroDivisionError: nobody foresaw this"
    with pytest.raises(ZeroDivisionError):
        main(["--data", str(tmp_path / "data"), "--set", "logging.level=debug", "sessions"])


def test_logs_outlive_their_reader() -> None:
    """When whoever read standard error has gone, a line is lost and the program goes on."""
    script = (
        "import logging, os, structlog, sys; from schemas.settings import LoggingSettings; from tokentape.logs import configure;"
        "configure(LoggingSettings(), part='test'); structlog.get_logger().warning('seen'); sys.stderr.flush();"
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 2);"
        "structlog.get_logger().warning('unseen'); logging.getLogger('other').error('unseen'); print('alive', flush=True); os._exit(0)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert ended.stdout == "alive\n", ended.stderr
    assert "seen" in ended.stderr
    assert "Traceback" not in ended.stderr
