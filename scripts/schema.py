"""Writes `schemas/event.avsc` and its copy in `schemas/history/` from the models; run it after a field was added."""

from __future__ import annotations

import json
from pathlib import Path

from schemas.avro import derive
from schemas.registry import Schema

ROOT = Path(__file__).resolve().parent.parent / "schemas"


def main() -> None:
    """Write both files and print the fingerprint."""
    schema = Schema(derive())
    text = json.dumps(schema.definition, indent=1) + "\n"
    (ROOT / "event.avsc").write_text(text, encoding="utf-8")
    (ROOT / "history" / f"{schema.fingerprint.hex()}.avsc").write_text(text, encoding="utf-8")
    print(schema.fingerprint.hex())


if __name__ == "__main__":
    main()
