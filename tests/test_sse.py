"""The parser of server-sent events against a reference, however the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.gateway import sse
from ingest.gateway.sse import BOM, EventParser, EventTooLong


def reference(stream: bytes) -> list[bytes]:
    """The data of each event as the standard reads a whole stream: no splits, line by line."""
    lines = stream.removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    events: list[bytes] = []
    data: list[bytes] = []
    for line in lines[:-1]:
        if not line:
            events += [b"\n".join(data)] if data else []
            data = []
        elif line.partition(b":")[0] == b"data":
            data.append(line.partition(b":")[2].removeprefix(b" "))
    return events


def parse(pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    """The data of each event and all raw bytes of the pieces."""
    parser = EventParser()
    blocks = [block for piece in pieces for block in parser.feed(piece)]
    return [block.data for block in blocks if block.data is not None], b"".join(block.raw for block in blocks)


_LINES = st.sampled_from(
    [
        b"data: {}",
        b"data:x",
        b"data",
        b"data:  two",
        b": a comment",
        b"",
        b"",
        b"",
        b"event: e",
        b"datax: n",
        "data: größer 😀".encode(),
        b"data: \xff",
    ]
)
_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@st.composite
def cut_streams(draw: st.DrawFn, ends: st.SearchStrategy[bytes]) -> list[bytes]:
    """A stream of lines, cut anywhere, also inside a character or a CRLF."""
    lines = draw(st.lists(st.tuples(_LINES, ends), max_size=24))
    stream = draw(st.sampled_from([b"", BOM])) + b"".join(line + end for line, end in lines)
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


class TestEventParser:
    @given(cut_streams(st.just(b"\n")))
    def test_any_split_with_line_feeds(self, pieces: list[bytes]) -> None:
        """However a stream of LF lines is cut, its events are those of the whole."""
        assert parse(pieces)[0] == reference(b"".join(pieces))

    @given(cut_streams(_ENDS))
    def test_any_split_with_mixed_line_ends(self, pieces: list[bytes]) -> None:
        """The same where LF, CR and CRLF are mixed."""
        assert parse(pieces)[0] == reference(b"".join(pieces))

    @given(cut_streams(_ENDS))
    def test_raw_bytes_are_kept(self, pieces: list[bytes]) -> None:
        """The raw bytes of all blocks and the rest are the stream itself."""
        parser = EventParser()
        raw = b"".join(block.raw for piece in pieces for block in parser.feed(piece))
        rest = parser.close()

        assert (raw + (rest.raw if rest else b"")).rstrip(b"\r\n") == b"".join(pieces).rstrip(b"\r\n")

    def test_one_byte_at_a_time(self) -> None:
        """A stream that comes byte by byte gives each event as soon as its last byte is there."""
        parser = EventParser()
        stream = b'data: {"a":1}\n\ndata: [DONE]\n\n'
        seen = [(at, block.data) for at, byte in enumerate(stream) for block in parser.feed(bytes([byte]))]

        assert seen == [(14, b'{"a":1}'), (28, b"[DONE]")]

    def test_half_a_line_is_left(self) -> None:
        """What has no blank line behind it comes out at the end only."""
        parser = EventParser()
        blocks = parser.feed(b'data: 1\n\ndata: {"cho')
        rest = parser.close()

        assert [block.data for block in blocks] == [b"1"]
        assert rest is not None
        assert rest.data == b'{"cho'

    def test_endless_event_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An upstream that never ends a line cannot fill the memory."""
        monkeypatch.setattr(sse, "EVENT_BYTES_MAX", 100)
        parser = EventParser()
        with pytest.raises(EventTooLong):
            parser.feed(b"data: " + b"x" * 100)
