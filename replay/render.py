"""A session at one moment as a page to read, and a replay's outcome as a few lines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from replay.compare import Outcome
from replay.differences import sentence
from replay.rows_of_events import environment_facts, verdict_level
from replay.state import Edit, Generation, Recording, Sequence, SessionState, body_of
from replay.timeline_view import STYLES
from replay.words import clock, content_text, count, duration, iso, paragraph, printable, short_id, shorten, uuid
from schemas import events as e
from schemas.patch import apply_patch, value_at

TEXT_CHARACTERS = 1_200
"""Characters of a message or an answer on the page; `full` shows all."""
ANOMALIES_MAX = 8
ROLES = {"system": "magenta", "developer": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
ENDS_OF_STOPS = {
    "as_is": "let go as it was",
    "edited": "let go as edited",
    "expired": "nobody decided",
    "abandoned": "given up",
    "lost": "lost with its worker",
}
STATUS_LEVELS = {"finished": "good", "failed": "bad", "paused": "warn", "streaming": "plain", "submitted": "plain"}


class SessionPage:
    """Draws a state; a rich renderable. `total` is the number of events of the whole session, where that is known."""

    def __init__(self, state: SessionState, *, total: int | None = None, full: bool = False) -> None:
        self.state, self.total = state, total
        self._limit = 1 << 60 if full else TEXT_CHARACTERS

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._head()
        yield from self._environment()
        held: set[bytes] = set()
        for number, generation in enumerate(self.state.generations.values(), 1):
            yield Text("")
            yield from self._generation(number, generation, held)
        yield from self._replays()
        yield from self._anomalies()

    def _head(self) -> Iterator[RenderableType]:
        state = self.state
        if state.session_id is None:
            yield Text("nothing has happened yet", style="dim")
            return
        yield Text.assemble(("session ", "bold"), (uuid(state.session_id), "bold"), f"  tenant {printable(state.tenant)}")
        opened = state.opened
        if opened and opened.content and opened.content.title:
            yield Text(f"“{printable(opened.content.title)}”", style="italic")
        facts = [opened.client, opened.user, opened.workflow, opened.purpose] if opened else []
        facts += [f"#{tag}" for tag in state.tags]
        if any(facts):
            yield Text(printable(" · ".join(fact for fact in facts if fact)), style="dim")
        yield self._moment()
        for note in state.annotations:
            if note.event.content and note.event.content.note:
                yield Text(f"note by {printable(note.actor) or 'somebody'}: {printable(note.event.content.note)}", style="yellow")

    def _moment(self) -> Text:
        """At which event this is, and how long after the first."""
        state = self.state
        of = f" of {self.total:,}" if self.total is not None else ""
        at = state.last.at if state.last else state.last_at or 0
        since = duration(at - (state.first_at or at))
        closed = f" · closed: {printable(state.closed.reason)}" if state.closed else ""
        lost = f" · {state.lost:,} events lost" if state.lost else ""
        erased = f" · content of {count(state.erased, 'event')} erased" if state.erased else ""
        return Text(f"after event {state.events:,}{of} · {iso(at)} · {since} after the first{closed}{lost}{erased}", style="bold blue")

    def _environment(self) -> Iterator[RenderableType]:
        if not len(self.state.environments):
            yield Text("environment not recorded", style="dim")
            return
        last = self.state.environments[-1].event
        changed = len({environment.event.environment_id for environment in self.state.environments}) - 1
        digests = " ".join(f"{name} {digest.hex()[:8]}" for name, digest in _digests(last))
        text = f"environment {' · '.join(environment_facts(last))} · {digests}"
        text += f" · not told: {', '.join(last.unknown)}" if last.unknown else ""
        yield Text(printable(text), style="dim")
        if changed:
            yield Text(f"the environment changed {count(changed, 'time')} in this session", style="yellow")

    def _generation(self, number: int, generation: Generation, held: set[bytes]) -> Iterator[RenderableType]:
        status, request = generation.status, generation.request
        title = Text.assemble((f" generation {number} ", "bold"), (status, STYLES[STATUS_LEVELS[status]] or "bold"), " ")
        yield Rule(title, align="left", style="dim")
        if request:
            when = clock(generation.submitted_at) if generation.submitted_at is not None else ""
            who = generation.actor or request.api_key_id or "client"
            yield Text(
                printable(f"{when} {who} → {request.model or '?'} {request.endpoint} · id …{short_id(generation.generation_id)}"),
                style="dim",
            )
        yield from self._messages(generation, held)
        yield from self._pauses(generation)
        yield from self._edits(generation)
        yield from self._parameters(generation)
        if generation.recording:
            yield from self._answer(generation, generation.recording)

    def _messages(self, generation: Generation, held: set[bytes]) -> Iterator[RenderableType]:
        messages = self.state.messages_of(generation)
        fresh = [message for message in messages if message.message_id not in held]
        held.update(message.message_id for message in messages)
        if len(fresh) < len(messages):
            yield Text(f"  {count(len(messages) - len(fresh), 'message')} as before", style="dim")
        for message in fresh:
            yield from self._message(message)

    def _message(self, message: e.Message) -> Iterator[RenderableType]:
        body = body_of(message)
        said = content_text(body.get("content")) if isinstance(body, dict) else str(body)
        calls = body.get("tool_calls") if isinstance(body, dict) else None
        yield self._spoken(message.role, said or ("" if calls else "[empty]"), ROLES.get(message.role, "white"))
        for call in calls if isinstance(calls, list) else []:
            yield Padding(Text(f"calls {shorten(json.dumps(call, ensure_ascii=False), 200)}", style="yellow"), (0, 0, 0, 12))

    def _spoken(self, who: str, text: str, style: str) -> RenderableType:
        """A name and what it says, side by side."""
        table = Table.grid(padding=(0, 1))
        table.add_column(width=11, justify="right", no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        said = paragraph(text[: self._limit])
        left_out = f" … ({len(text) - self._limit:,} characters more)" if len(text) > self._limit else ""
        table.add_row(Text(printable(who), style=f"bold {style}"), Text(said) + Text(left_out, style="dim"))
        return table

    def _pauses(self, generation: Generation) -> Iterator[RenderableType]:
        for pause in generation.pauses:
            text = f"  stopped at breakpoint {pause.hit.breakpoint_id} {clock(pause.hit_at)}"
            if pause.released is None or pause.released_at is None:
                limit = f"; {pause.hit.default_action} after {duration(pause.hit.deadline_us)}" if pause.hit.deadline_us else ""
                yield Text(printable(f"{text}: waits for a release{limit}"), style="bold yellow")
            else:
                waited = duration(pause.released_at - pause.hit_at)
                by = f" by {pause.released_by}" if pause.released_by else ""
                reason = pause.released.content.reason if pause.released.content else None
                how = ENDS_OF_STOPS.get(pause.released.action, pause.released.action)
                yield Text(printable(f"{text}, {how}{by} after {waited}" + (f": {reason}" if reason else "")), style="yellow")

    def _edits(self, generation: Generation) -> Iterator[RenderableType]:
        """Each edit with what it changed; what stood there before is told where the tape still has it."""
        document: Any = self.state.submitted(generation)
        undone = {edit.event.undo_of for edit in generation.edits}
        for edit in generation.edits:
            yield self._edit(edit, undone=edit.event.edit_id in undone)
            lines, document = _patch_lines(edit.patch, document)
            for line in lines:
                yield Padding(Text(printable(line), style="yellow"), (0, 0, 0, 4))

    def _edit(self, edit: Edit, *, undone: bool) -> RenderableType:
        reason = edit.event.content.reason if edit.event.content else None
        what = f"undid …{short_id(edit.event.undo_of)}" if edit.event.undo_of else f"edited …{short_id(edit.event.edit_id)}"
        later = " (undone later)" if undone else ""
        text = f"  {what} {clock(edit.at)} by {edit.actor or 'somebody'}{later}" + (f": {reason}" if reason else "")
        return Text(printable(text), style="yellow")

    def _parameters(self, generation: Generation) -> Iterator[RenderableType]:
        """The request's parameters but its messages; after edits, where there were any."""
        document = self.state.edited(generation) if len(generation.edits) else self.state.submitted(generation)
        if document is None:
            why = self.state.gone if generation.request else "not recorded"
            yield Text(f"  parameters {why}", style="dim")
            return
        rest = {key: value for key, value in document.items() if key not in ("messages", "model", "tools")}
        names = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in rest.items()]
        tools = [_tool_name(tool) for tool in document.get("tools") or []] if isinstance(document.get("tools"), list) else []
        names += [f"tools: {', '.join(tools)}"] if tools else []
        if names:
            edited = "after the edits: " if len(generation.edits) else ""
            yield Text(f"  {edited}{shorten('  '.join(names), 400)}", style="dim")

    def _answer(self, generation: Generation, recording: Recording) -> Iterator[RenderableType]:
        several = len(recording.sequences) > 1
        for sequence in recording.lanes:
            yield from self._sequence(sequence, several, generation.status)
        for failure in recording.failures:
            event = failure.event
            text = f"  FAILED {clock(failure.at)} {event.error_type} at the {event.origin}'s end"
            text += f" after {count(event.position, 'token')}" + (": " + failure.message if failure.message else "")
            yield Text(paragraph(text), style=STYLES["bad"])
        finished = recording.finished
        if finished:
            usage = (
                f"{finished.prompt_tokens:,} prompt + {finished.completion_tokens or 0:,} completion tokens"
                if finished.prompt_tokens
                else ""
            )
            ttft = f"first token after {duration(recording.first_token_us)}" if recording.first_token_us is not None else ""
            facts = [f"finished in {duration(finished.offset_us)}", ttft, usage]
            yield Text("  " + " · ".join(fact for fact in facts if fact), style="dim")

    def _sequence(self, sequence: Sequence, several: bool, status: str) -> Iterator[RenderableType]:
        name = f"answer {sequence.index}" if several else "answer"
        reasoning, refusal = sequence.text("reasoning"), sequence.text("refusal")
        if reasoning:
            yield self._spoken("reasoning", reasoning, "dim")
        text = f"[{self.state.gone}]" if sequence.erased else sequence.text()
        going_on = "▌" if sequence.finished is None and status == "streaming" else ""
        if text or going_on or not (reasoning or refusal or len(sequence.calls)):
            yield self._spoken(name, text + going_on, "green")
        if refusal:
            yield self._spoken("refusal", refusal, "red")
        for call in sequence.calls:
            said = f"{call.content.name or 'unnamed'} {call.content.arguments}" if call.content else f"[{self.state.gone}]"
            yield self._spoken("tool call", said, "yellow")
        ended = f"{sequence.finished.finish_reason or 'ended'}" if sequence.finished else "unfinished"
        yield Padding(Text(f"{ended} · {count(sequence.tokens, 'token')}", style="dim"), (0, 0, 0, 12))

    def _replays(self) -> Iterator[RenderableType]:
        for replay in self.state.replays.values():
            yield Text("")
            started, finished = replay.started, replay.finished
            yield Rule(Text(" replay ", style="bold"), align="left", style="dim")
            if started:
                yield Text(printable(f"  {started.mode} of session {uuid(started.subject_session)} with {started.engine}"))
                yield from _difference_lines(started.differences)
            for compared in replay.compared:
                text = (
                    f"  …{short_id(compared.generation_id)}.{compared.index} {compared.verdict.replace('_', ' ')}: {compared.reason or ''}"
                )
                yield Text(printable(text), style=STYLES[verdict_level(compared.verdict)])
            if finished:
                yield _verdict_line(finished.verdict, finished.reason)

    def _anomalies(self) -> Iterator[RenderableType]:
        found = list(self.state.anomalies)
        if found:
            yield Text("")
            yield Text(f"{count(len(found), 'unexpected event')}", style="yellow")
        for anomaly in found[:ANOMALIES_MAX]:
            where = f" at offset {anomaly.place.offset}" if anomaly.place else ""
            yield Text(printable(f"  {anomaly.kind} {anomaly.what}{where}: {anomaly.text}"), style="yellow")
        if len(found) > ANOMALIES_MAX:
            yield Text(f"  and {len(found) - ANOMALIES_MAX:,} more", style="dim")


