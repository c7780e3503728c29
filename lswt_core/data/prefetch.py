"""Prefetching: the next batch is read in a background thread while a step runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from lswt_core.data.rows import Rows
from lswt_core.interfaces import Batch


class PrefetchedRows:
    """Rows that read one segment ahead (implements ``data.Rows``). Batches and state are those of
    the wrapped rows; an exception of the thread is raised by the call that needs its segment.
    """

    def __init__(self, rows: Rows, *, pin_memory: bool) -> None:
        """``pin_memory``: return batches in pinned memory, for asynchronous copies to a GPU."""
        self.inner, self.pin_memory = rows, pin_memory
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.pending: dict[int, Future[Batch]] = {}  # by segments ahead of the position

    def segment(self, ahead: int = 0) -> Batch:
        """The segment at the position; starts reading the one after it."""
        batch = self._submit(ahead).result()
        self._submit(ahead + 1)
        return batch

    def _submit(self, ahead: int) -> Future[Batch]:
        """The future of a segment, submitted if it was not."""
        if ahead not in self.pending:
            self.pending[ahead] = self.thread.submit(self._read, ahead)
        return self.pending[ahead]

    def _read(self, ahead: int) -> Batch:
        """Read a segment, in the thread."""
        batch = self.inner.segment(ahead)
        if self.pin_memory:
            return batch.map(Tensor.pin_memory)
        return batch

    def advance(self) -> None:
        """Move on to the next segment."""
        self._wait()
        self.inner.advance()
        self.pending = {ahead - 1: task for ahead, task in self.pending.items() if ahead > 0}

    def state(self) -> dict[str, Any]:
        """The position, without what was prefetched."""
        self._wait()
        return self.inner.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""
        self._wait()
        self.inner.restore(state)
        self.pending = {}

    def _wait(self) -> None:
        """Wait until the thread is idle: the wrapped rows are not thread-safe."""
        for task in self.pending.values():
            task.exception()  # raised later, by the call that needs the segment

    def close(self) -> None:
        """End the thread and close the wrapped rows."""
        # what was submitted is read: another rank may have begun to read it together with this one
        self.thread.shutdown()
        self.inner.close()
