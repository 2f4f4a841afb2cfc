"""Services lent to the tests of one run.

pytest-xdist runs tests in several processes, and a service must outlive the process whose test wanted it first. So the
process that leads the run starts them: a test leaves a file that says what it wants and waits for one that says where it
is. Nothing is started that no test asks for.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from scripts.native.component import Address
from scripts.native.processes import ServiceError
from scripts.services import NAMES, Services


class Lender(threading.Thread):
    """Starts each service that is wanted in ``folder``, and stops all of them at the end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(name="lender", daemon=True)
        self._folder = folder
        self._loans: dict[str, _Loan] = {}
        self._over = threading.Event()

    def run(self) -> None:
        """Look for wishes until the run is over."""
        while not self._over.wait(0.1):
            for name in NAMES:
                if name not in self._loans and _wish(self._folder, name).exists() and not _answer(self._folder, name).exists():
                    self._loans[name] = _Loan(self._folder, name)
                    self._loans[name].start()

    def finish(self) -> None:
        """Stop the services, also those that are still starting, and wait until they are gone."""
        self._over.set()
        self.join()
        for loan in self._loans.values():
            loan.over.set()
        for loan in self._loans.values():
            loan.join()


class _Loan(threading.Thread):
    """One service. The thread lives as long as it: the kernel ties a process to the thread that started it."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(name=f"{name}-start", daemon=True)
        self.over = threading.Event()
        self._folder = folder
        self._service = name
        self._services = Services(folder / name, say=self._say_while_wanted, tied=True)

    def run(self) -> None:
        try:
            lend(self._folder, self._service, self._services.up([self._service])[self._service])
            self.over.wait()
        except BaseException as error:
            _write(self._folder, self._service, {"failure": f"{type(error).__name__}: {error}"})
        finally:
            self._services.down()

    def _say_while_wanted(self, line: str) -> None:
        """Pass progress on; an interrupted run leaves a start that takes minutes at its next progress line."""
        if self.over.is_set():
            raise ServiceError("no longer wanted")
        say(line)


def say(line: str) -> None:
    """Progress of the services goes past pytest's capture, since a silent wait looks like a hang."""
    print(f"[services] {line}", file=sys.__stderr__, flush=True)


def lend(folder: Path, name: str, address: Address) -> None:
    """Tell all tests of the run where a service is."""
    _write(folder, name, {"address": address})


def want(folder: Path, name: str) -> None:
    """Have a service started, without waiting for it."""
    _wish(folder, name).touch()


def borrow(folder: Path, name: str) -> Address:
    """Address of a service that runs until the end of the run; waits until it answers.

    Raises:
        ServiceError: it cannot be started.
    """
    want(folder, name)
    path = _answer(folder, name)
    while not path.exists():  # the start has a deadline of its own
        time.sleep(0.1)
    answer = json.loads(path.read_text(encoding="utf-8"))
    if "failure" in answer:
        raise ServiceError(answer["failure"])
    address: Address = answer["address"]
    return address


def _write(folder: Path, name: str, answer: dict[str, object]) -> None:
    """Write an answer whole: who waits for the file must not read half of it."""
    new = folder / f"{name}.new"
    new.write_text(json.dumps(answer), encoding="utf-8")
    new.replace(_answer(folder, name))


def _wish(folder: Path, name: str) -> Path:
    return folder / f"{name}.wanted"


def _answer(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"
