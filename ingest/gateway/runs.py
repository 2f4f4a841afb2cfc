"""Runs of tokens: the events of one network read taken at once, where each has the shape that vLLM gives nearly every event.

A fast engine's tokens arrive several to a read. Read one by one each costs a dictionary of twenty objects, which is most of
what a stream costs; as a run they cost one match each and one reading of JSON for all. Whatever has another shape, and
whatever that reading refuses, is left to the reader of single events, so a run MUST mean what its events mean one by one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import orjson

_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"'
_SHAPE = re.compile(
    rb'(data: \{"id":"[^"\\\x00-\x1f]*","object":"chat\.completion\.chunk","created":\d+,"model":"[^"\\\x00-\x1f]*",'
    rb'"choices":\[\{"index":0,"delta":\{"content":((?!"")%b)\},"logprobs":)'
    rb'(\{"content":\[\{"token":%b,"logprob":([^,]+),"bytes":(?:null|\[[\d,]*\]),"top_logprobs":\[\]\}\]\})'
    rb',"finish_reason":null,"token_ids":(\[(\d+)\])\}\]\}\n\n' % (_STRING, _STRING)
)

_HIDDEN = b'null,"finish_reason":null,"token_ids":null}]}\n\n'
"""What stands behind the head of an event of which a client sees neither logprobs nor ids."""

_GROUPS = re.Match.groups


class Run(NamedTuple):
    """Consecutive tokens of sequence 0, all content: the columns have one entry per token."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    logprobs: tuple[float, ...]


class RunReader:
    """Takes runs out of what an upstream sent, and writes them for a client that did not ask for all of it."""

    def __init__(self, *, hide_ids: bool, hide_logprobs: bool) -> None:
        self._hide_ids = hide_ids
        self._hide_logprobs = hide_logprobs

    def read(self, data: bytes) -> tuple[Run, bytes, bytes] | None:
        """The run with which the data begins, the bytes of it for the client, and the rest of the data; None if with none."""
        found: list[re.Match[bytes]] = list(iter(_SHAPE.scanner(data).match, None))  # type: ignore[attr-defined]  # typeshed lacks it
        if not found:
            return None
        end = found[-1].end()
        heads, texts, scores, logprobs, ids, numbers = zip(*map(_GROUPS, found), strict=True)
        try:
            str(data[:end], "utf-8")
            columns = orjson.loads(b"[[%b],[%b],[%b]]" % (b",".join(numbers), b",".join(texts), b",".join(logprobs)))
        except ValueError:
            return None
        run = Run(*map(tuple, columns))
        if set(map(type, run.logprobs)) != {float}:
            return None
        return run, self._shown(data[:end], heads, scores, ids), data[end:]

    def _shown(self, raw: bytes, heads: tuple[bytes, ...], scores: tuple[bytes, ...], ids: tuple[bytes, ...]) -> bytes:
        if not (self._hide_ids or self._hide_logprobs):
            return raw
        if self._hide_ids and self._hide_logprobs:
            return _HIDDEN.join((*heads, b""))
        nulls = (b"null",) * len(heads)
        columns = zip(heads, nulls if self._hide_logprobs else scores, nulls if self._hide_ids else ids, strict=True)
        return b"".join([b'%b%b,"finish_reason":null,"token_ids":%b}]}\n\n' % column for column in columns])
