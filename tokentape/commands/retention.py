"""Keep, hold, forget: `retention`, `hold`, `erase`."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import click

from ingest.gateway.keys import KIND, TOKEN, VirtualKey
from lifecycle.holds import SESSIONS_MAX, Holds
from lifecycle.scheduler import find, run_job
from lifecycle.selectors import Selector
from schemas import clock
from schemas.errors import UsageError
from store.control import ControlLog, open_control
from tokentape.commands.common import format_option, time_of, with_installation
from tokentape.commands.pipeline import print_summary
from tokentape.installation import Installation
from tokentape.jobs import all_jobs, erasures_of, retention_of, sign, tiering_of
from tokentape.output import err, warn, write_rows
from tokentape.selection import SESSIONS, column

COLUMNS = ("policy", "tenant", "class", "day", "events", "contents", "bytes", "objects", "held", "kept", "locked_until", "key")
ERASURE_COLUMNS = ("erasure", "state", "what", "reason", "requested_by", "approved_by", "requested_at", "pending")
PREVIEW_COLUMNS = ("sessions", "events", "contents", "first_at", "last_at", "held")
HOLD_COLUMNS = ("hold", "what", "by", "since", "reason", "ledger_entry")


@click.group()
def retention() -> None:
    """What goes by the policies of [retention], and when."""


@retention.command()
@format_option
@with_installation
def preview(installation: Installation, fmt: str) -> None:
    """Say what is due, how much, by which policy, and what holds or minimum ages keep; nothing is changed.

    `contents` counts events of which only the content goes; `kept` those that another policy's min_days protects.
    Days that are still in the hot tier are not listed: a run moves them to the cold tier first.
    """
    due = retention_of(installation).preview()
    write_rows([item.to_row() for item in due], fmt, COLUMNS)
    if fmt == "table":
        events, contents, held = (sum(getattr(item, name) for item in due) for name in ("events", "contents", "held"))
        err.print(f"{events:,} events and the content of {contents:,} more would go; {held:,} are held", markup=False)


@retention.command()
@with_installation
def apply(installation: Installation) -> None:
    """Remove what is due, with all old versions in the bucket, and enter it in the signed ledger; the scheduled job does the same."""
    ledger = installation.runs
    print_summary("retention", run_job(find(all_jobs(installation), "retention"), ledger, trigger="hand"), False)


@click.group()
def hold() -> None:
    """Legal holds: what is held is kept, whatever a policy, an erasure or a merge would do.

    Placing and releasing need a key with the role custodian in custody.key (TOKENTAPE_CUSTODY__KEY).
    """


@hold.command()
@click.option("--session", "sessions", multiple=True, help="A session or the unique beginning of one; repeat for several.")
@click.option("--tenant", help="Everything of a tenant, also what is yet to come.")
@click.option("--tag", help="Sessions that carry a tag, or ever did.")
@click.option("--from", "since", metavar="TIME", help="Recorded at or after, UTC.")
@click.option("--to", "until", metavar="TIME", help="Recorded before, UTC.")
@click.option("--where", metavar="SQL", help="Sessions of the view `sessions` that satisfy this now.")
@click.option("--reason", required=True, help="Why.")
@with_installation
def place(installation: Installation, sessions: tuple[str, ...], where: str | None, reason: str, **given: Any) -> None:
    """Hold events; what is given must all be satisfied. When this returns the hold stands in the signed ledger."""
    installation.freshen()
    with _acting(installation) as (key, control):
        ids = [installation.session_id(text).hex() for text in sessions]
        if where is not None:
            ids += _sessions(installation, where)
        selector = Selector(
            sessions=tuple(dict.fromkeys(ids)),
            tenant=given["tenant"],
            tag=given["tag"],
            since=time_of(given["since"], operation="hold"),
            until=time_of(given["until"], operation="hold"),
        )
        with installation.accessing("hold place", selector.text()):
            done = Holds(tiering_of(installation), control).place(selector, by=key.owner, reason=reason)
    if done["warning"]:
        warn(done["warning"])
    for gone in done["gone_before"]:
        warn(f"a deletion was entered just before this hold and may take part of it: {gone}")
    err.print(f"{done['events']:,} events are held, {done['objects']:,} objects are under the store's own legal hold", markup=False)
    click.echo(done["hold"])


@hold.command("list")
@format_option
@with_installation
def list_(installation: Installation, fmt: str) -> None:
    """The holds that stand: what, who, since when, why."""
    with contextlib.closing(open_control(installation.settings)) as control:
        write_rows(Holds(tiering_of(installation), control).standing(), fmt, HOLD_COLUMNS)


@hold.command()
@click.argument("hold_id")
@click.option("--reason", required=True, help="What allows it.")
@with_installation
def release(installation: Installation, hold_id: str, reason: str) -> None:
    """End a hold: from then on policies hold again for what it kept."""
    with _acting(installation) as (key, control), installation.accessing("hold release", hold_id):
        done = Holds(tiering_of(installation), control).release(hold_id, by=key.owner, reason=reason)
    if done["warning"]:
        warn(done["warning"])
    click.echo(f"{done['hold']} is released")


@click.group()
def erase() -> None:
    """Forget content: a custodian requests it, another one approves, and what was erased where is certified.

    Metadata, commitments and every proof stay. Needs keys with the role custodian, as `tokentape hold`.
    """


@erase.command()
@click.option("--session", "sessions", multiple=True, help="A session or the unique beginning of one; repeat for several.")
@click.option("--actor", help="Every session with an event of this actor.")
@click.option("--reason", required=True, help="Why.")
@with_installation
def request(installation: Installation, sessions: tuple[str, ...], actor: str | None, reason: str) -> None:
    """Ask for an erasure; prints its id for the custodian who approves it. Nothing is erased yet."""
    with _acting(installation) as (key, control), installation.accessing("erase request", actor or ", ".join(sessions)):
        ids = _subject(installation, sessions, actor)
        click.echo(erasures_of(installation, control).request(ids, actor, by=key.owner, reason=reason))


@erase.command("preview")
@click.option("--session", "sessions", multiple=True, help="A session or the unique beginning of one; repeat for several.")
@click.option("--actor", help="Every session with an event of this actor.")
@format_option
@with_installation
def erase_preview(installation: Installation, sessions: tuple[str, ...], actor: str | None, fmt: str) -> None:
    """Show what an erasure would take, and which holds keep how much of it; changes nothing."""
    with (
        contextlib.closing(open_control(installation.settings)) as control,
        installation.accessing("erase preview", actor or ", ".join(sessions)) as seen,
    ):
        ids = _subject(installation, sessions, actor)
        found = erasures_of(installation, control).preview(ids, actor)
        seen["rows"] = found["events"]
    write_rows([found], fmt, PREVIEW_COLUMNS)


@erase.command()
@click.argument("erasure_id")
@with_installation
def approve(installation: Installation, erasure_id: str) -> None:
    """Approve another custodian's request and carry it out; what is pending is followed up by the job `erasures`."""
    installation.freshen()
    with _acting(installation) as (key, control), installation.accessing("erase approve", erasure_id):
        done = erasures_of(installation, control).approve(erasure_id, by=key.owner)
    print_summary("erase", done, False)


