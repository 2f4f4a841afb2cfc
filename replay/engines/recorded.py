"""The tape as an engine: it says what was said, and thinks of it what was thought. No model is run."""

from __future__ import annotations

from collections.abc import Sequence

from replay.engines.base import Forced, Generated, Refused, Request, Scored, Spoken
from replay.state import Generation, SessionState
from replay.taped import taped
from schemas.events import EnvironmentCaptured


class RecordedEngine:
    """Answers each request of a session as it was answered; the request is found by its document."""

    def __init__(self, state: SessionState) -> None:
        self._state = state

    @property
    def name(self) -> str:
        """`recorded`."""
        return "recorded"

    def fingerprint(self, recorded: EnvironmentCaptured | None = None) -> EnvironmentCaptured | None:
        """The environment of the recording."""
        if recorded is not None:
            return recorded
        return self._state.environments[-1].event if len(self._state.environments) else None

    def generate(self, request: Request) -> Generated | Refused:
        """What was answered to this request the first time it was asked."""
        for generation in self._state.generations.values():
            if self._state.edited(generation) == request.document:
                return _generated(generation)
        return Refused("the tape holds no such request")

    def force(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        """The recorded logprobs of these tokens; ranks were not recorded."""
        for generation in self._state.generations.values():
            recording = generation.recording
            if recording is None or recording.prompt_token_ids != prompt_token_ids:
                continue
            for sequence in recording.lanes:
                tape = taped(sequence)
                if tape.token_ids[: len(token_ids)] == token_ids:
                    nothing = (None,) * len(token_ids)
                    return Scored(tape.logprobs[: len(token_ids)], nothing, nothing)
        return Refused("the tape holds no such tokens after this prompt")

    def render(self, request: Request) -> tuple[int, ...] | Refused:
        """The prompt's token ids as they were recorded."""
        said = self.generate(request)
        if isinstance(said, Refused):
            return said
        return said.prompt_token_ids or Refused("the recording has no prompt token ids")

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """One after another."""
        return [self.generate(request) for request in requests]

    def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
        """One after another."""
        return [self.force(each.request, each.prompt_token_ids, each.token_ids) for each in several]

    def close(self) -> None:
        """Nothing to let go of."""


def _generated(generation: Generation) -> Generated:
    spoken = []
    for sequence in generation.sequences:
        tape = taped(sequence)
        logprobs = tuple(value for value in tape.logprobs if value is not None)
        reason = sequence.finished.finish_reason if sequence.finished else None
        whole = len(logprobs) == len(tape.token_ids)
        spoken.append(Spoken(sequence.index, sequence.text(), tape.token_ids, logprobs if whole else (), reason))
    recording = generation.recording
    return Generated(tuple(spoken), recording.prompt_token_ids if recording else ())
