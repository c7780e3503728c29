"""The numbers of a run: metrics.jsonl, which is the truth, and the trackers it is mirrored to,
which can never stop the run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread

from lswt_core.errors import ResourceError
from lswt_core.interfaces import Tracker
from lswt_core.plugin_api.atomic_write import make_directory, write_atomically

QUEUE_LENGTH = 1000  # entries a slow tracker may lag behind
CLOSE_SECONDS = 5.0  # how long the end of a run waits for its trackers
POLL_SECONDS = 0.1  # how soon an idle mirror notices the end of the run


class Metrics:
    """A run's metrics.jsonl, one JSON object a line, and its mirrors."""

    def __init__(
        self,
        path: Path,
        trackers: Sequence[Tracker] = (),
        *,
        resume_step: int | None = None,
        notice: Callable[[str], None] = print,
    ) -> None:
        """Continue a file after ``resume_step``; what it has of later steps is dropped, since they
        are computed again. None: a run from its beginning, of which nothing was written before.
        """
        make_directory(path.parent)
        self._regular = path.is_file() or not path.exists()  # not os.devnull, say
        if self._regular:
            _cut(path, -1 if resume_step is None else resume_step, notice)
        # one write a line: a killed process leaves at most one torn line, the last
        self._file = path.open("ab", buffering=0)
        self._mirror = Mirror(trackers, notice) if trackers else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the numbers of a step; what is not finite is written as null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = (json.dumps({"step": step, **finite}) + "\n").encode()
        try:
            complete = self._file.write(line) == len(line)
        except OSError as error:
            raise ResourceError(
                f"{self._file.name} cannot be written: {error.strerror}; free some space and"
                " continue the run"
            ) from error
        if not complete:
            raise ResourceError(
                f"{self._file.name} cannot be written: the disk is full; free some space and"
                " continue the run"
            )
        if self._mirror:
            self._mirror.put(step, dict(values))

    def sync(self) -> None:
        """Force all lines to the disk: a checkpoint that is published promises that those of its
        steps are there.
        """
        if not self._regular:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ResourceError(
                f"{self._file.name} cannot be written: {error.strerror}; free some space and"
                " continue the run"
            ) from error

    def close(self) -> None:
        """Close the file; wait a few seconds for the trackers."""
        self._file.close()
        if self._mirror:
            self._mirror.close()


class Mirror:
    """Hands metrics to trackers on a thread of its own. A tracker that raises is reported and
    dropped; one that hangs keeps the others waiting, never the run.
    """

    def __init__(self, trackers: Sequence[Tracker], notice: Callable[[str], None]) -> None:
        self._trackers = list(trackers)
        self._notice = notice
        self._queue: Queue[tuple[int, dict[str, float]]] = Queue(QUEUE_LENGTH)
        self._full = False
        self._closing = Event()
        self._thread = Thread(target=self._run, name="lswt-trackers", daemon=True)
        self._thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        """Queue an entry; returns at once."""
        try:
            self._queue.put_nowait((step, values))
        except Full:
            if not self._full:
                self._notice(
                    f"trackers ({self._names()}) do not keep up; they miss metrics from step {step}"
                    " on, metrics.jsonl has all"
                )
            self._full = True

    def close(self) -> None:
        """Let the trackers finish, for a few seconds at most."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._notice(
                f"trackers ({self._names()}) did not finish in {CLOSE_SECONDS:.0f} s; metrics.jsonl"
                " has all metrics"
            )

    def _run(self) -> None:
        for step, values in self._entries():
            for tracker in list(self._trackers):
                self._guard(tracker, partial(tracker.log, values, step))
        for tracker in list(self._trackers):
            self._guard(tracker, tracker.close)

    def _entries(self) -> Iterator[tuple[int, dict[str, float]]]:
        while True:
            try:
                yield self._queue.get(timeout=POLL_SECONDS)
            except Empty:
                if self._closing.is_set():
                    return

    def _guard(self, tracker: Tracker, call: Callable[[], None]) -> None:
        try:
            call()
        # SystemExit too, which would end this thread and with it all trackers
        except BaseException as error:
            self._trackers.remove(tracker)
            self._notice(
                f"tracker {tracker.name!r} failed and is off for the rest of the run:"
                f" {type(error).__name__}: {error}"
            )

    def _names(self) -> str:
        return ", ".join(tracker.name for tracker in self._trackers)


def _cut(path: Path, last: int, notice: Callable[[str], None]) -> None:
    """Drop what is later than a step, and torn lines; the file changes as a whole or not at all.

    A line without an end was torn by the end of the process that wrote it. Any other that cannot be
    read is named: it held numbers that are now lost.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n") and _step_of(line) == math.inf:
            notice(
                f"{path}:{number}: this line is damaged and was left out; its numbers are lost:"
                f" {line[:40]!r}"
            )
    write_atomically(path, b"".join(line for line in lines if _step_of(line) <= last))


def _step_of(line: bytes) -> float:
    """The step of a line; infinite if the line is torn."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf
