"""Replays the engine runs of an embedded log in this process and prints what came: for machines that have no index.

python -m tests.engine_replay DATA [--model PATH] [--until-last] [--forced] [--engine JSON]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from replay.exact.replay import ExactReplay
from replay.exact.run import Run
from schemas.enginerun import calls
from schemas.events import Payload
from schemas.sink import SessionContext, new_id
from tests.engine_log import runs_of


class Nowhere:
    """A tape that keeps nothing."""

    def record(self, session: SessionContext, payload: Payload) -> None:
        """Nothing."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--forced", action="store_true")
    parser.add_argument("--until-last", action="store_true")
    parser.add_argument("--engine", type=json.loads, default={})
    given = parser.parse_args()
    for run in runs_of(given.data):
        until = run.requests[max(run.requests)].place[0] if given.until_last else None
        context = SessionContext(new_id(), "default", "replay")
        outcome = ExactReplay(run, Nowhere(), context, until, given.forced, given.model, given.engine).execute()
        said: dict[str, Any] = outcome.document()
        counted = {"requests": len(run.requests), "recorded_steps": len(run.steps), "preemptions": preemptions(run)}
        sys.stdout.write(json.dumps({**said, **counted}) + "\n")


def preemptions(run: Run) -> int:
    """How often a request was put off because the cache was full."""
    return sum(len(call.numbers) for step in run.steps for call in step.calls if isinstance(call, calls.Preempt))


if __name__ == "__main__":
    main()