def _digests(environment: e.EnvironmentCaptured) -> list[tuple[str, bytes]]:
    named = (("semantic", environment.semantic), ("numeric", environment.numeric), ("scheduling", environment.scheduling))
    return [(name, digest) for name, digest in named if digest is not None] or [("id", environment.environment_id)]


def _tool_name(tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, dict) else None
    return str(function.get("name")) if isinstance(function, dict) else "?"


def _patch_lines(patch: str | None, document: Any) -> tuple[list[str], Any]:
    """One line per operation of an RFC 6902 patch, and the document after them; None where that cannot be told."""
    if patch is None:
        return ["[erased]"], None
    try:
        operations = json.loads(patch)
    except ValueError:
        return [shorten(patch, 200)], None
    lines = []
    for operation in operations if isinstance(operations, list) else [operations]:
        if not isinstance(operation, dict):
            lines.append(str(operation))
            continue
        lines.append(_operation_line(operation, document))
        document = _after(document, operation)
    return lines, document


def _operation_line(operation: dict[str, Any], document: Any) -> str:
    value = f" = {_shown(operation['value'])}" if "value" in operation else ""
    source = f" from {operation['from']}" if "from" in operation else ""
    before = ""
    if document is not None and operation.get("op") in ("replace", "remove"):
        with contextlib.suppress(ValueError):
            before = f"  (was {_shown(value_at(document, str(operation.get('path'))))})"
    return f"{operation.get('op')} {operation.get('path')}{value}{source}{before}"


