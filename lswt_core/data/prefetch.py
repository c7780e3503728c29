"""The next step's tokens, read while this step runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from lswt_core.data.contiguous import Rows
from lswt_core.interfaces import Batch


class Prefetched(Rows):
    """Rows that read one segment ahead in a thread; what they return, and their state, are the same
    as without.

    The thread looks ahead and commits nothing. What goes wrong in it is raised by the call that
    needs the segment. ``pinned`` puts batches where a device can copy them from while it computes.
    """

    def __init__(self, rows: Rows, *, pinned: bool) -> None:
        self.inner, self.pinned = rows, pinned
        self.rows, self.seq_len, self.document_masking, self.identity = (
            rows.rows,
            rows.seq_len,
            rows.document_masking,
            rows.identity,
        )
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.ahead: dict[int, Future[Batch]] = {}  # by how many segments from here

    def segment(self, ahead: int = 0) -> Batch:
        """The segment from here, and begin to read the one after it."""
        batch = self.task(ahead).result()
        self.task(ahead + 1)
        return batch

    def task(self, ahead: int) -> Future[Batch]:
        """The reading of a segment, begun if it was not."""
        if ahead not in self.ahead:
            self.ahead[ahead] = self.thread.submit(self.read, ahead)
        return self.ahead[ahead]

    def read(self, ahead: int) -> Batch:
        """In the thread."""
        batch = self.inner.segment(ahead)
        return batch.map(Tensor.pin_memory) if self.pinned else batch

    def advance(self) -> None:
        """Commit: move on to the next segment."""
        self.settle()
        self.inner.advance()
        self.ahead = {ahead - 1: task for ahead, task in self.ahead.items() if ahead > 0}

    def state(self) -> dict[str, Any]:
        """Where the rows stand, not what was read ahead."""
        self.settle()
        return self.inner.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.settle()
        self.inner.restore(state)
        self.ahead = {}

    def settle(self) -> None:
        """Wait until the thread rests: rows are touched by one at a time."""
        for task in self.ahead.values():
            task.exception()  # kept for the call that needs the segment

    def close(self) -> None:
        """End the thread."""
        self.thread.shutdown(cancel_futures=True)
