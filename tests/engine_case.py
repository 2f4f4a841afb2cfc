"""What every engine for replay does, whatever it is: one contract that each backend's test inherits."""

from __future__ import annotations

from replay.engines.base import Engine, Forced, Generated, Refused, Request, Scored

MESSAGES = [{"role": "user", "content": "Which request came first, and who changed it?"}]
DOCUMENT = {"messages": MESSAGES, "max_tokens": 24, "temperature": 1.0, "seed": 7, "n": 2}


class EngineCase:
    """Fixtures of each backend: `engine`, and `model`, the name to ask it for."""

    def said(self, engine: Engine, model: str | None) -> Generated:
        """Its answer to the one question."""
        found = engine.generate(Request(model, DOCUMENT))
        assert isinstance(found, Generated), found
        return found

    def test_it_says_who_and_what_it_is(self, engine: Engine) -> None:
        """A name on one line; an environment with three digests, twice the same."""
        first = engine.fingerprint()
        assert first is not None
        second = engine.fingerprint(first)

        assert engine.name
        assert "\n" not in engine.name
        assert second is not None
        assert (first.semantic, first.numeric) == (second.semantic, second.numeric)
        assert len({first.semantic, first.numeric, first.scheduling}) == 3

    def test_it_recognises_what_it_said(self, engine: Engine, model: str | None) -> None:
        """Each of its own tokens has an entry, and a logprob close to the one that it had when it was said."""
        said = self.said(engine, model)
        for sequence in said.sequences:
            scored = engine.force(Request(model, DOCUMENT), said.prompt_token_ids, sequence.token_ids)

            assert isinstance(scored, Scored)
            assert len(sequence.token_ids) == len(scored.logprobs) == len(scored.ranks) == len(scored.top_logprobs)
            drift = [abs(a - b) for a, b in zip(sequence.logprobs, scored.logprobs, strict=True) if b is not None]
            assert len(drift) == len(sequence.token_ids)
            assert max(drift) < 0.3

    def test_several_are_answered_in_their_order(self, engine: Engine, model: str | None) -> None:
        """The answers of one call are those of many, what is refused among them."""
        said, request = self.said(engine, model), Request(model, DOCUMENT)
        forced = [Forced(request, said.prompt_token_ids, sequence.token_ids) for sequence in said.sequences]
        forced.insert(1, Forced(request, said.prompt_token_ids, (10**6,)))
        first, refused, second = engine.force_all(forced)

        assert isinstance(refused, Refused)
        for sequence, scored in zip(said.sequences, (first, second), strict=True):
            assert isinstance(scored, Scored)
            assert len(sequence.token_ids) == len(scored.logprobs)

    def test_the_prompt_is_rendered_as_it_was(self, engine: Engine, model: str | None) -> None:
        """Today's ids of the messages are those that the answer named."""

        assert self.said(engine, model).prompt_token_ids == engine.render(Request(model, DOCUMENT))

    def test_what_it_cannot_do_is_refused_in_one_line(self, engine: Engine, model: str | None) -> None:
        """Ids out of vocabulary, a sequence longer than the context, a request without messages: a reason, no exception."""
        request = Request(model, DOCUMENT)
        answers = (
            engine.force(request, (1, 2), (10**6,)),
            engine.force(request, (1,) * 9000, (5, 6)),
            engine.generate(Request(model, {"messages": []})),
        )

        for answer in answers:
            assert isinstance(answer, Refused)
            assert answer.reason
            assert "\n" not in answer.reason