def _after(document: Any, operation: dict[str, Any]) -> Any:
    try:
        return None if document is None else apply_patch(document, [operation])
    except ValueError:
        return None


def _shown(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False), 160)


class OutcomeView:
    """Draws a compare replay's outcome; a rich renderable."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        outcome = self.outcome
        yield Text.assemble(("compare ", "bold"), uuid(outcome.subject_session), ("  with ", "dim"), printable(outcome.engine))
        if not outcome.environment_known:
            yield Text("  environment: not known on both sides", style="yellow")
        elif not outcome.differences:
            yield Text("  environment: the same", style="green")
        yield from _difference_lines(outcome.differences)
        if outcome.sequences:
            yield _sequence_table(outcome)
        for floor in dict.fromkeys(s.judgement.floor for s in outcome.sequences if s.judgement.floor):
            yield Text(printable(f"  noise floor {floor.nats:.2g} nats ({floor.source})"), style="dim")
        if outcome.skipped:
            yield Text(f"  {count(outcome.skipped, 'generation')} without tokens: nothing to compare", style="dim")
        yield _verdict_line(outcome.verdict, outcome.reason)
        yield Text(f"  took {duration(outcome.duration_us)}, recorded as session {uuid(outcome.session_id)}", style="dim")


AROUND = 4
"""Tokens shown before and after the one that tells."""


class ComparisonView:
    """Draws a document of `replay.comparison`; a rich renderable."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.document
        names = [side.get("generation_id") or side["session_id"] for side in (found["first"], found["second"])]
        yield Text.assemble(("compare ", "bold"), names[0] or "?", ("  with ", "dim"), printable(found.get("engine") or names[1] or "?"))
        for line in found["environment"]["lines"]:
            yield Text(printable(f"  {line}"), style="dim")
        for sequence in found["sequences"]:
            style = STYLES[verdict_level(sequence["verdict"])]
            lane = f"  …{sequence['generation_id'][-8:]}.{sequence['index']} "
            yield Text.assemble(lane, (sequence["verdict"].replace("_", " "), style), printable(f" · {sequence['reason']}"))
            if sequence["first_telling"] is not None:
                yield from _telling(sequence, sequence["first_telling"])
        yield _verdict_line(found["verdict"] or "under way", found["reason"])


