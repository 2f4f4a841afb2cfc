"""Case files: made in both deployments, checked by their own verifier where nothing but `cryptography` can be imported."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cryptography
import pytest

from lifecycle.erasure import Erasures
from replay.timeline import timeline
from replay.timeline_html import session_page
from schemas import events
from schemas.errors import UnknownSession
from schemas.settings import ColdSettings, Settings
from scripts.native import tools
from store.blobs import BlobStore
from store.control import open_control
from store.ledger.rotation import rotate
from tests.eventgen import conversation
from tests.program import invoke
from tests.tape import Tape, incident
from tests.tiered import Tiered, tiered
from tokentape.casefile import archive
from tokentape.casefile import verify as verifier
from tokentape.casefile.archive import CaseWriter, Made
from tokentape.installation import Installation

SCRIPT = Path(verifier.__file__)
HOSTILE = '</td></table><script>document.title="owned"</script><img src=x onerror=alert(1)> \x1b[31m \u202eevil & "quoted" \'single\''


def _talk(rig: Tiered, blobs: BlobStore | None = None) -> bytes:
    """One session with a hostile message, a large body in a blob where there is a store, and a failure; its id."""
    context = rig.producer.session()
    entries = list(conversation(rig.producer, chunks=6, session=context))
    generation = rig.producer.rng.randbytes(16)
    large = events.Message(message_id=rig.producer.rng.randbytes(16), role="user", body=json.dumps({"role": "user", "content": HOSTILE}))
    messages = [large]
    if blobs is not None:
        ref = blobs.put("acme", json.dumps({"role": "user", "content": "large " * 9000}).encode(), "application/json")
        messages.append(events.Message(message_id=rig.producer.rng.randbytes(16), role="user", blob=ref))
    content = events.RequestContent(messages=messages, parameters='{"model": "tiny"}')
    request = events.RequestSubmitted(
        generation_id=generation,
        endpoint="/v1/chat/completions",
        model="tiny",
        stream=True,
        message_ids=[message.message_id for message in messages],
        content=content,
    )
    failed = events.GenerationFailed(
        generation_id=generation, error_type="upstream_timeout", origin="upstream", content=events.FailureContent(message=HOSTILE)
    )
    rig.ingest([*entries, rig.producer.entry(context, request), rig.producer.entry(context, failed)])
    return context.session_id


@dataclass(frozen=True)
class Checked:
    """What the verifier said."""

    code: int
    said: dict[str, Any]

    @property
    def kinds(self) -> set[str]:
        return {item["kind"] for item in self.said.get("findings", [])}


def check(case: Path, key: Path | None = None, script: Path = SCRIPT) -> Checked:
    """Run the verifier with nothing on its path but the standard library and `cryptography`."""
    alone = case.parent / "alone"
    if not alone.exists():
        alone.mkdir()
        site = Path(cryptography.__file__).parents[1]
        for name in ("cryptography", "cffi", "_cffi_backend"):
            for found in site.glob(f"{name}*"):
                if not found.name.endswith("-info"):
                    (alone / found.name).symlink_to(found)
    run = "import sys, runpy; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [sys.argv[1]]; script = sys.argv[2]; "
    run += "sys.argv = sys.argv[2:]; runpy.run_path(script, run_name='__main__')"
    words = [sys.executable, "-I", "-S", "-c", run, str(alone), str(script), str(case), "--json", *(["--key", str(key)] if key else [])]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, cwd="/")
    assert "Traceback" not in ran.stderr, ran.stderr
    return Checked(ran.returncode, json.loads(ran.stdout) if ran.stdout else {"complaint": ran.stderr})


def _made(settings: Settings, sessions: list[bytes], out: Path) -> Made:
    with Installation(settings) as installation:
        return CaseWriter(installation).write(sessions, out)


@dataclass(frozen=True)
class Case:
    """A case of two sessions whose key was rotated in between; made once."""

    path: Path
    key: Path
    made: Made
    settings: Settings
    sessions: list[bytes]

    def changed(self, folder: Path, changes: dict[str, bytes | None]) -> Path:
        """A copy of the archive with some members replaced, or left out."""
        out = folder / "changed.zip"
        with zipfile.ZipFile(self.path) as old, zipfile.ZipFile(out, "w") as new:
            for name in old.namelist():
                data = changes.get(name, b"") if name in changes else old.read(name)
                if data is not None:
                    new.writestr(name, data)
            for name in changes.keys() - set(old.namelist()):
                new.writestr(name, changes[name] or b"")
        return out


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Made once: nothing in here changes it."""
    folder = tmp_path_factory.mktemp("case")
    settings = Settings(data=folder / "data", cold=ColdSettings(lock="none"))
    with tiered(settings) as rig:
        sessions = [_talk(rig, BlobStore(rig.objects, settings.data))]
        rig.tier()
        rotate(settings, rig.objects)
        sessions.append(_talk(rig))
        rig.tier()
        made = _made(settings, sessions, folder / "case.zip")
        yield Case(folder / "case.zip", settings.data / "keys" / "ledger.pub", made, settings, sessions)


