"""Fork: go on from any token of a recorded session, as it was asked or as edited, in a live engine.

What stands before the fork is forced by token ids, never by text that would have to be tokenised again: the engine gets the
recorded prompt's ids and the recorded answer's first ids as one prompt, and says what comes next. Only where an edit changes
the prompt itself does the engine render it anew. The child is a session of its own, which names its parent.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from replay.compare import hindrance
from replay.engines.base import Engine, Refused, Request
from replay.fold import Until
from replay.player import Player
from replay.state import Generation, SessionState
from replay.taped import taped
from replay.words import count, uuid
from schemas import events as e
from schemas.errors import ConflictError, UnknownSession, UsageError
from schemas.patch import Operation, apply_patch
from schemas.requests.recorded import COMPLETIONS, SHAPING, as_generation
from store.rows import StoredEvent

CARRIED = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "stop_token_ids", "ignore_eos", "bad_words", "logit_bias",
    "min_tokens",
)  # fmt: skip
"""Fields that mean the same for a continuation as they did for the whole."""
FROM_THE_START = (
    "presence_penalty", "frequency_penalty", "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar",
)  # fmt: skip
"""Fields that look at all that the engine itself said since its first token: they hold for a fork before that token only."""
SEED_BITS = 31
"""Width of a seed that is drawn where none is given: every engine takes it."""
_OPERATION = "fork"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a fork leaves its parent: after so many tokens of this sequence; the event that brought the last of them."""

    generation_id: bytes
    index: int
    position: int
    event_id: bytes


@dataclass(frozen=True, slots=True)
class Ask:
    """What is wanted of a fork. With neither `at`, `token` nor `edit` it goes on from the end of what was said."""

    at: Until | None = None
    token: int | None = None
    generation: bytes | None = None
    index: int = 0
    edit: Sequence[Operation] = ()
    seed: int | None = None
    max_tokens: int | None = None
    n: int = 1


@dataclass(frozen=True, slots=True)
class Fork:
    """A fork that is ready: the parent's place, the ids to force, and the request that a live engine gets."""

    parent: SessionState
    place: Place
    prompt_token_ids: tuple[int, ...]
    prefix: tuple[int, ...]
    prefix_text: str
    rendered: bool
    edit: Sequence[Operation]
    request: Request


def prepare(events: Iterable[StoredEvent], ask: Ask, engine: Engine) -> Fork:
    """What to send; the engine is asked only where an edit changes the prompt, or its ids were not recorded.

    Raises:
        UnknownSession: no events.
        UsageError: there is no such moment, generation, sequence or token, or the edit does not apply.
        ConflictError: what stands before the fork cannot be forced; the message names why.
        EngineUnavailable: the engine does not answer.
    """
    player = Player(events)
    whole = player.seek(len(player))
    then = player.to(ask.at) if ask.at else whole
    if then.session_id is None:
        raise UnknownSession("no event of this session is known", operation=_OPERATION, hint="list sessions with: tokentape sessions")
    before = _generation(then, player.event, ask.generation)
    recorded = whole.generations.get(before.generation_id) or before
    prefix, text, event_id = _prefix(before, player, ask)
    document, endpoint = _document(then, before, ask.edit)
    asked = Request(before.request.model if before.request else None, document, endpoint=endpoint)
    ids, rendered = _prompt(whole, recorded, asked, engine)
    if why := hindrance(as_generation(endpoint, document), ids, ids, None):
        raise ConflictError(why, operation=_OPERATION, hint="fork a request whose prompt is text")
    sent = _continuation(as_generation(endpoint, document), (*ids, *prefix), len(prefix), ask)
    place = Place(before.generation_id, ask.index, len(prefix), event_id)
    return Fork(whole, place, ids, prefix, text, rendered, ask.edit, replace(asked, document=sent, endpoint=COMPLETIONS))


def _generation(state: SessionState, event: StoredEvent | None, wanted: bytes | None) -> Generation:
    """The generation that was named, or that the event belongs to, or the last one that had been asked."""
    asked = state.generations
    own: bytes | None = getattr(event.event.payload, "generation_id", None) if event else None
    named = wanted or own
    found = asked.get(named) if named else None
    if found is None and not wanted:
        found = next(reversed(list(asked.values())), None)
    if found is None:
        fault = f"no generation {uuid(wanted)} had been asked by then" if wanted else "no request had been made by then"
        raise UsageError(fault, operation=_OPERATION, hint="`tokentape timeline SESSION` lists its events")
    return found


