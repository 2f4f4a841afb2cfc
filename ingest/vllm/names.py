"""Names of requests in an engine core: who asked for what, as far as a name says it."""

from __future__ import annotations

import re
from dataclasses import dataclass

REQUEST_HEADER = "x-request-id"
"""The header of which vLLM makes a request's name."""
PREFIX = "tokentape-"
"""What the gateway puts before a generation's id, so that the engine records under the same id."""

_INTERNAL = re.compile(r"-[0-9a-f]{8}$")
_CHILD = re.compile(r"(\d+)_(.+)$", re.DOTALL)
_OURS = re.compile(PREFIX + r"([0-9a-f]{32})(?:-(\d+))?$")


@dataclass(frozen=True, slots=True)
class Named:
    """`parent` is the same for all sequences of one prompt, `child` tells these apart, `prompt` the prompts of one request.

    `external` is the name that its client sees; `generation_id` is the gateway's, where the request came through one.
    """

    parent: str
    external: str
    child: int
    prompt: int
    generation_id: bytes | None


def named(request_id: str) -> Named:
    """What the name of a request in the engine core says: vLLM puts `CHILD_` before it where n > 1, and eight hex digits behind it."""
    found = _CHILD.match(request_id)
    child, parent = (int(found[1]), found[2]) if found else (0, request_id)
    external = _INTERNAL.sub("", parent)
    ours = _OURS.search(external)
    if ours is None:
        return Named(parent, external, child, 0, None)
    return Named(parent, external, child, int(ours[2] or 0), bytes.fromhex(ours[1]))


def request_name(generation_id: bytes) -> str:
    """The name under which a generation is sent to vLLM."""
    return PREFIX + generation_id.hex()
