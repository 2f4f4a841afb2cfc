"""One installation as the commands see it: its settings and its parts, each opened when first asked for."""

from __future__ import annotations

import contextlib
import getpass
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from ingest.recorder import Recorder
from ingest.redaction import Redactor
from lifecycle.runs import RunLedger
from lifecycle.watch import Watch
from schemas.errors import AlreadyExists, LogUnavailable, Unavailable
from schemas.events import AccessContent, AccessLogged, AnnotationContent, SessionAnnotated
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id
from store.blobs import BlobStore, with_blobs
from store.catalog import Catalog, open_catalog
from store.directory import SessionDirectory
from store.format import check_format, mark_format
from store.indexer import ensure_fresh
from store.ledger import Ledger, open_ledger
from store.ledger.chain import KeyChain
from store.ledger.keys import KeyFolder
from store.ledger.witness import open_witness
from store.log import open_log
from store.log.base import Log
from store.objects import open_store
from store.objects.base import ObjectStore
from store.reader import EventReader
from store.rows import StoredEvent
from store.sql import SqlService
from store.stored_schemas import fetch_schema, schema_key
from tokentape import __version__
from tokentape.output import warn
from tokentape.supervisor import running

FRESH_TIMEOUT_S = 10.0
"""How long a command waits for the index to catch up before it answers with what is there and says so."""

AWAY_S = 5.0
"""How long a log that did not answer counts as away: a command that asked once does not wait a second time."""