def test_both_deployments(deployment: Settings, tmp_path: Path) -> None:
    """Cold sessions are proven, one that is hot still is told as that; the archive is good without tokentape."""
    with tiered(deployment) as rig:
        cold = [_talk(rig, BlobStore(rig.objects, deployment.data)), _talk(rig)]
        rig.tier()
        hot = _talk(rig)
        made = _made(deployment, [*cold, hot], tmp_path / "case.zip")
        found = check(tmp_path / "case.zip", deployment.data / "keys" / "ledger.pub")

        assert (made.sessions, made.events, made.unproven, made.absent) == (3, 45, 15, 0)
        assert (found.code, found.said["events"], found.kinds) == (0, 30, {"not-in-ledger"})


def test_what_is_in_it(case: Case, tmp_path: Path) -> None:
    """Everything that the README of the archive lists, the blob's own bytes, and a verifier that works from the unpacked folder."""
    with zipfile.ZipFile(case.path) as opened:
        names = set(opened.namelist())
        opened.extractall(tmp_path / "case")
    (blob,) = [name for name in names if name.startswith("blobs/acme/")]
    lines = [json.loads(line) for path in (tmp_path / "case").rglob("events.jsonl") for line in path.read_text().splitlines()]
    found = check(tmp_path / "case", case.key, tmp_path / "case" / "verify.py")

    assert json.loads((tmp_path / "case" / blob).read_text())["content"].startswith("large large")
    assert {line["event"]["session_id"] for line in lines} == {session.hex() for session in case.sessions}
    assert {"README.txt", "index.html", "verify.py", "ledger.pub", "ledger.json", "checkpoint.txt", "manifest.json"} <= names
    assert (found.code, found.said["events"], found.said["findings"]) == (0, case.made.events, [])
    assert found.said["members"] == len(names) - 2


