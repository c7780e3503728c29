"""A stream that the first rank of a machine reads and tokenises for all of the machine's ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lswt_core.data.streaming import StreamingRows
from lswt_core.distributed.node import Node
from lswt_core.interfaces import Batch


class SharedStream:
    """Some rows of a stream, read by the first rank of the machine (implements ``data.Rows``).

    All ranks of a machine make the same calls of ``segment``, in the same order, from one thread
    each: the segments are dealt by collectives. Only the first rank has a place in the source;
    the ``state`` of the others is no position.
    """

    def __init__(self, inner: StreamingRows, node: Node, rows: Sequence[range]) -> None:
        """``inner`` has this rank's rows; ``rows`` are those of every rank of the machine, equally
        many.
        """
        self.inner, self.node, self.rows = inner, node, rows
        width = inner.seq_len + inner.lookahead
        # inputs, labels and first_visible
        self.outline = torch.empty(3, len(inner.rows), width, dtype=torch.int64)

    def segment(self, ahead: int = 0) -> Batch:
        """The next segment of every row of this rank. Raises DataError on every rank of the machine
        if the first cannot read it.
        """

        def read() -> list[Tensor]:
            return [torch.from_numpy(self.inner.read(rows, ahead)) for rows in self.rows]

        inputs, labels, first_visible = self.node.deal(read, self.outline).numpy()
        return self.inner.batch(inputs, labels, first_visible)

    def advance(self) -> None:
        """Move on to the next segment."""
        if self.node.is_leader:
            self.inner.advance()

    def state(self) -> dict[str, Any]:
        """The position, on the first rank of the machine; on the others, what identifies the rows.
        The run's first rank is the first of its machine, and saves it.
        """
        return self.inner.state() if self.node.is_leader else dict(self.inner.identity)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        if self.node.is_leader:
            self.inner.restore(state)
        else:
            self.inner.check(state)

    def close(self) -> None:
        """Close the inner rows."""
        self.inner.close()
