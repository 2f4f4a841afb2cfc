"""Writer schemas in the object store, beside what they explain: where each stands, and how a registry finds it."""

from __future__ import annotations

import json
from typing import Any

from store.objects.base import ObjectStore


def schema_key(fingerprint: bytes) -> str:
    """Where the object store keeps a writer schema."""
    return f"schemas/{fingerprint.hex()}.avsc"


def fetch_schema(objects: ObjectStore, fingerprint: bytes) -> dict[str, Any] | None:
    """The schema of a fingerprint, for a `SchemaRegistry` to fetch; None where there is none."""
    try:
        definition = json.loads(objects.get(schema_key(fingerprint)))
    except (KeyError, ValueError):
        return None
    return definition if isinstance(definition, dict) else None