def _telling(sequence: dict[str, Any], at: int) -> Iterator[Text]:
    """The token that tells and those around it, with what each side thought of them."""
    first, second, drift = sequence["first"], sequence["second"], sequence["drift"]
    for i in range(max(0, at - AROUND), min(len(first["text"]), at + AROUND + 1)):
        values = [_figure(column, i) for column in (first["logprob"], second["logprob"], drift)]
        told = second["text"][i] if i < len(second.get("text", ())) else first["text"][i] if "text" not in second else None
        other = "" if told == first["text"][i] else f"  there {told!r}"
        text = f"    token {i:<6} {values[0]:>10} {values[1]:>10} {values[2]:>10}  {first['text'][i]!r}{other}"
        yield Text(printable(text), style="bold" if i == at else "dim")


def _figure(values: list[float | None], i: int) -> str:
    value = values[i] if i < len(values) else None
    return "–" if value is None else f"{value:.4f}"


def _sequence_table(outcome: Outcome) -> Table:
    """One row per sequence: which, its verdict, why and where."""
    table = Table.grid(padding=(0, 1))
    for width in (7, 9, 16):
        table.add_column(width=width, no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for number, generation in enumerate(outcome.generations, 1):
        for sequence in generation.sequences:
            judgement = sequence.judgement
            lane = f"{number}.{sequence.index}" if len(generation.sequences) > 1 else f"{number}"
            verdict = Text(judgement.verdict.replace("_", " "), STYLES[verdict_level(judgement.verdict)])
            telling = f"; first at token {judgement.first_telling}" if judgement.first_telling is not None else ""
            which = Text(f"…{short_id(generation.generation_id)}", "dim")
            table.add_row(Text(f"{lane:>7}"), which, verdict, Text(printable(judgement.reason + telling)))
    return table


def _verdict_line(verdict: str, reason: str | None) -> Text:
    style = STYLES[verdict_level(verdict)]
    return Text.assemble(("verdict: ", "bold"), (verdict.replace("_", " "), style), printable(f" · {reason}" if reason else ""))


def _difference_lines(differences: list[e.Difference] | tuple[e.Difference, ...]) -> Iterator[Text]:
    """One line per difference of the environments."""
    if differences:
        yield Text(f"  environment: {count(len(differences), 'difference')}", style="yellow")
    for difference in differences:
        yield Text(f"    {printable(difference.key)} ({difference.digest}): {printable(sentence(difference))}", style="yellow")
