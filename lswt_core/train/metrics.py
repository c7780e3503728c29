"""The metrics of a run: metrics.jsonl, which has them all, and trackers, whose failures never stop
the run.
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
from typing import NamedTuple, Protocol

from torch import Tensor

from lswt_core.errors import ResourceError
from lswt_core.interfaces import Tracker
from lswt_core.plugin_api.atomic_write import write_atomically

QUEUE_LENGTH = 1000  # entries a slow tracker may lag behind
CLOSE_SECONDS = 5.0  # how long the end of a run waits for its trackers
POLL_SECONDS = 0.1  # how soon an idle tracker thread notices the end of the run


class MetricsSink(Protocol):
    """Where a trainer logs its metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""


class UnwrittenMetrics(NamedTuple):
    """The metrics of a step whose optimizer statistics, [] each, are still on the device."""

    step: int
    values: Mapping[str, float]
    statistics: Mapping[str, Tensor]


class Metrics:
    """A run's metrics.jsonl, one JSON object a line, and its trackers."""

    def __init__(
        self,
        path: Path,
        trackers: Sequence[Tracker] = (),
        *,
        resume_step: int | None = None,
        notice: Callable[[str], None] = print,
    ) -> None:
        """``resume_step``: lines of later steps are dropped, since those are computed again; None:
        all lines are dropped. ``notice`` prints a warning.
        """
        self._regular = path.is_file() or not path.exists()  # False: os.devnull
        if self._regular:
            _truncate(path, -1 if resume_step is None else resume_step, notice)
        # one write a line: a killed process leaves at most one torn line, the last
        self._file = path.open("ab", buffering=0)
        self._trackers = TrackerThread(trackers, notice) if trackers else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of a step; infinite and NaN values are written as null. Raises
        ResourceError.
        """
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
        if self._trackers:
            self._trackers.put(step, dict(values))

    def sync(self) -> None:
        """Fsync the file, so that the lines of a checkpoint's steps are on disk before it is."""
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
        """Close the file, and the trackers within CLOSE_SECONDS."""
        self._file.close()
        if self._trackers:
            self._trackers.close()


class TrackerThread:
    """Passes metrics to trackers in a background thread. A tracker that raises is reported and
    dropped; one that hangs blocks the other trackers, never the run.
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
        """Queue an entry without blocking; it is dropped if the queue is full."""
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
        """Wait up to CLOSE_SECONDS for the trackers to finish."""
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


def _truncate(path: Path, last: int, notice: Callable[[str], None]) -> None:
    """Drop lines after a step and damaged lines, atomically.

    A last line without a newline was torn when its process was killed. Every other damaged line is
    reported: its metrics are lost.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    steps = [_step_of(line) for line in lines]
    for number, (line, step) in enumerate(zip(lines, steps, strict=True), 1):
        if step is None and line.endswith(b"\n"):
            notice(
                f"{path}:{number}: this line is damaged and was left out; its numbers are lost:"
                f" {line[:40]!r}"
            )
    kept = [
        line for line, step in zip(lines, steps, strict=True) if step is not None and step <= last
    ]
    write_atomically(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """The step of a line; None if the line is damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
