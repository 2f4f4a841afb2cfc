"""Blobs: one contract in a folder and in MinIO, and what the gateway does with large bodies, attachments and a store that is away."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from ingest.attachments import attachments
from replay.fold import fold
from schemas.errors import CorruptStore, UsageError
from schemas.events import RequestContent, RequestSubmitted
from schemas.settings import BlobSettings, ColdSettings, GatewaySettings, LogSettings, RecorderSettings, Settings
from scripts.native.processes import free_port
from store.blobs import MARK, BlobStore, key_of, with_blobs
from store.objects import open_store
from store.rows import StoredEvent
from tests.conftest import MinioService
from tests.gateway_rig import DONE, Peer, Rig, broken, chunk
from tests.program import Program, until
from tests.test_objects import nobody_at, settings_of

IMAGE = os.urandom(9_000)
URL = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
LONG = "Größe und Gewicht. " * 4_000
WITH_IMAGE: dict[str, Any] = {
    "role": "user",
    "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": URL}}],
}


async def _answer(peer: Peer) -> None:
    await peer.begin_chunked()
    await peer.chunk(chunk("Yes.", finish="stop") + DONE)
    await peer.chunk(b"")


class BlobCase:
    """What holds in every store."""

    @pytest.fixture
    def cold(self) -> ColdSettings:
        raise NotImplementedError

    @pytest.fixture
    def blobs(self, cold: ColdSettings, tmp_path: Path) -> BlobStore:
        return BlobStore(open_store(cold, tmp_path), tmp_path)

    def test_round_trip(self, blobs: BlobStore) -> None:
        """Text is compressed, an image is not; both come back, and storing again changes nothing."""
        text, image = blobs.put("acme", LONG.encode(), "application/json"), blobs.put("acme", IMAGE, "image/png")

        assert (text.encoding, image.encoding) == ("zstd", "none")
        assert blobs.put("acme", LONG.encode(), "application/json") == text
        assert blobs.get("acme", text.blob_id) == LONG.encode()
        assert blobs.get("acme", image.blob_id) == IMAGE

    def test_names_are_keyed(self, blobs: BlobStore, cold: ColdSettings, tmp_path: Path) -> None:
        """Another tenant has another name for the same bytes; the same tenant has one in every process."""
        mine, other = blobs.put("acme", IMAGE, "image/png"), blobs.put("other", IMAGE, "image/png")
        again = BlobStore(open_store(cold, tmp_path), tmp_path).put("acme", IMAGE, "image/png")

        assert mine.blob_id != other.blob_id
        assert again == mine
        with pytest.raises(KeyError):
            blobs.get("other", mine.blob_id)

    def test_damage_is_named(self, blobs: BlobStore, cold: ColdSettings, tmp_path: Path) -> None:
        """Bytes that do not give the name are not passed off as the blob."""
        ref = blobs.put("acme", LONG.encode(), "application/json")
        store, key = open_store(cold, tmp_path), key_of("acme", ref.blob_id, "zstd")
        store.delete(key)
        store.create(key, b"something else")

        with pytest.raises(CorruptStore, match="damaged"):
            blobs.get("acme", ref.blob_id)

    def test_unknown_names(self, blobs: BlobStore) -> None:
        """One clear line for a name that is none, and for one that nothing has."""
        with pytest.raises(UsageError, match="is no blob id"):
            blobs.find("acme", "abc")
        with pytest.raises(UsageError, match="tenant acme has no blob"):
            blobs.find("acme", "0" * 64)

    @pytest.mark.parametrize("mode", ["block", "strict"])
    def test_a_conversation_with_large_parts(self, cold: ColdSettings, tmp_path: Path, mode: str) -> None:
        """Large bodies, attachments and parameters are blobs when the event is in the log, once each, and are put back for readers."""
        tools = [{"type": "function", "function": {"name": "f", "description": LONG}}]
        messages = [WITH_IMAGE, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": LONG}]
        with broken(_answer) as upstream, gateway(tmp_path, upstream.url, cold, mode=mode) as rig:
            for count in (1, 3):
                rig.post({"model": "m", "messages": messages[:count], "tools": tools, "stream": True}, x_tokentape_session=SESSION)
            events = until(lambda: found if len(requests(found := rig.events())) == 2 else None)
        first, second = requests(events)
        store = open_store(cold, tmp_path)
        stored = [StoredEvent(event, "", 0, place, 0) for place, event in enumerate(events)]
        whole = fold(with_blobs(stored, lambda: BlobStore(store, tmp_path), attachments=True))
        last = list(whole.generations.values())[-1]

        assert [message.blob is not None for message in (*first.messages, *second.messages)] == [False, False, True]
        assert len(MARK.findall(first.messages[0].body or "")) == 1
        assert first.parameters == ""
        assert first.parameters_blob == second.parameters_blob
        assert len(list(store.list("blobs/"))) == 3
        assert max(len(framed) for framed in rig_frames(events)) < 4_000
        document = whole.submitted(last)
        assert document is not None
        assert document["messages"] == messages
        assert document["tools"] == tools


class TestLocal(BlobCase):
    @pytest.fixture
    def cold(self) -> ColdSettings:
        return ColdSettings()


class TestMinio(BlobCase):
    @pytest.fixture
    def cold(self, minio: MinioService) -> ColdSettings:
        return settings_of(minio, lock="none")


SESSION = "00000000-0000-7000-8000-000000000007"


@contextmanager
def gateway(data: Path, upstream: str, cold: ColdSettings, *, mode: str = "block", **blobs: Any) -> Iterator[Rig]:
    """A gateway with a store."""
    settings = Settings(
        data=data,
        gateway=GatewaySettings(port=0, upstream=upstream),
        log=LogSettings(partitions=2),
        cold=cold,
        blobs=BlobSettings(**blobs),
        recorder=RecorderSettings.model_validate({"mode": mode, "coalesce_ms": 5.0}),
    )
    rig = Rig(settings)
    try:
        assert rig.error is None, rig.error
        yield rig
    finally:
        rig.close()


def requests(events: list[Any]) -> list[RequestContent]:
    """The contents of all requests."""
    return [event.payload.content for event in events if isinstance(event.payload, RequestSubmitted) and event.payload.content]


def rig_frames(events: list[Any]) -> list[bytes]:
    """The events' payloads as JSON, to see how large they are."""
    return [event.payload.model_dump_json().encode() for event in events]


