"""Data of earlier versions opens, is asked, tiered and verified together with new data; what is newer is left alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lifecycle.compaction import Compaction
from lifecycle.retention import Retention
from schemas.codec import decode_datum, encode_datum
from schemas.registry import CURRENT, SchemaRegistry
from schemas.settings import RetentionPolicy, RetentionSettings, Settings
from store.format import FORMAT
from store.log.base import Entry, partition_of
from store.rebuild import rebuild
from store.sql import query
from tests.golden_write import ROOT
from tests.indexed import offsets
from tests.tiered import Tiered, tiered
from tokentape.cli import main

REGISTRY = SchemaRegistry()

VERSIONS = sorted(path.name for path in ROOT.iterdir())
"""Fingerprints of every schema that ever wrote, the current one among them."""


def recorded(version: str, partitions: int) -> list[Entry]:
    """One event of every kind as a version wrote it, as one producer in one session would have numbered them."""
    producer, session = bytes.fromhex(version), bytes.fromhex(version) * 2
    partition, found = partition_of(session, partitions), []
    for number, path in enumerate(sorted((ROOT / version).glob("*.bin"))):
        datum, schema = decode_datum(path.read_bytes(), REGISTRY)
        own = {"session_id": session, "producer_id": producer, "producer_seq": number, "tenant": "acme", "retention_class": "standard"}
        event_id = hashlib.sha256(f"{version}{path.name}".encode()).digest()[:16]
        found.append(Entry(partition, session, encode_datum({**datum, **own, "event_id": event_id}, schema)))
    return found


def test_all_versions_side_by_side(rig: Tiered) -> None:
    """Tiered alone, in one shard and merged, every row gives the bytes that its version wrote, and SQL and verify hold for all."""
    entries = {version: recorded(version, rig.log.partitions) for version in VERSIONS}
    older = [entry for version in VERSIONS if version != CURRENT.fingerprint.hex() for entry in entries[version]]
    rig.ingest(older)
    rig.set_day("2026-01-10")
    rig.tier()
    rig.ingest([*entries[CURRENT.fingerprint.hex()][:5]])
    rig.ingest(entries[CURRENT.fingerprint.hex()][5:])
    before = query(rig.settings, "SELECT lower(hex(schema)) AS version, count(*) AS n FROM events GROUP BY ALL ORDER BY ALL").table
    hot = rig.records()
    rig.set_day("2026-01-10")
    rig.tier()
    Compaction(rig.tiering()).run()
    after = query(rig.settings, "SELECT lower(hex(schema)) AS version, count(*) AS n FROM events GROUP BY ALL ORDER BY ALL").table

    assert len(VERSIONS) > 1
    assert dict(zip(*before.to_pydict().values(), strict=True)) == {version: len(entries[version]) for version in VERSIONS}
    assert after == before
    assert rig.records() == hot == offsets(rig.log)
    assert len({segment.tenant for segment in rig.catalog.snapshot().segments}) == len(rig.catalog.snapshot().segments)
    assert rig.verification().report().exit_code == 0
    assert rebuild(rig.settings, rig.log, rig.objects, rig.catalog)["differ"] == []

    policy = RetentionPolicy(name="words", content_days=1)
    rig.settings = rig.settings.model_copy(update={"retention": RetentionSettings(policies=[policy])})
    Retention(rig.tiering()).apply()

    assert rig.table("salt IS NOT NULL").num_rows == 0
    assert rig.verification().report().exit_code == 0


def digests(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("command", [["sessions"], ["index"], ["rebuild"], ["up"], ["keys", "list"], ["status"], ["breakpoints"]])
def test_a_newer_directory_is_refused_before_anything_is_touched(command: list[str], tmp_path: Path) -> None:
    """One line that names both versions and formats, and what to do; not a byte is changed."""
    data = tmp_path / "data"
    with tiered(Settings(data=data)) as rig:
        rig.ingest(recorded(VERSIONS[0], rig.log.partitions))
    (data / "format.json").write_text(json.dumps({"format": FORMAT + 1, "written_by": "9.9.0"}))
    before = digests(data)
    ran = CliRunner().invoke(main, ["--data", str(data), *command])

    assert ran.exit_code == 5
    assert f"format {FORMAT + 1}, written by tokentape 9.9.0; tokentape 0.1.0 reads up to format {FORMAT}" in ran.stderr
    assert "run tokentape 9.9.0 or later on it" in ran.stderr
    assert digests(data) == before


def test_a_directory_says_its_format(tmp_path: Path) -> None:
    """One without a note is that of the first version, and gets one; a note that nobody understands is said to be that."""
    data = tmp_path / "data"
    with tiered(Settings(data=data)) as rig:
        rig.ingest(recorded(VERSIONS[0], rig.log.partitions))
    opened = CliRunner().invoke(main, ["--data", str(data), "sessions"])
    noted = json.loads((data / "format.json").read_text())
    (data / "format.json").write_text("{}")
    refused = CliRunner().invoke(main, ["--data", str(data), "sessions"])

    assert opened.exit_code == 0
    assert noted == {"format": FORMAT, "written_by": "0.1.0"}
    assert refused.exit_code == 5
    assert "does not say which format" in refused.stderr
