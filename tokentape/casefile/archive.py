"""Makes case files: for each session its timeline, raw events, environments and proofs, then what they hang on, all under one signature.

Sessions are written one after another and nothing but the list of members grows, so a case of thousands takes the memory of one.
"""

from __future__ import annotations

import hashlib
import zipfile
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import orjson

from lifecycle.proving import Prover, RowProof, SegmentRows
from replay.timeline import Timeline, timeline
from replay.timeline_html import index_page, session_page
from replay.words import iso, uuid
from schemas import clock
from schemas.codec import decode_datum, zigzag
from schemas.errors import UnknownSession
from schemas.events import BlobRef, EnvironmentCaptured, RequestSubmitted
from schemas.registry import HEADER_BYTES
from store.blobs import MARK, with_blobs
from store.ledger.entry import Checkpoint
from store.ledger.keys import KeyFolder
from store.ledger.note import Signer, sign_note
from store.rows import StoredEvent, framed, rows_to_datums, stored_events
from store.stored_schemas import schema_key
from tokentape.installation import Installation
from tokentape.lines import event_line, plain
from tokentape.output import whole

FORMAT = "tokentape-case/1"
BLOCK_EVENTS = 1000
"""Events in one block of an Avro container."""
SIGNED_LINE = "tokentape case file"
"""First line of the signed note; no checkpoint begins like that, since a ledger's name holds no white space."""

README = """This is a case file of tokentape, the flight recorder of LLM inference.

index.html             open it in a browser; no network is needed and no script runs
sessions/ID/           one session:
  timeline.html, .json   what happened, for people and for programs
  events-SCHEMA.avro     its events as they were recorded, an Avro object container file
  events.jsonl           the same events as JSON: bytes in hexadecimal, times in microseconds since 1970, and where each stood in the log
  environments.json      what produced the answers
  proofs.json            which row of which segment each event is, and its Merkle path
blobs/TENANT/ID        large bodies and attachments that the events name
schemas/               the Avro schemas of the events
checkpoint.txt         the ledger's signed head (C2SP tlog-checkpoint)
ledger.json            the ledger entries that commit the segments, with their Merkle paths to the checkpoint
ledger.pub             the ledger's public key; compare it with the one that you were given
manifest.json, .sig    the SHA-256 of every member, signed by the ledger's key
verify.py              checks all of this: python verify.py CASE.zip --key ledger.pub

verify.py needs Python 3.11 and the package cryptography, nothing of tokentape. Take it and the public key from somebody you trust.

What is proven: that each event is what was recorded and entered in the ledger before the checkpoint, by its bytes alone, and that its
JSON says the same. Timelines, environments and blobs are covered by the maker's signature. What is not proven: that nothing else
belongs to the case. An event whose content was erased is there without it, and its proof still holds.
"""


@dataclass
class Members:
    """An archive that is being written, and the SHA-256 of what is in it."""

    archive: zipfile.ZipFile
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, data: bytes) -> None:
        """One member, once."""
        if name not in self.digests:
            self.archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
            self.digests[name] = hashlib.sha256(data).hexdigest()


_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same case made twice differs in what it says only


@dataclass(frozen=True)
class Made:
    """What went into a case; `unproven` are events that the ledger does not hold yet, `absent` blobs that are not there any more."""

    sessions: int
    events: int
    unproven: int
    absent: int


