"""One installation for a notebook: its sessions, its SQL and its replays, by the folder that it lies in or over the REST API.

By folder one may do what the command line may; over REST what the key's roles allow. Either way the tape says who looked at what.
A session is fetched once and played here, so that time travel, timelines and token maps ask nobody again.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from replay.fold import Until
from replay.heat_html import Measure, heat_page
from replay.html import document, framed, table, text
from replay.player import Player
from replay.sections import session_document, token_columns
from replay.state import Generation, SessionState
from replay.state import Sequence as Spoken
from replay.timeline import ROWS_MAX, Row, timeline
from replay.timeline import Timeline as Made
from replay.timeline_html import session_page
from replay.words import uuid as uuid_text
from schemas.errors import UsageError
from store.rows import StoredEvent
from tokentape import __version__

if TYPE_CHECKING:
    from ingest.recorder import Recorder
    from ingest.telling import OwnSession
    from tokentape.folder import Folder

ROWS_SHOWN = 50
"""Of a table in a notebook; all of them are in `arrow`."""
COLUMNS = ("started_at", "session_id", "requests", "tokens", "failures", "user", "title", "tags", "tenant")
"""Of a list of sessions in a notebook; all that is known is in `facts`."""


class Place(Protocol):
    """Where an installation is asked."""

    name: str

    def sessions(self, q: str, limit: int) -> list[dict[str, Any]]:
        """The newest sessions in which all words of `q` stand."""
        ...

    def sql(self, statement: str, tenant: str | None) -> tuple[pa.Table, dict[str, Any]]:
        """The answer to a statement, and how complete it is."""
        ...

    def find(self, name: str) -> str:
        """The whole id of a session that is named by it or by its unique beginning."""
        ...

    def events(self, session_id: str) -> list[StoredEvent]:
        """The events of a session."""
        ...

    def compare(self, session_id: str, engine: str | None, model: str | None, strict: bool) -> dict[str, Any]:
        """What a compare replay found."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def connect(where: str | Path | None = None, *, token: str | None = None) -> Connection:
    """Open an installation.

    `where` is its data directory, a settings file (`….toml`), or the address of its REST API, for which `token` is a key with the
    roles that are needed. Without it the installation is the one that the command line would take here.

    Raises:
        UsageError: there is none, or a token for what needs none.
        TokentapeError: as opening it does.
    """
    if isinstance(where, str) and where.startswith(("http://", "https://")):
        from tokentape.remote import Service

        return Connection(Service(where, token))
    if token is not None:
        fault = "a token is for an installation behind a URL"
        raise UsageError(fault, operation="connect", hint="leave it out: a folder is read by whoever may read it")
    from tokentape.folder import Folder

    return Connection(Folder.of(where))


