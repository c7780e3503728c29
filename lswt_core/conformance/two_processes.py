"""Two processes that each hold a piece of every parameter, for the check "sharding": started once,
for all components that this process checks.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from threading import Thread
from time import monotonic
from typing import IO, Any
from unittest import SkipTest

from lswt_core.conformance import sharding_worker
from lswt_core.conformance.fresh_process import file_of, search_path
from lswt_core.conformance.sharded_training import PROCESSES
from lswt_core.conformance.subject import Subject

TIMEOUT = 90.0  # seconds, to start or to answer
LAGGING = 5.0  # seconds that the second answer may come after one that is an error


class Worker:
    """One of the processes."""

    def __init__(self, rank: int, directory: Path) -> None:
        self.log = directory / f"{rank}.txt"
        module, store = sharding_worker.__name__, str(directory / "store")
        script = f"from {module} import main; main({rank}, {store!r})"
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | {"PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"},
                text=True,
            )
        self.answers: Queue[dict[str, Any]] = Queue()
        self.reader = Thread(target=self.read, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    def read(self, stdout: IO[str]) -> None:
        """Queue what the process answers; at its end, the last line of its errors."""
        with stdout:
            for line in stdout:
                self.answers.put(json.loads(line))
        lines = (
            self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else ()
        )
        self.answers.put({"ended": lines[-1] if lines else "no message"})

    def ask(self, request: str) -> None:
        """Send a request, unless the process has ended."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # its answer says why it has ended
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        self.reader.join()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()


class TwoProcesses:
    """Both processes."""

    def __init__(self) -> None:
        self.directory = TemporaryDirectory()
        ranks = range(PROCESSES)
        self.workers = [Worker(rank, Path(self.directory.name)) for rank in ranks]
        atexit.register(self.end)
        self.started = self.answers()

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The answer of each to a request."""
        words = json.dumps(request)
        for worker in self.workers:
            worker.ask(words)
        return self.answers()

    def answers(self) -> list[dict[str, Any]]:
        """The next answer of each. After an error of one, the other may wait for it for ever."""
        latest = monotonic() + TIMEOUT
        found: dict[int, dict[str, Any]] = {}
        while len(found) < len(self.workers):
            for rank, worker in enumerate(self.workers):
                if rank not in found:
                    try:
                        found[rank] = worker.answers.get(timeout=0.02)
                    except Empty:
                        continue
                    if found[rank].keys() & {"error", "ended", "skipped"}:
                        latest = min(latest, monotonic() + LAGGING)
            if monotonic() > latest:
                break
        silent = {"error": "on two processes it waits for ever"}
        return [found.get(rank, silent) for rank in range(len(self.workers))]

    def end(self) -> None:
        """Kill both."""
        atexit.unregister(self.end)
        for worker in self.workers:
            worker.end()
        self.directory.cleanup()


@cache
def two_processes() -> TwoProcesses:
    """The processes that run; started at the first call, and after they were discarded."""
    return TwoProcesses()


def discard() -> None:
    """End the processes, which an error of one leaves in different places."""
    two_processes().end()
    two_processes.cache_clear()


def difference_of(subject: Subject) -> str:
    """What differs for a component between two processes and one, or is an error on two, in words;
    "" if nothing does. Raises SkipTest if that cannot be known here.
    """
    request = {
        "module": subject.offer.module,
        "file": file_of(subject),
        "component": [subject.kind, subject.offer.name],
        "options": subject.options,
    }
    answers = two_processes().started
    if all("ready" in one for one in answers):
        answers = two_processes().ask(request)
    if all("found" in one for one in answers):
        return next((str(one["found"]) for one in answers if one["found"]), "")
    if answers[0] != answers[1]:  # else both are where they were
        discard()
    return explain(answers)


def explain(answers: list[dict[str, Any]]) -> str:
    """The first error of answers without a comparison. Raises SkipTest if there is none."""
    for kind in ("skipped", "ended", "error"):
        for one in answers:
            if kind in one and kind != "error":
                raise SkipTest(str(one[kind]))
            if kind in one:
                return str(one[kind])
    return next(str(one["found"]) for one in answers if "found" in one)
