"""Idempotency keys: a write that is sent again under its key is answered as it was, and not done again.

Answers are remembered in this process for a day: they may hold content, which must not outlive an erasure on a disk.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from starlette.responses import Response

from ingest.gateway.problems import Problem

KEPT_S = 86_400.0
KEPT_MAX = 10_000
KEY_CHARACTERS_MAX = 200


@dataclass
class _Answer:
    digest: str
    at: float
    response: Response | None = None


class Idempotency:
    """Answers by caller, route and key. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[tuple[str, str, str], _Answer] = OrderedDict()

    def begin(self, caller: str, route: str, key: str, body: bytes) -> Response | None:
        """The answer that was given before; None where the caller is to do the work now, and then `finish` or `forget`.

        Raises:
            Problem: the key is too long (400), was used for another request (422), or its work is under way (409).
        """
        if not 0 < len(key) <= KEY_CHARACTERS_MAX:
            raise Problem(400, "the Idempotency-Key has no length that is valid", f"1 to {KEY_CHARACTERS_MAX} characters")
        digest, now = hashlib.sha256(body).hexdigest(), time.monotonic()
        with self._lock:
            while self._answers and (len(self._answers) >= KEPT_MAX or next(iter(self._answers.values())).at < now - KEPT_S):
                self._answers.popitem(last=False)
            known = self._answers.get((caller, route, key))
            if known is None:
                self._answers[caller, route, key] = _Answer(digest, now)
                return None
            if known.digest != digest:
                raise Problem(422, "this Idempotency-Key was used for another request", "make a new key for each request")
            if known.response is None:
                raise Problem(409, "the request with this Idempotency-Key is under way", "wait for its answer")
            return known.response

    def finish(self, caller: str, route: str, key: str, response: Response) -> None:
        """Remember the answer."""
        with self._lock:
            if (known := self._answers.get((caller, route, key))) is not None:
                known.response = response

    def forget(self, caller: str, route: str, key: str) -> None:
        """The work failed: the same request may be sent again."""
        with self._lock:
            self._answers.pop((caller, route, key), None)
