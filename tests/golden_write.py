"""Writes the golden files of the current schema: `python -m tests.golden_write`. Files of earlier versions are never touched again.

`tests/golden/<fingerprint>/<kind>.bin` is one framed event, `<kind>.json` what it says: its datum (bytes as hex) and its leaf hash.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from schemas.codec import encode, leaf_hash
from schemas.events import PAYLOADS
from schemas.registry import CURRENT
from tests.strategies import sample

ROOT = Path(__file__).parent / "golden"


def jsonable(value: Any) -> Any:
    """A datum for JSON: bytes as hex, infinities as text."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return value


def main() -> None:
    """Write what is missing and say where."""
    folder = ROOT / CURRENT.fingerprint.hex()
    folder.mkdir(parents=True, exist_ok=True)
    for kind in PAYLOADS:
        event = sample(kind, full=True)
        framed = encode(event)
        said = {"datum": jsonable(event.to_datum()), "leaf": leaf_hash(event.to_datum(), CURRENT).hex()}
        (folder / f"{kind}.bin").write_bytes(framed)
        (folder / f"{kind}.json").write_text(json.dumps(said, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    sys.stdout.write(f"{folder}: {len(PAYLOADS)} kinds\n")


if __name__ == "__main__":
    main()
