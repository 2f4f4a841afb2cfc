"""Blobs without an event: collected after their grace and not before, in a folder and in MinIO, whoever else is at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lifecycle.blobs import UnreferencedBlobs
from schemas.events import BlobRef, Message, RequestContent, RequestSubmitted
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id
from store.blobs import USES, BlobStore, key_of, mark_of
from store.log.base import Entry
from store.objects.base import ObjectStore
from tests.positions import put_position
from tests.program import Program
from tests.tiered import Tiered, tiered

LATER = timedelta(days=1)


class Installed:
    """An installation with blobs."""

    def __init__(self, parts: Tiered) -> None:
        self.parts = parts
        self.blobs = self.gateway()

    def gateway(self) -> BlobStore:
        """The blobs as a process sees them that has stored none yet."""
        return BlobStore(self.parts.objects, self.parts.settings.data)

    def put(self, text: str) -> BlobRef:
        """Store a blob."""
        return self.blobs.put("default", text.encode(), "application/json")

    def there(self, *refs: BlobRef) -> list[bool]:
        """Whether blobs are in the store."""
        return [self.parts.objects.head(key_of("default", ref.blob_id, ref.encoding)) is not None for ref in refs]

    def refer(self, content: RequestContent) -> None:
        """Record and index a request."""
        session = SessionContext(new_id(), "default", "gateway", "", "standard")
        payload = RequestSubmitted(generation_id=new_id(), endpoint="/v1/chat/completions", content=content)
        self.parts.ingest([self.parts.producer.entry(session, payload)])

    def job(self, objects: ObjectStore | None = None, *, since: datetime | None = None) -> UnreferencedBlobs:
        """The job at a time when what was unused `since` then is old; the index has caught up with that time."""
        since = since or datetime.now(UTC) + LATER
        for position in self.parts.catalog.positions():
            caught_up = {position.partition: (position.offset_next, int(since.timestamp() * 1_000_000))}
            self.parts.catalog.caught_up(position.log_id, caught_up)
        grace = timedelta(days=self.parts.settings.jobs.blobs_after_days)
        return UnreferencedBlobs(self.parts.settings, self.parts.catalog, objects or self.parts.objects, lambda: since + grace)


@pytest.fixture
def installed(deployment: Settings) -> Iterator[Installed]:
    """An installation of each deployment with one request on its tape."""
    with tiered(deployment) as parts:
        made = Installed(parts)
        made.refer(RequestContent(messages=[], parameters="{}"))
        yield made


def _message(**parts: Any) -> RequestContent:
    return RequestContent(messages=[Message(message_id=new_id(), role="user", **parts)], parameters="{}")


def test_what_no_event_names_goes(installed: Installed) -> None:
    """Blobs named in hot and cold, as a message, as parameters or in a text stay; the one that is not goes, once."""
    message, parameters, attachment, nobodys = (installed.put(text) for text in ("message", "parameters", "attachment", "nobody's"))
    installed.refer(_message(blob=message))
    installed.parts.tier()
    installed.refer(RequestContent(messages=[], parameters="", parameters_blob=parameters))
    installed.refer(_message(body=f'{{"image": "{mark_of(attachment)}"}}'))
    would = installed.job().run(dry_run=True)
    before = installed.there(nobodys)
    done, again = installed.job().run(), installed.job().run()

    assert (would["old"], would["unreferenced"], "collected" in would, before) == (4, 1, False, [True])
    assert (done["collected"], again["collected"], done["waits_for"]) == (1, 0, "")
    assert installed.there(message, parameters, attachment, nobodys) == [True, True, True, False]


def test_what_was_used_lately_stays(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob without an event is left for its days of grace, and for as many more whenever it is wanted again."""
    ref = installed.put("about to be named")
    (info,) = installed.parts.objects.list("blobs/")
    young = installed.job(since=info.modified_at).run()
    monkeypatch.setattr("store.blobs._today", lambda: date(2199, 1, 1))
    installed.put("about to be named")
    since = info.modified_at + timedelta(microseconds=1)
    used = installed.job(since=since).run()
    there = installed.there(ref)
    later = installed.job().run()

    assert (young["old"], used["old"], there) == (0, 0, [True])
    assert (later["collected"], list(installed.parts.objects.list(USES))) == (1, [])


class Racing:
    """An object store in which somebody stores a blob just before or just after it is deleted."""

    def __init__(self, objects: ObjectStore, store: Callable[[], object], *, first: bool) -> None:
        self._objects = objects
        self._store = store
        self._first = first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def delete(self, key: str) -> None:
        """Delete it, with the other one at work."""
        if self._first:
            self._store()
        self._objects.delete(key)
        if not self._first:
            self._store()


@pytest.mark.parametrize("first", [True, False])
def test_whoever_comes_first(installed: Installed, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """A gateway that wants a blob at the moment in which it is taken away finds it afterwards, whole."""
    ref = installed.put("wanted again")
    (info,) = installed.parts.objects.list("blobs/")
    since = info.modified_at + timedelta(microseconds=1)
    monkeypatch.setattr("store.blobs._today", lambda: date(2199, 1, 1))
    other = installed.gateway()
    racing: Any = Racing(installed.parts.objects, lambda: other.put("default", b"wanted again", "application/json"), first=first)
    installed.job(racing, since=since).run()

    assert installed.blobs.get("default", ref.blob_id) == b"wanted again"


def test_nothing_goes_while_events_may_be_unknown(installed: Installed) -> None:
    """An index that is behind, records in quarantine and segments that nobody knows keep everything where it is."""
    ref, job = installed.put("who knows"), installed.job()
    for position in installed.parts.catalog.positions():
        put_position(installed.parts.catalog, replace(position, caught_up_at=0))
    behind = job.run()
    job = installed.job()
    stray = "events/tenant=default/day=2026-01-01/standard-0-00000000.parquet"
    installed.parts.objects.create(stray, b"x")
    unknown = job.run()
    installed.parts.objects.delete(stray)
    installed.parts.ingest([Entry(0, new_id(), b"no event")])
    quarantined = installed.job().run()

    assert [summary["waits_for"].split()[0] for summary in (behind, unknown, quarantined)] == ["the", "segments", "records"]
    assert installed.there(ref) == [True]


def test_the_job_by_hand(tmp_path: Path) -> None:
    """`tokentape jobs` lists it and runs it."""
    program = Program(tmp_path, Settings(data=tmp_path / "data"))
    listed, ran = program.batch(["jobs", "list", "--format", "json"], ["jobs", "run", "blobs", "--dry-run"])

    assert "blobs" in {row["job"] for row in listed.rows}
    assert "unreferenced" in ran.text
