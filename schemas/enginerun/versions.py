"""The versions of vLLM that are known, and what is said of any other. Each was run: `python -m tests.versions`."""

from __future__ import annotations

import re

from schemas.errors import UsageError

OLDEST, NEWEST = (0, 24), (0, 32)


HINT = "leave engine capture off and record with the gateway, which works with any version"


def check(version: str, *, operation: str, hint: str = HINT) -> None:
    """Return for a version from 0.24 to 0.32.

    Raises:
        UsageError: it is another one.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        valid = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
        raise UsageError(f"vLLM {version} is not supported, valid is {valid}", operation=operation, hint=hint)
