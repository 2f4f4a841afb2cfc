"""Clients that keep asking while parts are killed under them, and what they saw compared with what the tape holds."""

from __future__ import annotations

import asyncio
import collections
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from schemas.settings import Settings
from store.log import open_log
from tests.gateway_rig import DONE, BrokenUpstream, Peer, broken, chunk
from tests.program import Program, until

PIECES = 25
"""Pieces of each answer."""


@contextmanager
def talkative() -> Iterator[BrokenUpstream]:
    """An upstream that answers each question with pieces that name it and their number, a few milliseconds apart."""

    async def act(peer: Peer) -> None:
        question = json.loads(peer.body)["messages"][-1]["content"]
        await peer.begin_chunked()
        for number in range(PIECES):
            await peer.chunk(chunk(f"{question}-{number} "))
            await asyncio.sleep(0.004)
        await peer.chunk(chunk(finish="stop") + DONE)
        await peer.chunk(b"")
        peer.kept = True

    with broken(act) as upstream:
        yield upstream


@dataclass
class Crowd:
    """Clients in threads, each with a session of its own, asking one question after another until `stop`."""

    url: str
    clients: int = 4
    seen: dict[str, str] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> Crowd:
        """Begin to ask."""
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Ask nothing more, and return when the last answer is there."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def more(self, answers: int = 6) -> None:
        """Return when this many further answers have come to their end."""
        before = len(self.ended)
        until(lambda: len(self.ended) >= before + answers)

    def _client(self, number: int) -> None:
        session = str(uuid.uuid4())
        count = 0
        with httpx.Client(timeout=60) as client:
            while not self._over.is_set():
                question = f"c{number}q{count}"
                count += 1
                self.seen[question] = ""
                with suppress(httpx.TransportError):
                    self._ask(client, session, question)
                    continue
                self._over.wait(0.1)

    def _ask(self, client: httpx.Client, session: str, question: str) -> None:
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": question}]}
        with client.stream("POST", f"{self.url}/v1/chat/completions", json=body, headers={"x-tokentape-session": session}) as answer:
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.ended.add(question)
                elif line.startswith("data: "):
                    for choice in json.loads(line[6:]).get("choices", []):
                        self.seen[question] += choice["delta"].get("content") or ""


@dataclass(frozen=True)
class Tape:
    """What an installation holds: texts and outcomes of each question's generations, and how often each event is there."""

    texts: dict[str, list[str]]
    outcomes: dict[str, list[str]]
    events: dict[str, int]


def read_tape(program: Program) -> Tape:
    """Ask for everything in SQL."""
    spoken, counts = program.ask(
        """
        SELECT json_extract_string(m.body, '$.content') AS question, g.outcome,
            (SELECT string_agg(t.text, '' ORDER BY t."position") FROM tokens t WHERE t.generation_id = g.generation_id) AS answer
        FROM generations g JOIN messages m USING (generation_id) ORDER BY g.submitted_at""",
        "SELECT event_id, count(*) AS n FROM events GROUP BY event_id",
    )
    texts, outcomes = collections.defaultdict(list), collections.defaultdict(list)
    for row in spoken:
        texts[row["question"]].append(row["answer"] or "")
        outcomes[row["question"]].append(row["outcome"])
    return Tape(dict(texts), dict(outcomes), {row["event_id"]: row["n"] for row in counts})


def logged(settings: Settings) -> set[str]:
    """Ids of all events in the log."""
    log = open_log(settings.log, settings.data, create=False)
    found = set()
    for partition in range(log.partitions):
        offset, end = log.bounds(partition)
        while offset < end:
            batch = log.read(partition, offset, limit=10_000, wait_s=5.0)
            found |= {str(uuid.UUID(bytes=value[10:26])) for value in batch.values}
            offset = batch.offset_next
    log.close()
    return found


def differences(crowd: Crowd, program: Program) -> dict[str, Any]:
    """What is wrong with a tape, by kind of fault; empty when nothing is lost and nothing is there twice."""
    in_log = logged(program.settings)
    tape = read_tape(program)
    wrong = {
        "ended but not whole on the tape": [
            question
            for question in crowd.ended
            if (tape.texts.get(question), tape.outcomes.get(question)) != ([crowd.seen[question]], ["finished"])
        ],
        "asked once but on the tape twice": [question for question, texts in tape.texts.items() if len(texts) > 1],
        "never asked": sorted(tape.texts.keys() - crowd.seen.keys()),
        "in the log but not in SQL": sorted(in_log - tape.events.keys()),
        "more than once in SQL": [event for event, count in tape.events.items() if count != 1],
        "said to be missing": _missing(program),
    }
    return {fault: found for fault, found in wrong.items() if found}


def _missing(program: Program) -> dict[str, int]:
    return {what: count for what, count in program.status["missing"].items() if count and what != "duplicates_dropped"}


def watched(crowd: Crowd, *steps: Callable[[], Any]) -> None:
    """Take each step once the clients have got some answers, so that every one falls among living streams."""
    crowd.start()
    try:
        for step in steps:
            crowd.more()
            step()
        crowd.more()
    finally:
        crowd.stop()
