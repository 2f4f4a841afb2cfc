"""An installation asked where it lies, as the command line asks it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from ingest.recorder import Recorder
from ingest.redaction import Redactor
from ingest.telling import OwnSession
from replay.compare import run_compare
from replay.fold import fold
from replay.words import uuid as uuid_text
from schemas.errors import ConflictError, UsageError
from schemas.events import SessionContent, SessionOpened
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id
from store.directory import Viewer, Wanted
from store.rows import StoredEvent
from tokentape import __version__, config
from tokentape.installation import Installation
from tokentape.lines import session_line


class Folder:
    """See `tokentape.connection.Place`."""

    def __init__(self, settings: Settings) -> None:
        self.installation = Installation(settings, source="sdk")
        self.name = str(settings.data)

    @classmethod
    def of(cls, where: str | Path | None) -> Folder:
        """That of a data directory or a settings file, or the one that the command line would take.

        Raises:
            UsageError: there is no such folder.
            SettingsError: as reading settings does.
        """
        path = None if where is None else Path(where)
        if path is not None and path.suffix == ".toml":
            return cls(config.load(file=path))
        if path is not None and not path.is_dir():
            hint = "the data directory of an installation, its settings file, or the address of its API"
            raise UsageError("there is no installation", operation="connect", place=str(path), hint=hint)
        return cls(config.load(data=path))

    def sessions(self, q: str, limit: int) -> list[dict[str, Any]]:
        """See `Place`."""
        self.installation.freshen()
        with self.installation.accessing("sessions", f"sessions {q}".strip()) as access:
            found = self.installation.directory.sessions(Viewer(), Wanted(text=q), limit=limit)
            access["rows"] = len(found.rows)
        return [session_line(row) for row in found.rows]

    def sql(self, statement: str, tenant: str | None) -> tuple[pa.Table, dict[str, Any]]:
        """See `Place`."""
        self.installation.freshen()
        with self.installation.accessing("sql", statement, tenant=tenant or "") as access:
            answer = self.installation.sql.query(statement, tenant=tenant)
            access["rows"] = answer.table.num_rows
        return answer.table, answer.completeness.document()

    def find(self, name: str) -> str:
        """See `Place`."""
        self.installation.freshen()
        return uuid_text(self.installation.session_id(name))

    def events(self, session_id: str) -> list[StoredEvent]:
        """See `Place`."""
        return self._events(session_id, "show")

    def _events(self, session_id: str, operation: str, *, attachments: bool = False) -> list[StoredEvent]:
        self.installation.freshen()
        with self.installation.accessing(operation, f"{operation} {session_id}") as access:
            found = self.installation.session_events(session_id, attachments=attachments)
            access["rows"] = len(found)
        return found

    def compare(self, session_id: str, engine: str | None, model: str | None, strict: bool) -> dict[str, Any]:
        """See `Place`."""
        from tokentape.engines import calibrations, made_engine

        events = self._events(session_id, "replay compare", attachments=True)
        scorer = made_engine(self.installation, engine, model, (), fold(events) if engine == "recorded" else None)
        try:
            person, known = self.installation.person(), calibrations(self.installation)
            outcome = run_compare(events, scorer, self.recorder, strict=strict, actor=person, calibrations=known)
        finally:
            scorer.close()
        if outcome.refused:
            raise ConflictError("the environment differs from the recorded one", operation="compare", hint="without strict it goes on")
        return outcome.document()

    def close(self) -> None:
        """See `Place`."""
        self.installation.close()

    # Recording

    @property
    def recorder(self) -> Recorder:
        """The recorder of this process."""
        return self.installation.recorder

    def begin(self, tenant: str | None, title: str | None, **opened: Any) -> OwnSession:
        """A fresh session, recorded as its tenant is."""
        settings = self.installation.settings
        owner = tenant or settings.tenant
        context = SessionContext(
            new_id(),
            owner,
            "sdk",
            self.installation.person(),
            settings.retention_class,
            content=settings.redaction.of(owner).content == "full",
            sample_rate=1.0,
        )
        opening = SessionOpened(recorder_version=__version__, content=SessionContent(title=title) if title else None, **opened)
        return OwnSession(context, opening, recorder=self.recorder, redactor=self._redactor.for_tenant(owner))

    @cached_property
    def _redactor(self) -> Redactor:
        return Redactor.of(self.installation.settings)