def _prefix(generation: Generation, player: Player, ask: Ask) -> tuple[tuple[int, ...], str, bytes]:
    """Ids and text of the answer that stay, and the last event that the fork rests on."""
    sequence = next((s for s in generation.sequences if s.index == ask.index), None)
    wanted = 0 if ask.token is None and ask.edit and ask.at is None else ask.token
    last = player.event.event.event_id if player.event else b""
    if sequence is None:
        if wanted or ask.index:
            fault = f"sequence {ask.index} had said nothing by then"
            raise UsageError(fault, operation=_OPERATION, hint=f"it had {count(len(generation.sequences), 'sequence')}")
        return (), "", last
    tape = taped(sequence)
    position = sequence.tokens if wanted is None else wanted
    if not 0 <= position <= sequence.tokens:
        fault = f"no token {position} in sequence {ask.index}"
        raise UsageError(fault, operation=_OPERATION, hint=f"--token 0 to {sequence.tokens}, as many as it had said by then")
    if position > len(tape.token_ids):
        raise ConflictError(f"its tokens cannot be forced: {tape.missing}", operation=_OPERATION, hint=f"--token {len(tape.token_ids)} can")
    text = "".join(entry.text or "" for entry in sequence.entries()[:position])
    return tape.token_ids[:position], text, _brought(player, generation.generation_id, ask.index, position) or last


def _brought(player: Player, generation_id: bytes, index: int, position: int) -> bytes | None:
    """The event that brought the last token before a position."""
    for stored in player.played():
        chunk = stored.event.payload
        if not isinstance(chunk, e.TokenChunk) or (chunk.generation_id, chunk.index) != (generation_id, index):
            continue
        if chunk.position < position <= chunk.position + len(chunk.offsets_us):
            return stored.event.event_id
    return None


def _document(state: SessionState, generation: Generation, edit: Sequence[Operation]) -> tuple[dict[str, Any], str]:
    """The request as it stood, edited, and its endpoint."""
    document = state.edited(generation)
    if document is None or generation.request is None:
        hint = "its content was erased or never recorded"
        raise ConflictError(
            f"the request of generation {uuid(generation.generation_id)} is not on the tape", operation=_OPERATION, hint=hint
        )
    try:
        edited = apply_patch(document, edit)
        if not isinstance(edited, dict):
            raise ValueError("it leaves no request")
        as_generation(generation.request.endpoint, edited)
    except ValueError as error:
        hint = "`tokentape show SESSION --full` shows the request that it is applied to"
        raise UsageError(f"the edit does not apply: {error}", operation=_OPERATION, hint=hint) from error
    return edited, generation.request.endpoint


def _prompt(state: SessionState, generation: Generation, asked: Request, engine: Engine) -> tuple[tuple[int, ...], bool]:
    """The prompt's ids, and whether the engine had to render them: as recorded if it is the recorded prompt."""
    recorded = generation.recording.prompt_token_ids if generation.recording else ()
    answered = state.edited(generation)
    if recorded and answered is not None and _told(asked.endpoint, answered) == _told(asked.endpoint, asked.document):
        return recorded, False
    rendered = engine.render(asked)
    if isinstance(rendered, Refused):
        fault = f"the prompt's token ids are not known, and the engine cannot make them: {rendered.reason}"
        raise ConflictError(fault, operation=_OPERATION, place=engine.name, hint="fork into vLLM")
    return rendered, True


def _told(endpoint: str, document: dict[str, Any]) -> dict[str, Any]:
    asked = as_generation(endpoint, document)
    return {name: asked.get(name) for name in ("prompt", *SHAPING)}


def _continuation(document: dict[str, Any], ids: tuple[int, ...], said: int, ask: Ask) -> dict[str, Any]:
    """The completion of these ids that goes on with a request of which so many tokens are said.

    Raises:
        ConflictError: the request asks for something that a continuation cannot have.
        UsageError: the request allows no more tokens.
    """
    _check(document, said)
    limit = document.get("max_completion_tokens") or document.get("max_tokens")
    limit = ask.max_tokens or (limit - said if isinstance(limit, int) else None)
    if limit is not None and limit < 1:
        fault = f"nothing is left to say: the request allowed {said + limit} tokens, and {said} stand"
        raise UsageError(fault, operation=_OPERATION, hint="give --max-tokens")
    kept = {name: document[name] for name in (*CARRIED, *FROM_THE_START) if document.get(name) is not None}
    if isinstance(least := kept.get("min_tokens"), int):
        kept["min_tokens"] = min(max(0, least - said), limit or least)
    seed = document.get("seed") if ask.seed is None else ask.seed
    seed = random.getrandbits(SEED_BITS) if seed is None else seed
    return {**kept, "prompt": list(ids), "max_tokens": limit, "n": ask.n, "seed": seed}


def _check(document: dict[str, Any], said: int) -> None:
    """Refuse by name what would be another thing for the rest of an answer than for the whole."""
    choice = document.get("tool_choice")
    bent = [name for name in FROM_THE_START if said and document.get(name) not in (None, 0, {"type": "text"})]
    bent += ["use_beam_search"] if document.get("use_beam_search") else []
    bent += ["tool_choice"] if choice not in (None, "auto", "none") else []
    if bent:
        hint = f"""take it out with --edit '[{{"op": "remove", "path": "/{bent[0]}"}}]'""" + (", or fork at --token 0" if said else "")
        raise ConflictError(f"an answer with {bent[0]} cannot be gone on with by its ids", operation=_OPERATION, hint=hint)