def test_one_byte_in_each_member(case: Case, tmp_path: Path) -> None:
    """Whichever member has one byte changed, the case is refused as modified and that member, or what hangs on it, is named."""
    with zipfile.ZipFile(case.path) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    wrong = {}
    for number, (name, data) in enumerate(members.items()):
        bent = bytearray(data)
        bent[len(bent) * 2 // 3] ^= 1
        found = check(case.changed(tmp_path, {name: bytes(bent)}), case.key)
        if found.code not in (10, 12) or not any(
            name in item["member"] + item["detail"] or name == "ledger.json" for item in found.said["findings"]
        ):
            wrong[number, name] = found

    assert wrong == {}
    assert len(members) > 15


def test_each_fault_has_its_name(case: Case, tmp_path: Path) -> None:
    """A member left out, one too many, an event cut out, another key, a stranger's signature, bytes that are no archive."""
    with zipfile.ZipFile(case.path) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    proofs = next(name for name in members if name.endswith("proofs.json"))
    timeline_of = next(name for name in members if name.endswith("timeline.html"))
    fewer = json.loads(members[proofs])
    fewer["events"] = fewer["events"][1:]
    other = tmp_path / "other.pub"
    with tiered(Settings(data=tmp_path / "other")) as rig:
        other.write_text(f"{rig.ledger.verifier}\n")
    (tmp_path / "none.zip").write_bytes(b"no archive")

    assert check(case.changed(tmp_path, {timeline_of: None}), case.key).kinds == {"missing"}
    assert check(case.changed(tmp_path, {"extra.txt": b"x"}), case.key).kinds == {"modified"}
    assert check(case.changed(tmp_path, {proofs: json.dumps(fewer).encode()}), case.key).kinds == {"modified", "missing"}
    assert check(case.path, other).code == 12
    assert check(case.path).code == 0
    assert check(tmp_path / "none.zip", case.key).code == 2


@pytest.mark.parametrize(("text", "fault"), [("nonsense", "not a public key"), ("", "it holds no public key"), (None, "No such file")])
def test_a_key_that_cannot_be_read(case: Case, tmp_path: Path, text: str | None, fault: str) -> None:
    """It is the key that is named, not the case; and no key is not the one in the archive."""
    key = tmp_path / "bad.pub"
    if text is not None:
        key.write_text(text)
    found = check(case.path, key)

    assert (found.code, found.said["complaint"].startswith(f"no public key that can be read: {key}: {fault}")) == (2, True)


def test_rows_of_json_are_held_against_bytes(case: Case, tmp_path: Path) -> None:
    """Whoever holds the key and signs a JSON that says something else than the events is found out by the bytes."""
    from store.ledger.keys import load
    from store.ledger.note import sign_note

    with zipfile.ZipFile(case.path) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    name = next(name for name in members if name.endswith("events.jsonl"))
    forged = members[name].replace(b'"tenant": "acme"', b'"tenant": "acne"', 1)
    manifest = json.loads(members["manifest.json"])
    manifest["members"][name] = hashlib.sha256(forged).hexdigest()
    data = json.dumps(manifest).encode()
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    note = sign_note(f"{archive.SIGNED_LINE}\n{digest}\n", load(case.settings.data / "keys"))
    found = check(case.changed(tmp_path, {name: forged, "manifest.json": data, "manifest.sig": note}), case.key)

    assert found.code == 10
    assert ["its line in events.jsonl says something else than its bytes"] == [item["detail"] for item in found.said["findings"]]


def test_erased_with_proof(settings_embedded: Settings, tmp_path: Path) -> None:
    """After an erasure the same session's case is good, without a word of its content, and says what was erased."""
    settings = settings_embedded.model_copy(update={"cold": ColdSettings(lock="none")})
    with tiered(settings) as rig:
        session = _talk(rig)
        rig.tier()
        control = open_control(settings)
        erasures = Erasures(rig.tiering(), rig.log, control)
        erasures.approve(erasures.request((session.hex(),), None, by="ada", reason="asked"), by="bob")
        control.close()
        _made(settings, [session], tmp_path / "case.zip")
    found = check(tmp_path / "case.zip", settings.data / "keys" / "ledger.pub")
    with zipfile.ZipFile(tmp_path / "case.zip") as opened:
        everything = b"".join(opened.read(name) for name in opened.namelist())

    assert (found.code, found.kinds) == (0, {"erased-with-proof"})
    assert b"owned" not in everything


def test_the_page_is_inert() -> None:
    """A hostile text stays text: no markup of it, no script, nothing from elsewhere."""
    tape = Tape()
    context = events.SessionContent(title=HOSTILE)
    tape.add(events.SessionOpened(client=HOSTILE, user=HOSTILE, tags=[HOSTILE], content=context), 0)
    generation = tape.request("g", [{"role": HOSTILE, "content": HOSTILE}], 5, model=HOSTILE)
    tape.started(generation, 9, 2)
    tape.tokens(generation, 9, [5.0], [HOSTILE])
    failed = events.FailureContent(message=HOSTILE)
    tape.add(events.GenerationFailed(generation_id=generation, error_type=HOSTILE, origin="upstream", content=failed), 30)
    page = session_page(timeline(tape.events))
    tags = {part.split(">")[0].split()[0].strip("/") for part in page.split("<")[1:]}

    assert tags <= {
        *("!doctype", "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "div", "code", "b", "span", "table"),
        *("thead", "tbody", "tr", "th", "td", "q", "svg", "rect", "text", "details", "summary", "pre"),
    }
    assert "http://" not in page.replace("http-equiv", "")
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page


def test_the_page_tells_the_incident(tmp_path: Path) -> None:
    """In a browser: every row of the timeline is there, nothing is loaded, and the title is the session's."""
    made = timeline(incident().events, rows_max=None)
    page = tmp_path / "timeline.html"
    page.write_text(session_page(made))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    words = [tools.chromium(print), "--headless", "--no-sandbox", "--disable-gpu", profile, "--dump-dom", page.as_uri()]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, timeout=90)

    assert ran.stdout.count('<td class="what">') == len(made.rows)
    assert "<title>Morning slowness, ticket 4711</title>" in ran.stdout
    assert ran.stdout.count(">FAILED<") == made.failures == 2


class TestCommand:
    """`tokentape case` as a person uses it."""

    def test_by_name_and_by_condition(self, case: Case, tmp_path: Path) -> None:
        """The same two sessions either way; each is recorded as an access."""
        ids = [session.hex() for session in case.sessions]
        named = invoke(case.settings, "case", *ids, "-o", str(tmp_path / "a.zip"))
        where = invoke(case.settings, "case", "--where", "tenant = 'acme'", "-o", str(tmp_path / "b.zip"))
        said = invoke(case.settings, "sql", "SELECT count(*) AS n FROM events WHERE access_logged.operation = 'case'", "--format", "json")

        assert (named.exit_code, where.exit_code) == (0, 0), named.output + where.output
        assert "a.zip: 2 sessions, 30 events" in named.output
        assert [check(tmp_path / name, case.key).said["events"] for name in ("a.zip", "b.zip")] == [30, 30]
        assert json.loads(said.stdout)["n"] == 2

    @pytest.mark.parametrize(
        ("words", "code", "line"),
        [
            ((), 2, "nothing says which sessions"),
            (("--where", "true", "abcd"), 2, "exclude each other"),
            (("--where", "1 = 0"), 2, "no session meets"),
            (("--where", "nonsense("), 4, "query"),
            (("ffffffff",), 3, "no session ffffffff"),
        ],
    )
    def test_mistakes(self, case: Case, tmp_path: Path, words: tuple[str, ...], code: int, line: str) -> None:
        """One line each, and no archive is left."""
        ran = invoke(case.settings, "case", *words, "-o", str(tmp_path / "x.zip"))

        assert (ran.exit_code, line in ran.output) == (code, True), ran.output
        assert list(tmp_path.iterdir()) == []

    def test_evidence_is_not_written_over(self, case: Case, tmp_path: Path) -> None:
        """A file that is there stays as it is, unless one insists."""
        target = tmp_path / "case.zip"
        target.write_bytes(b"older evidence")
        words = ("case", case.sessions[0].hex(), "-o", str(target))
        refused, kept = invoke(case.settings, *words), target.read_bytes()
        forced = invoke(case.settings, *words, "--force")

        assert (refused.exit_code, kept) == (2, b"older evidence")
        assert "is there already" in refused.output
        assert forced.exit_code == 0, forced.output
        assert check(target, case.key).said["events"] == 15


def test_nothing_known(case: Case, tmp_path: Path) -> None:
    """A case of sessions that do not exist is refused, and leaves no file."""
    with pytest.raises(UnknownSession):
        _made(case.settings, [bytes(16)], tmp_path / "case.zip")

    assert os.listdir(tmp_path) == []