@pytest.mark.parametrize("mode", ["shed", "block", "strict"])
def test_a_store_that_is_away_loses_nothing(tmp_path: Path, mode: str) -> None:
    """The bodies stay in their events, whole, and no request waits longer than the store is given."""
    with broken(_answer) as upstream, gateway(tmp_path, upstream.url, nobody_at(free_port()), mode=mode, wait_s=0.5) as rig:
        for text in (LONG, LONG + "!"):
            assert rig.post({"messages": [{"role": "user", "content": text}, WITH_IMAGE], "stream": True}).status_code == 200
        events = until(lambda: found if len(requests(found := rig.events())) == 2 else None)

    found = sorted(requests(events), key=lambda content: len(content.messages[0].body or ""))
    for content, text in zip(found, (LONG, LONG + "!"), strict=True):
        assert [orjson.loads(message.body or "") for message in content.messages] == [{"role": "user", "content": text}, WITH_IMAGE]


def test_a_store_that_went_away_later_leaves_references(tmp_path: Path) -> None:
    """A session whose blobs are gone still folds; what is missing says where it was."""
    with broken(_answer) as upstream, gateway(tmp_path, upstream.url, ColdSettings()) as rig:
        rig.post({"messages": [{"role": "user", "content": LONG}], "stream": True})
        events = rig.wait_for("generation_finished")
    shutil.rmtree(tmp_path / "cold" / "blobs")
    blobs = BlobStore(open_store(ColdSettings(), tmp_path), tmp_path)
    stored = [StoredEvent(event, "", 0, place, 0) for place, event in enumerate(events)]
    state = fold(with_blobs(stored, lambda: blobs))
    document = state.submitted(next(iter(state.generations.values())))

    assert document is not None
    assert document["messages"][0]["content"].startswith("[blob ")


def test_what_is_an_attachment() -> None:
    """Data URLs, OpenAI's audio, Anthropic's and Gemini's sources; neither short ones nor base64 that would not come back the same."""
    written = base64.b64encode(IMAGE).decode()
    parts: dict[str, Any] = {
        "image/png": {"url": URL},
        "audio/wav": {"data": written, "format": "wav"},
        "image/webp": {"type": "base64", "media_type": "image/webp", "data": written},
        "image/gif": {"inlineData": {"mimeType": "image/gif", "data": written}},
    }
    left = [{"url": "data:image/png;base64,AAAA"}, {"data": written[:-4] + "\n" + written[-4:], "format": "wav"}, {"data": written}]

    for media_type, part in parts.items():
        assert list(attachments(orjson.dumps([part]).decode())) == [(written, IMAGE, media_type)]
    assert list(attachments(orjson.dumps(left).decode())) == []


def test_the_commands_read_blobs(tmp_path: Path) -> None:
    """`show` prints what is in a blob, SQL names it, `blob` gives its bytes, and a wrong name is one line."""
    with broken(_answer) as upstream, gateway(tmp_path / "data", upstream.url, ColdSettings()) as rig:
        rig.post({"messages": [{"role": "user", "content": LONG}, WITH_IMAGE], "stream": True}, x_tokentape_session=SESSION)
        rig.wait_for("generation_finished")
    program = Program(tmp_path, rig.settings)
    rows = program.sql("SELECT blob_id, attachments FROM messages ORDER BY position")
    shown, body, image = program.batch(["show", SESSION, "--full"], ["blob", rows[0]["blob_id"]], ["blob", rows[1]["attachments"][0]])

    assert LONG.split(".")[0] in shown.stdout.decode()
    assert orjson.loads(body.stdout) == {"role": "user", "content": LONG}
    assert image.stdout == IMAGE
    assert "is no blob id" in program.fails("blob", "xyz", code=2)
