"""The contract of a control log as tests: every backend inherits them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from schemas.errors import LogChanged, LogUnavailable, UsageError
from schemas.settings import Settings
from store.control import ControlLog, ControlRecord, ControlView, open_control
from tests.program import until

# Longer than any wait here takes on a busy machine; reached only by a test that fails.
PATIENCE_S = 30.0
Opener = Callable[[], ControlLog]


def follow_all(log: ControlLog) -> list[ControlRecord]:
    """Everything there is, from the beginning."""
    return list(log.follow(0))


class ControlCase:
    """What every control log does."""

    @pytest.fixture
    def settings(self) -> Settings:
        """Settings of a control log that does not exist yet."""
        raise NotImplementedError

    @pytest.fixture
    def reopen(self, settings: Settings) -> Iterator[Opener]:
        """Opens the log as another process would, as often as wanted."""
        logs: list[ControlLog] = []

        def opener() -> ControlLog:
            logs.append(open_control(settings))
            return logs[-1]

        yield opener
        for log in logs:
            log.close()

    @pytest.fixture
    def log(self, reopen: Opener) -> ControlLog:
        """A new control log."""
        return reopen()

    def test_another_reads_what_one_wrote(self, log: ControlLog, reopen: Opener) -> None:
        """Facts are there for the next process, values unchanged, positions growing."""
        values: list[dict[str, Any]] = [{"a": 1, "b": [None, "ü", {"c": 0.5}]}, {}, {"lone": "\ud800"}]
        positions = [log.append("thing", f"key {number}/x", value) for number, value in enumerate(values)]
        found = follow_all(reopen())

        assert positions == sorted(set(positions)) == [record.position for record in found]
        assert [("thing", f"key {number}/x", value) for number, value in enumerate(values)] == [(r.kind, r.key, r.value) for r in found]

    def test_follow_goes_on_where_it_stood(self, log: ControlLog) -> None:
        """After a position comes what was written after it, once."""
        first = log.append("thing", "a", {"n": 1})
        second = log.append("thing", "b", {"n": 2})

        assert [second] == [record.position for record in log.follow(first)]
        assert [] == list(log.follow(second))

    def test_last_value_holds(self, log: ControlLog) -> None:
        """Per kind and key the last value holds, and None takes it away."""
        log.append("thing", "a", {"n": 1})
        log.append("thing", "b", {"n": 1})
        log.append("other", "a", {"n": 9})
        log.append("thing", "a", {"n": 2})
        log.append("thing", "b", None)

        assert {"a": {"n": 2}} == log.latest("thing")
        assert {"a": {"n": 9}} == log.latest("other")
        assert {} == log.latest("never")

    def test_deletion_is_followed(self, log: ControlLog) -> None:
        """A follower learns that a key was taken away."""
        position = log.append("thing", "a", {"n": 1})
        log.append("thing", "a", None)

        assert [("a", None)] == [(record.key, record.value) for record in log.follow(position)]

    def test_waiting_follower_wakes(self, log: ControlLog, reopen: Opener) -> None:
        """One that waits gets what another process writes."""
        position = log.append("thing", "a", {"n": 1})
        writer = threading.Thread(target=reopen().append, args=("thing", "b", {"n": 2}))
        writer.start()
        found = log.follow(position, wait_s=PATIENCE_S)
        writer.join()

        assert [{"n": 2}] == [record.value for record in found]

    def test_writers_at_once(self, log: ControlLog, reopen: Opener) -> None:
        """Several writers lose nothing and never share a position."""
        positions: list[int] = []

        def write(own: ControlLog, mark: int) -> None:
            positions.extend(own.append("thing", f"{mark}-{number}", {"n": number}) for number in range(20))

        threads = [threading.Thread(target=write, args=(reopen(), mark)) for mark in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert sorted(positions) == [record.position for record in follow_all(log)]
        assert 60 == len(set(positions))

    @pytest.mark.parametrize(("kind", "key"), [("", "a"), ("a/b", "a"), ("a", "")])
    def test_odd_names(self, log: ControlLog, kind: str, key: str) -> None:
        """A kind or key that could not be told apart is refused, in one line that says what is valid."""
        with pytest.raises(UsageError) as caught:
            log.append(kind, key, {})

        assert "a kind is a word" in caught.value.hint

    def test_position_of_another_log(self, log: ControlLog) -> None:
        """A follower of a log that was replaced is told so."""
        position = log.append("thing", "a", {})
        with pytest.raises(LogChanged):
            log.follow(position + 1000)

    def test_closed(self, log: ControlLog) -> None:
        """A closed log says that it is closed; closing twice is fine."""
        log.close()
        log.close()
        with pytest.raises(LogUnavailable, match="closed"):
            log.append("thing", "a", {})

    def test_view(self, log: ControlLog, reopen: Opener) -> None:
        """A worker's copy holds what was there before and what comes, and says it in order."""
        heard: list[tuple[str, Any]] = []
        log.append("thing", "a", {"n": 1})
        view = ControlView(log)
        view.listen(lambda record: heard.append((record.key, record.value)))
        try:
            assert {"a": {"n": 1}} == view.latest("thing")
            other = reopen()
            other.append("thing", "b", {"n": 2})
            other.append("thing", "a", None)
            until(lambda: view.latest("thing") == {"b": {"n": 2}})
        finally:
            view.close()

        assert [("a", {"n": 1}), ("b", {"n": 2}), ("a", None)] == heard
        assert view.get("thing", "b") == {"n": 2}
        assert view.get("thing", "a") is None