@erase.command("list")
@format_option
@with_installation
def erase_list(installation: Installation, fmt: str) -> None:
    """All erasures: state, what and why while that is still known, who requested and approved them, what is pending."""
    with contextlib.closing(open_control(installation.settings)) as control:
        write_rows(erasures_of(installation, control).everything(), fmt, ERASURE_COLUMNS)


@erase.command()
@click.argument("erasure_id")
@with_installation
def certificate(installation: Installation, erasure_id: str) -> None:
    """Print what was erased where: the signed ledger entry, which the ledger's public key verifies."""
    with contextlib.closing(open_control(installation.settings)) as control:
        click.echo(erasures_of(installation, control).certificate(erasure_id))


@contextlib.contextmanager
def _acting(installation: Installation) -> Iterator[tuple[VirtualKey, ControlLog]]:
    """The custodian who acts, and the control log; what was entered is signed at the end.

    Raises:
        UsageError: no key, an unknown one, or one without the role.
    """
    with contextlib.closing(open_control(installation.settings)) as control:
        yield _custodian(installation, control), control
        sign(installation)


def _subject(installation: Installation, sessions: tuple[str, ...], actor: str | None) -> tuple[str, ...]:
    """The sessions (hex) that an erasure names.

    Raises:
        UsageError: neither sessions nor an actor, or both. UnknownSession: one that is not there.
    """
    if bool(sessions) == bool(actor):
        raise UsageError("an erasure is of sessions or of an actor", operation="erase", hint="--session ID or --actor NAME")
    installation.freshen()
    return tuple(installation.session_id(text).hex() for text in sessions)


def _custodian(installation: Installation, control: ControlLog) -> VirtualKey:
    given = installation.settings.custody.key
    hint = "`tokentape keys create --owner YOU --role custodian --no-models` makes one; put it into TOKENTAPE_CUSTODY__KEY"
    if given is None:
        raise UsageError("this needs a key with the role custodian", operation="custody", hint=hint)
    found = TOKEN.fullmatch(given.get_secret_value())
    fact = control.latest(KIND).get(f"key-{found[1]}") if found else None
    key = VirtualKey.model_validate(fact) if fact is not None else None
    if key is None or not hmac.compare_digest(key.digest, sha256(given.get_secret_value().encode()).hexdigest()):
        raise UsageError("the key in custody.key is not known here", operation="custody", hint=hint)
    if (state := key.state(clock.now_s())) != "active":
        raise UsageError(f"{key.key_id} is {state}", operation="custody", hint=hint)
    if not key.has("custodian"):
        fault = f"{key.key_id} of {key.owner} has {', '.join(key.roles) or 'no role'}; custody needs custodian"
        raise UsageError(fault, operation="custody", hint=hint)
    return key


def _sessions(installation: Installation, where: str) -> list[str]:
    """Sessions of a condition on the view `sessions`, asked in the sandbox."""
    found = column(installation, f"{SESSIONS.format(where=where)} LIMIT {SESSIONS_MAX + 1}")
    if not found:
        raise UsageError("no session satisfies the condition, so nothing is held", operation="hold", hint="`tokentape sql` shows the view")
    return [text.replace("-", "") for text in found]


COMMANDS = [retention, hold, erase]