class Connection:
    """An open installation; close it, or use it in a `with`."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<tokentape at {self._place.name}>"

    def close(self) -> None:
        """Let go of the installation; what was recorded by it is in the log then."""
        self._place.close()

    def sessions(self, q: str = "", *, where: str | None = None, limit: int = 50) -> Sessions:
        """The newest sessions: those in which all words of `q` stand, or those of a condition over the columns of the view `sessions`.

        Raises:
            UsageError: both, or no such limit.
            QueryError: the condition is no SQL.
        """
        if q and where is not None:
            raise UsageError("q and where exclude each other", operation="sessions", hint="words for q, or a condition in SQL for where")
        if limit < 1:
            raise UsageError(f"limit {limit}, valid is 1 and more", operation="sessions")
        if where is None:
            rows = self._place.sessions(q, limit)
        else:
            rows = self.sql(f"SELECT * FROM sessions WHERE ({where}\n) ORDER BY started_at DESC LIMIT {limit}").arrow.to_pylist()
        return Sessions([Session(self._place, str(row["session_id"]), row) for row in rows])

    def session(self, name: str) -> Session:
        """One session, by its id or the unique beginning of it.

        Raises:
            UnknownSession: there is none, or none that one may see.
        """
        return Session(self._place, self._place.find(name))

    def sql(self, statement: str, *, tenant: str | None = None) -> Answer:
        """One statement over everything recorded, in the sandbox that can only read.

        Raises:
            QueryError: it is no SQL, refused, or over a limit.
        """
        return Answer(*self._place.sql(statement, tenant))

    # Recording

    @property
    def recorder(self) -> Recorder:
        """The recorder of this process, as it is: what it is given is not searched for personal data; what `begin` returns does that.

        Raises:
            UsageError: over REST nothing is recorded event by event.
        """
        return self._folder("record").recorder

    def begin(
        self,
        *,
        tenant: str | None = None,
        user: str | None = None,
        workflow: str | None = None,
        purpose: str | None = None,
        title: str | None = None,
        tags: Sequence[str] = (),
        client: str | None = None,
    ) -> OwnSession:
        """A session of one's own to record in; it is on the tape at once.

        Raises:
            UsageError: as `recorder`.
        """
        return self._folder("begin").begin(
            tenant, title, user=user, workflow=workflow, purpose=purpose, tags=list(tags), client=client or f"tokentape/{__version__}"
        )

    def _folder(self, operation: str) -> Folder:
        from tokentape.folder import Folder as Here

        if isinstance(self._place, Here):
            return self._place
        hint = "connect to the folder; or point the program's model client at the gateway, or its OpenTelemetry exporter at the API"
        raise UsageError("over REST events are not recorded one by one", operation=operation, place=self._place.name, hint=hint)


@dataclass(frozen=True)
class Answer:
    """Rows, as an Arrow table, and how complete they are. Whatever takes Arrow takes this: `polars.DataFrame(answer)`."""

    arrow: pa.Table
    completeness: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.arrow.num_rows)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.arrow.__arrow_c_stream__(requested_schema)

    def pandas(self) -> Any:
        """As a pandas DataFrame.

        Raises:
            UsageError: pandas is not installed.
        """
        _needed("pandas")
        return self.arrow.to_pandas()

    def polars(self) -> Any:
        """As a Polars DataFrame.

        Raises:
            UsageError: Polars is not installed.
        """
        return _needed("polars").from_arrow(self.arrow)

    def _repr_html_(self) -> str:
        rows = self.arrow.slice(0, ROWS_SHOWN).to_pylist()
        missing = {name: value for name, value in self.completeness.items() if value and name != "fresh_to"}
        told = f"{len(self):,} rows" + (f", the first {ROWS_SHOWN} are shown" if len(self) > ROWS_SHOWN else "")
        notes = "".join(f", {name.replace('_', ' ')}: {value:,}" for name, value in missing.items())
        shown = table(self.arrow.column_names, [list(row.values()) for row in rows])
        return _part([f'<div class="dim lead">{text(told + notes)}</div>', shown], rows=len(rows), title="SQL")

    def __repr__(self) -> str:
        return repr(self.arrow)


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"{package} is not installed", operation="sql", hint=f"pip install {package}, or use .arrow") from error


class Sessions(Sequence["Session"]):
    """Sessions, newest first."""

    def __init__(self, found: list[Session]) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: Any) -> Any:
        return Sessions(self._found[index]) if isinstance(index, slice) else self._found[index]

    def __iter__(self) -> Iterator[Session]:
        return iter(self._found)

    def __repr__(self) -> str:
        return f"<{len(self)} sessions: {', '.join(each.id for each in self._found[:3])}{', …' if len(self) > 3 else ''}>"

    def _repr_html_(self) -> str:
        rows = [[each.facts.get(name) for name in COLUMNS] for each in self._found[:ROWS_SHOWN]]
        return _part([table(COLUMNS, rows)], rows=len(rows), title="Sessions")


class Session:
    """One recorded session. Its events are fetched when they are first needed; `refresh` fetches them again."""

    def __init__(self, place: Place, session_id: str, facts: Mapping[str, Any] | None = None) -> None:
        self._place = place
        self.id = session_id
        self.facts = dict(facts or {})

    @cached_property
    def _player(self) -> Player:
        return Player(self._place.events(self.id))

    def __repr__(self) -> str:
        return f"<session {self.id}>"

    def refresh(self) -> Session:
        """Fetch the events again, for a session that goes on."""
        self.__dict__.pop("_player", None)
        return self

    @property
    def events(self) -> list[StoredEvent]:
        """Its events in the order of the log."""
        return self.at().events

    def at(self, moment: str | int | None = None) -> Moment:
        """The session as it stood at a moment: an event's id, `#POSITION` (or a number), `@OFFSET` or a UTC time; else at its end.

        Raises:
            UsageError: no such event, or no moment.
        """
        player = self._player
        if moment is None:
            player.seek(len(player))
        else:
            player.to(Until.parse(f"#{moment}" if isinstance(moment, int) else moment))
        return Moment(player.played(), player.state)

    def timeline(self, *, full: bool = False) -> Timeline:
        """What happened; `full` folds no quiet stretches."""
        return self.at().timeline(full=full)

    def tokens(self, generation: int | str = 1, index: int = 0) -> Tokens:
        """The tokens of one sequence, as `Moment.tokens`."""
        return self.at().tokens(generation, index)

    def compare(self, engine: str | None = None, *, model: str | None = None, strict: bool = False) -> Comparison:
        """Have an engine score what was recorded: by default the one behind the gateway; `recorded` is the tape itself.

        Raises:
            EngineUnavailable: it does not answer.
            ConflictError: `strict`, and the environment differs.
        """
        return Comparison(self._place.compare(self.id, engine, model, strict))

    def _repr_html_(self) -> str:
        return self.timeline()._repr_html_()


@dataclass(frozen=True)
class Moment:
    """A session at one moment: the events so far, and what they add up to."""

    events: list[StoredEvent] = field(repr=False)
    state: SessionState = field(repr=False)

    @property
    def document(self) -> dict[str, Any]:
        """The session as JSON types: conversation, edits, failures, environments."""
        return session_document(self.state)

    def timeline(self, *, full: bool = False) -> Timeline:
        """What had happened by then."""
        return Timeline(timeline(self.events, rows_max=None if full else ROWS_MAX))

    def tokens(self, generation: int | str = 1, index: int = 0) -> Tokens:
        """The tokens of one sequence of a generation, which is named by its number in the timeline, from 1, or by its id.

        Raises:
            UsageError: there is none.
        """
        number, found = self._generation(generation)
        for sequence in found.sequences:
            if sequence.index == index:
                return Tokens(sequence, f"generation {number}" + (f", answer {index}" if len(found.sequences) > 1 else ""))
        there = ", ".join(str(sequence.index) for sequence in found.sequences) or "none yet"
        raise UsageError(f"generation {number} has no sequence {index}", operation="tokens", hint=f"sequences: {there}")

    def _generation(self, name: int | str) -> tuple[int, Generation]:
        known = list(self.state.generations.values())
        for number, generation in enumerate(known, 1):
            if name in (number, uuid_text(generation.generation_id), generation.generation_id.hex()):
                return number, generation
        raise UsageError(f"no generation {name}", operation="tokens", hint=f"1 to {len(known)}" if known else "the session has none")

    def __repr__(self) -> str:
        at = self.state
        return f"<session at event {len(self.events)}: {len(at.generations)} generations, {at.tokens} tokens>"

    def _repr_html_(self) -> str:
        return self.timeline()._repr_html_()


@dataclass(frozen=True)
class Timeline:
    """What happened in a session, in rows."""

    made: Made = field(repr=False)

    @property
    def rows(self) -> tuple[Row, ...]:
        """Its rows."""
        return self.made.rows

    @property
    def document(self) -> dict[str, Any]:
        """The timeline as JSON types."""
        return self.made.document()

    def __repr__(self) -> str:
        return f"<timeline: {len(self.rows)} rows, {self.made.failures} failures, {self.made.stalls} stalls>"

    def html(self) -> str:
        """The timeline as a page of its own, which opens offline."""
        return session_page(self.made)

    def _repr_html_(self) -> str:
        return framed(self.html(), height=560)


@dataclass(frozen=True)
class Tokens:
    """The tokens of one sequence; in a notebook a heat map."""

    sequence: Spoken = field(repr=False)
    title: str = "tokens"
    measure: Measure = "logprob"

    @property
    def arrow(self) -> pa.Table:
        """Position, channel, time, id, logprob, text and alternatives of each; what is not known is null."""
        columns = {name: column for name, column in token_columns(self.sequence).items() if name not in ("index", "tokens")}
        return pa.table({name: column or [None] * self.sequence.tokens for name, column in columns.items()})

    @property
    def text(self) -> str:
        """What was said to the user."""
        return self.sequence.text()

    def by(self, measure: Measure) -> Tokens:
        """The same coloured by `logprob`, how sure the model was, or by `gap`, the time since the token before.

        Raises:
            UsageError: another measure.
        """
        if measure not in ("logprob", "gap"):
            raise UsageError(f"{measure!r} colours nothing", operation="tokens", hint="logprob or gap")
        return Tokens(self.sequence, self.title, measure)

    def __len__(self) -> int:
        return self.sequence.tokens

    def __repr__(self) -> str:
        return f"<{len(self)} tokens of {self.title}>"

    def html(self) -> str:
        """The heat map as a page of its own."""
        return heat_page(self.sequence.entries(), title=self.title, by=self.measure)

    def _repr_html_(self) -> str:
        return framed(self.html(), height=min(560, 150 + len(self) // 2))


@dataclass(frozen=True)
class Comparison:
    """What a compare replay found."""

    document: Mapping[str, Any] = field(repr=False)

    @property
    def verdict(self) -> str:
        """identical, numeric_drift, sampling_differs, model_differs or inconclusive."""
        return str(self.document["verdict"])

    @property
    def reason(self) -> str:
        """Why, in words."""
        return str(self.document["reason"])

    def __repr__(self) -> str:
        return f"<{self.verdict}: {self.reason}>"

    def _repr_html_(self) -> str:
        columns = ("verdict", "reason", "tokens", "first_telling", "drift_mean", "drift_max", "noise_floor")
        judged = [(number, each) for number, generation in enumerate(self.document["generations"], 1) for each in generation["sequences"]]
        rows = [[f"{number}.{each['index']}", *(each.get(name) for name in columns)] for number, each in judged]
        differences = [[each["key"], each["recorded"], each["present"]] for each in self.document["differences"]]
        body = [f"<h1>{text(self.verdict)}</h1>", f'<div class="dim lead">{text(self.reason)}</div>', table(("answer", *columns), rows)]
        if differences:
            body += ["<h2>Environment</h2>", table(("what", "recorded", "now"), differences)]
        return _part(body, rows=len(rows) + len(differences) + 4, title="Comparison")


def _part(body: Sequence[str], *, rows: int, title: str) -> str:
    return framed(document(title, body), height=min(560, 130 + 32 * rows))