class CaseWriter:
    """Puts sessions of an installation into an archive."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        parts = installation.reader, installation.objects, installation.ledger, installation.registry
        self._prover = Prover(*parts)
        self._rows = SegmentRows(self._prover, installation.catalog)
        self._sessions: list[dict[str, Any]] = []
        self._absent: list[str] = []

    def write(self, sessions: Iterable[bytes], out: Path) -> Made:
        """The case of these sessions; the file is whole or absent.

        Raises:
            UnknownSession: none of them is known.
            CorruptStore: a segment or blob was altered.
            SettingsError: the ledger's private key is not here.
        """
        signer = self._signer()
        with whole(out) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
            members = Members(archive)
            for session_id in sessions:
                self._session(members, session_id)
            if not self._sessions:
                raise UnknownSession("no session to make a case of", operation="case", hint="`tokentape sessions` lists them")
            self._rest(members, signer)
        unproven = sum(session["not_in_ledger"] for session in self._sessions)
        return Made(len(self._sessions), sum(session["events"] for session in self._sessions), unproven, len(self._absent))

    def _signer(self) -> Signer:
        folder = KeyFolder(self._installation.settings.data / "keys", self._installation.settings.ledger.origin)
        return folder.private(self._installation.ledger.chain().last.key)

    def _session(self, members: Members, session_id: bytes) -> None:
        table = self._installation.reader.table(session_id)
        if not table.num_rows:
            return
        folder, proofs = f"sessions/{uuid(session_id)}", self._rows.of(session_id)
        records = [(row, framed(row.datum, row.fingerprint, self._installation.registry)) for row in rows_to_datums(table)]
        by_schema: dict[bytes, list[bytes]] = {}
        lines, ids = [], []
        for row, record in records:
            by_schema.setdefault(row.fingerprint, []).append(record)
            datum, _ = decode_datum(record, self._installation.registry)
            lines.append(event_line(row, datum))
            ids.append(bytes(row.datum["event_id"]))
        for fingerprint, of_schema in by_schema.items():
            members.add(f"{folder}/events-{fingerprint.hex()}.avro", self._container(members, fingerprint, of_schema))
        members.add(f"{folder}/events.jsonl", "".join(f"{line}\n" for line in lines).encode())
        members.add(f"{folder}/proofs.json", orjson.dumps({"events": [_proof(event, proofs.get(event)) for event in ids]}))
        events = list(stored_events(table))
        self._blobs(members, events)
        made = self._told(members, folder, events)
        unproven = sum(event not in proofs for event in ids)
        facts = {"folder": folder, "events": len(ids), "not_in_ledger": unproven, "schemas": [found.hex() for found in by_schema]}
        self._sessions.append({**facts, **_summary(made)})

    def _container(self, members: Members, fingerprint: bytes, records: Sequence[bytes]) -> bytes:
        """Records of one schema as an Avro object container file, not compressed: the archive does that."""
        schema = self._installation.registry.get(fingerprint)
        try:
            stored = self._installation.objects.get(schema_key(fingerprint))
        except KeyError:  # none of its events was tiered yet
            stored = schema.json().encode()
        members.add(schema_key(fingerprint), stored)
        sync = hashlib.sha256(b"".join(records[:1])).digest()[:16]
        header = {b"avro.schema": schema.json().encode(), b"avro.codec": b"null"}
        parts = [b"Obj\x01", zigzag(len(header)), *(zigzag(len(part)) + part for item in header.items() for part in item), b"\x00", sync]
        for start in range(0, len(records), BLOCK_EVENTS):
            block = [record[HEADER_BYTES:] for record in records[start : start + BLOCK_EVENTS]]
            parts += [zigzag(len(block)), zigzag(sum(map(len, block))), *block, sync]
        return b"".join(parts)

    def _blobs(self, members: Members, events: Sequence[StoredEvent]) -> None:
        """What the events name in the blob store; what is no longer there is listed as that."""
        for stored in events:
            for name in _names(stored):
                tenant = stored.event.tenant
                place = f"blobs/{tenant}/{name.hex()}"
                try:
                    members.add(place, self._installation.blobs.get(tenant, name))
                except KeyError:
                    self._absent.append(place)

    def _told(self, members: Members, folder: str, events: Sequence[StoredEvent]) -> Timeline:
        made = timeline(with_blobs(events, lambda: self._installation.blobs), rows_max=None)
        members.add(f"{folder}/timeline.json", orjson.dumps(made.document(), option=orjson.OPT_INDENT_2))
        members.add(f"{folder}/timeline.html", session_page(made).encode())
        environments = [
            {"recorded_at": iso(stored.event.recorded_at), **plain(stored.event.payload.model_dump())}
            for stored in events
            if isinstance(stored.event.payload, EnvironmentCaptured)
        ]
        members.add(f"{folder}/environments.json", orjson.dumps(environments, option=orjson.OPT_INDENT_2))
        return made

    def _rest(self, members: Members, signer: Signer) -> None:
        """What all sessions hang on, and the signature over everything."""
        ledger, checkpoint = self._installation.ledger, self._checkpoint()
        size = checkpoint.size if checkpoint else 0
        entries = [self._entry(number, size) for number in sorted(self._rows.entries)]
        rotations = [
            {"number": item.number, "json": item.entry.decode(), "path": [b64encode(step).decode() for step in item.path]}
            for item in self._prover.rotations(size)
        ]
        members.add("ledger.json", orjson.dumps({"entries": entries, "rotations": rotations}))
        if checkpoint:
            members.add("checkpoint.txt", checkpoint.data)
        members.add("ledger.pub", "".join(f"{key}\n" for key in ledger.chain().trusted).encode())
        members.add("README.txt", README.encode())
        members.add("verify.py", resources.files("tokentape.casefile").joinpath("verify.py").read_bytes())
        members.add("index.html", index_page(self._sessions, checkpoint.data.decode() if checkpoint else "").encode())
        facts = {"made_at": f"{clock.now():%Y-%m-%dT%H:%M:%SZ}", "made_by": self._installation.person()}
        manifest = {"format": FORMAT, **facts, "sessions": self._sessions, "absent": sorted(set(self._absent)), "members": members.digests}
        data = orjson.dumps(manifest, option=orjson.OPT_INDENT_2)
        note = sign_note(f"{SIGNED_LINE}\n{b64encode(hashlib.sha256(data).digest()).decode()}\n", signer)
        members.add("manifest.json", data)
        members.add("manifest.sig", note)

    def _checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint; a new one where an entry of the case, or the key that signs it, is not under the newest."""
        ledger = self._installation.ledger
        newest = ledger.latest_checkpoint()
        needed = max([*self._rows.entries, *(span.number for span in ledger.chain().spans)]) + 1
        return ledger.checkpoint() if needed > (newest.size if newest else 0) else newest

    def _entry(self, number: int, size: int) -> dict[str, Any]:
        path = [b64encode(step).decode() for step in self._installation.ledger.inclusion_proof(number, size)]
        return {"number": number, "json": self._installation.ledger.entry(number).data.decode(), "path": path}


