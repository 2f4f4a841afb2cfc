"""Sessions read back as events, from shards and segments, whatever stands between them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr

from schemas.errors import CorruptStore, StoreUnavailable, UnknownSession, UsageError
from schemas.events import Event, GenerationFailed, RequestSubmitted, SessionContent, SessionOpened
from schemas.settings import ColdSettings, Settings
from store.catalog import Catalog, open_catalog
from store.objects import open_store
from store.objects.base import ObjectStore
from store.reader import EventReader
from tests.conftest import MinioService
from tests.stored import put_cold, put_hot

START = 1_795_442_717_000_000


def _id(number: int) -> bytes:
    return bytes([number]) * 8 + bytes(8)


def _event(session: int, place: int, tenant: str = "acme") -> Event:
    payloads = [
        SessionOpened(content=SessionContent(title=f"session {session}")),
        RequestSubmitted(generation_id=_id(session), endpoint="/v1/chat/completions"),
        GenerationFailed(generation_id=_id(session), error_type="shutdown", origin="gateway"),
    ]
    return Event(
        event_id=bytes([session, place]) * 8,
        session_id=_id(session),
        salt=bytes(16),
        tenant=tenant,
        source="gateway",
        producer_id=bytes(8),
        producer_seq=place,
        recorded_at=START + session * 1_000_000 + place,
        payload=payloads[place % 3],
    )


def _events(*sessions: int, start: int = 0, count: int = 3, tenant: str = "acme") -> list[Event]:
    return [_event(session, place, tenant) for place in range(start, start + count) for session in sessions]


@dataclass
class Rig:
    """An installation and its reader."""

    settings: Settings
    catalog: Catalog
    objects: ObjectStore
    reader: EventReader
    folder: Path


@pytest.fixture
def rig(deployment: Settings, tmp_path: Path) -> Iterator[Rig]:
    """Sessions 1 to 3 begin in a segment and go on in two shards; 4 is only cold, 5 only hot, 6 the platform's."""
    catalog, objects = open_catalog(deployment.data), open_store(deployment.cold, deployment.data)
    put_cold(catalog, objects, tmp_path, _events(1, 2, 3, 4), tenant="acme")
    put_hot(catalog, "one", _events(1, 2, 3, start=3) + _events(5), offset=100)
    put_hot(catalog, "two", _events(1, 2, 3, start=6) + _events(6, tenant="_platform"), offset=200)
    reader = EventReader(deployment, catalog, objects)
    yield Rig(deployment, catalog, objects, reader, tmp_path)
    reader.close()


def test_session_is_read_in_the_order_of_the_log(rig: Rig) -> None:
    """Every event of a session comes once, cold ones first, and none of another session."""
    for session, expected in ((1, 9), (2, 9), (3, 9), (4, 3), (5, 3)):
        found = list(rig.reader.session(_id(session)))

        assert [stored.event for stored in found] == [_event(session, place) for place in range(expected)]
        assert [stored.offset for stored in found] == sorted(stored.offset for stored in found)


def test_look_up_equals_a_full_scan(rig: Rig) -> None:
    """Reading each session gives together every row: no zone map, bloom filter or row group loses one."""
    found = [stored.event.event_id for session in range(10) for stored in rig.reader.session(_id(session))]

    assert sorted(found) == sorted(event.event_id for event in (*_events(1, 2, 3, count=9), *_events(4), *_events(5), *_events(6)))


def test_unknown_session_is_empty(rig: Rig) -> None:
    """No event, no error."""
    assert list(rig.reader.session(bytes(16))) == []


def test_session_is_found_by_any_unique_beginning(rig: Rig) -> None:
    """A UUID in either case, its digits, or the first of them."""
    text = str(uuid.UUID(bytes=_id(4)))

    assert [rig.reader.find(name) for name in (text, text.upper(), text.replace("-", ""), text[:10], "04", " 0404 ")] == [_id(4)] * 6


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("ff", UnknownSession, "no session ff"),
        ("0", UsageError, "more than one"),
        ("x1", UsageError, "no session id"),
        ("", UsageError, "no session id"),
        ("0" * 33, UsageError, "no session id"),
    ],
)
def test_what_names_no_session_is_said(rig: Rig, text: str, error: type[Exception], words: str) -> None:
    """Unknown, ambiguous and malformed names are told apart."""
    with pytest.raises(error, match=words):
        rig.reader.find(text)


def test_recent_sessions_come_newest_first(rig: Rig) -> None:
    """The latest events decide; the cold tier is asked when hot has too few; the platform's own are left out."""
    two, all_ = rig.reader.recent(2), rig.reader.recent()

    assert [summary.session_id for summary in two] == [_id(5), _id(3)]
    assert [summary.session_id for summary in all_] == [_id(number) for number in (5, 4, 3, 2, 1)]
    assert (all_[2].events, all_[2].requests, all_[2].failures, all_[2].title, all_[2].started_at) == (
        9,
        3,
        3,
        "session 3",
        START + 3_000_000,
    )
    assert [summary.session_id for summary in rig.reader.recent(tenant="_platform")] == [_id(6)]


def test_merged_shards_are_followed(rig: Rig) -> None:
    """After shards were merged and their files removed, a reader that had them open goes on with the new one."""
    before = [stored.event for stored in rig.reader.session(_id(1))]
    gone = [shard for shard, _ in rig.catalog.shards()]
    put_hot(rig.catalog, "merged", _events(1, 2, 3, start=3, count=6) + _events(5), offset=300)
    rig.catalog.swap(retire=[shard.name for shard in gone if shard.name != "merged"])
    for shard in gone:
        shard.path.unlink()

    assert [stored.event for stored in rig.reader.session(_id(1))] == before


def test_vanished_shard_is_an_error_with_a_cure(rig: Rig) -> None:
    """A file that the catalog still lists but is gone cannot be read around."""
    for shard, _ in rig.catalog.shards():
        shard.path.unlink()
    with pytest.raises(CorruptStore, match=r"one\.duckdb|two\.duckdb") as caught:
        list(rig.reader.session(_id(1)))

    assert "rebuild" in caught.value.hint


def test_store_that_is_away_is_said(tmp_path: Path, minio_private: MinioService) -> None:
    """A cold read while the object store is down names the store, without its URL's signature, and works again afterwards."""
    cold = ColdSettings(
        kind="minio",
        endpoint=minio_private.endpoint,
        bucket="away",
        access_key=minio_private.access_key,
        secret_key=SecretStr(minio_private.secret_key),
    )
    settings = Settings(data=tmp_path / "data", cold=cold)
    catalog, objects = open_catalog(settings.data), open_store(settings.cold, settings.data)
    put_cold(catalog, objects, tmp_path, _events(1), tenant="acme")
    reader = EventReader(settings, catalog, objects)
    minio_private.stop()
    try:
        with pytest.raises(StoreUnavailable) as caught:
            list(reader.session(_id(1)))
    finally:
        minio_private.start()

    assert "X-Amz" not in str(caught.value)
    assert len(list(reader.session(_id(1)))) == 3
    reader.close()