class Installation:
    """The parts of one installation. Opening one raises what its `open_…` function raises."""

    def __init__(self, settings: Settings, *, source: str = "api") -> None:
        """`source` names the part that runs here in the heartbeats of its recorder.

        Raises:
            NewerFormat: the data directory is that of a newer version; nothing of it is opened.
        """
        check_format(settings.data, __version__)
        self.settings = settings
        self.source = source
        self._stack = contextlib.ExitStack()
        self._away: tuple[float, LogUnavailable | None] = (0.0, None)

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what was opened; safe to call twice."""
        self._stack.close()

    @cached_property
    def log(self) -> Log:
        """The event log, made when it does not exist yet."""
        mark_format(self.settings.data, __version__)
        log = self._open_log(create=True)
        self._stack.callback(log.close)
        return log

    def _open_log(self, *, create: bool) -> Log:
        """A log of the caller's own; one that was away a moment ago is not waited for again."""
        failed_at, failure = self._away
        if failure is not None and time.monotonic() - failed_at < AWAY_S:
            raise failure
        try:
            return open_log(self.settings.log, self.settings.data, create=create)
        except LogUnavailable as error:
            self._away = time.monotonic(), error
            raise

    @cached_property
    def objects(self) -> ObjectStore:
        """The object store of cold tier and ledger."""
        return open_store(self.settings.cold, self.settings.data)

    @cached_property
    def blobs(self) -> BlobStore:
        """Large bodies and attachments."""
        return BlobStore(self.objects, self.settings.data)

    @property
    def trusted(self) -> KeyChain:
        """The public keys that verification reads, made on first use."""
        return KeyChain.of(KeyFolder(self.settings.data / "keys", self.settings.ledger.origin).trusted)

    @cached_property
    def ledger(self) -> Ledger:
        """The signed ledger; its objects are locked where the store can lock."""
        return open_ledger(self.settings, self.objects)

    @cached_property
    def witness(self) -> ObjectStore | None:
        """Where copies of checkpoints go; None where nobody is named."""
        return open_witness(self.settings.witness)

    @cached_property
    def registry(self) -> SchemaRegistry:
        """Schemas known here; a fingerprint that is not is looked for in the object store."""
        return SchemaRegistry(lambda fingerprint: fetch_schema(self.objects, fingerprint))  # the store is opened when it is asked

    @cached_property
    def catalog(self) -> Catalog:
        """Which shards and segments there are."""
        mark_format(self.settings.data, __version__)
        return open_catalog(self.settings.data)

    @cached_property
    def reader(self) -> EventReader:
        """The events of a session, from hot and cold."""
        reader = EventReader(self.settings, self.catalog)
        self._stack.callback(reader.close)
        return reader

    @cached_property
    def directory(self) -> SessionDirectory:
        """The list of sessions, as of each call."""
        directory = SessionDirectory(self.settings, self.catalog)
        self._stack.callback(directory.close)
        return directory

    @cached_property
    def runs(self) -> RunLedger:
        """What jobs have run."""
        return RunLedger(self.settings.data / "jobs.sqlite")

    @cached_property
    def watch(self) -> Watch:
        """What measures this installation."""

        def encoding() -> Iterator[dict[str, int]]:
            return (part["encoding"] for part in running(self.settings.data) if "encoding" in part)

        return Watch(self.settings, self.catalog, self.runs, self.reader, encoding, lambda: self._open_log(create=False))

    @cached_property
    def sql(self) -> SqlService:
        """The sandbox for callers' SQL."""
        service = SqlService(self.settings, catalog=self.catalog)
        self._stack.callback(service.close)
        return service

    @cached_property
    def recorder(self) -> Recorder:
        """A recorder of this process; closed with the installation, after everything is acknowledged."""
        spool = None if self.settings.log.kind == "embedded" else self.settings.data / "spool"
        recorder = Recorder(self.log, self.settings.recorder, spool=spool, source=self.source)
        self._stack.callback(recorder.close)
        return recorder

    def closing(self, close: Callable[[], None]) -> None:
        """Call `close` with the installation's own end."""
        self._stack.callback(close)

    def publish_schemas(self) -> None:
        """Put every schema of the history into the object store, so that the cold tier explains itself."""
        for schema in self.registry.all():
            with contextlib.suppress(AlreadyExists):  # the same fingerprint with other white space explains it as well
                self.objects.create(schema_key(schema.fingerprint), schema.json().encode())

    def freshen(self, *, behind_max: int | None = None) -> bool:
        """Index what the log holds, or have the running indexers seal it; where that cannot be, say so and go on with what is there.

        Indexers that are more than `behind_max` events behind are not waited for, and that is not said: it is expected then. Whether all
        that the log held at the call is there.
        """
        try:
            freshness = ensure_fresh(self.settings, self.log, timeout_s=FRESH_TIMEOUT_S, behind_max=behind_max, registry=self.registry)
        except Unavailable as error:
            warn(f"the log does not answer, this is what was indexed before: {error}")
            return False
        for partition, stopped in freshness.stopped.items():
            warn(f"partition {partition} waits: {stopped.fault}; {stopped.hint}")
        if not freshness.complete and not freshness.stopped and behind_max is None:
            warn(f"the indexers are more than {FRESH_TIMEOUT_S:g} s behind; later events are missing here")
        return freshness.complete

    def session_id(self, text: str) -> bytes:
        """The session of an id, or of the unique beginning of one.

        Raises:
            UnknownSession: none, or more than one, begins like that.
        """
        return self.reader.find(text)

    def session_events(self, text: str, *, attachments: bool = False) -> list[StoredEvent]:
        """The events of a session with what stands in blobs put back, attachments only if wanted.

        Where the store does not answer that is said, and references stay.

        Raises:
            UnknownSession: as `session_id`.
        """
        return self._with_blobs(list(self.reader.session(self.session_id(text))), attachments)

    def events_of_sessions(self, ids: Sequence[str], *, attachments: bool = False) -> dict[str, list[StoredEvent]]:
        """`session_events` of many whole ids, read together; those that are not known are left out."""
        names = {uuid.UUID(each).bytes: each for each in ids}
        found = self.reader.sessions(list(names))
        return {names[session]: self._with_blobs(events, attachments) for session, events in found.items()}

    def _with_blobs(self, events: list[StoredEvent], attachments: bool) -> list[StoredEvent]:
        try:
            return list(with_blobs(events, lambda: self.blobs, attachments=attachments))
        except Unavailable as error:
            warn(f"large bodies are not shown, their store does not answer: {error}")
            return events

    def annotate(self, text: str, event: SessionAnnotated, *, actor: str = "") -> None:
        """Record an annotation in a session, under its own tenant, retention class and salt; it is in the log when this returns.

        `actor` is who annotates, by default who runs this process.

        Raises:
            UnknownSession: as `session_id`.
            LogUnavailable: the log does not take it.
        """
        first = next(iter(self.reader.session(self.session_id(text)))).event
        salt = {"salt": first.salt} if first.salt else {}
        content = self.settings.redaction.of(first.tenant).content == "full"
        session = SessionContext(
            first.session_id, first.tenant, "api", actor or self.person(), first.retention_class, content=content, sample_rate=1.0, **salt
        )
        redactor = Redactor.of(self.settings).for_tenant(first.tenant)
        if event.content is not None:
            event = event.model_copy(update={"content": AnnotationContent(note=redactor.clean(event.content.note))})
        self.recorder.record(session, event)
        if not self.recorder.flush(self.settings.log.timeout_s):
            raise LogUnavailable(
                "the log did not take the annotation in time", operation="annotate", hint="it is sent when the log is back"
            )

    def person(self) -> str:
        """Who runs this command, as an opaque id."""
        try:
            return f"user:{getpass.getuser()}"
        except (KeyError, OSError):
            return "user:unknown"

    @contextlib.contextmanager
    def accessing(self, operation: str, statement: str, *, actor: str = "", tenant: str = "") -> Iterator[dict[str, Any]]:
        """Record that somebody looked: the block fills in `rows`; a failure is recorded as such and raised on.

        Where the block says that nothing was `shown`, nothing is recorded.

        `actor` is who looks, by default who runs this process; `tenant` whose the record is, by default that of the settings.
        """
        answer: dict[str, Any] = {"outcome": "ok", "rows": None, "shown": True}
        began = time.perf_counter_ns()
        try:
            yield answer
        except BaseException as error:
            answer["outcome"] = type(error).__name__
            raise
        finally:
            owner = tenant or self.settings.tenant
            session = SessionContext(new_id(), owner, "api", actor or self.person(), self.settings.retention_class)
            content = AccessContent(statement=statement)
            took = (time.perf_counter_ns() - began) // 1000
            event = AccessLogged(operation=operation, outcome=answer["outcome"], rows=answer["rows"], duration_us=took, content=content)
            if answer["shown"]:
                self.recorder.record(session, event)