def _proof(event_id: bytes, proof: RowProof | None) -> dict[str, Any]:
    if proof is None:
        return {"id": event_id.hex(), "segment": None}
    return {"id": event_id.hex(), "segment": proof.segment, "row": proof.row, "path": [b64encode(step).decode() for step in proof.path]}


def _names(stored: StoredEvent) -> set[bytes]:
    """The blobs that an event refers to."""
    payload = stored.event.payload
    if not isinstance(payload, RequestSubmitted) or payload.content is None:
        return set()
    refs: list[BlobRef | None] = [payload.content.parameters_blob, *(message.blob for message in payload.content.messages)]
    marks = (found[1] for message in payload.content.messages if message.body for found in MARK.finditer(message.body))
    return {ref.blob_id for ref in refs if ref is not None} | {bytes.fromhex(name) for name in marks}


def _summary(made: Timeline) -> dict[str, Any]:
    """A session on the index page."""
    state, opened = made.state, made.state.opened
    title = opened.content.title if opened and opened.content else None
    first = None if state.first_at is None else iso(state.first_at)
    facts = {"session": uuid(state.session_id or b""), "tenant": state.tenant, "first_at": first, "title": title}
    return {**facts, "generations": len(state.generations), "tokens": state.tokens, "failures": made.failures, "stalls": made.stalls}
