"""Rows that read a source too large to tokenise beforehand."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np

from lswt_core.data.rows import RowLayout
from lswt_core.data.scored import encode_documents
from lswt_core.data.token_cache import group_texts, no_text_message
from lswt_core.data.token_queue import TokenQueue
from lswt_core.errors import DataError
from lswt_core.interfaces import Batch, DataSource, Tokenizer
from lswt_core.plugin_api.documents import documents_after

DocumentAssignment = Literal["least-loaded", "round-robin"]
READ_AHEAD, GROUP = 1 << 18, 256  # characters and documents tokenised at a time

logger = logging.getLogger(__name__)


class Mark(NamedTuple):
    """A place in an epoch of a source."""

    consumed: int  # documents before it
    source_state: Mapping[str, Any] | None  # ``DataSource.state()`` there; None: not known


START = Mark(0, None)


class StreamingRows(RowLayout):
    """Rows that read a streaming source (implements ``data.Rows``).

    Documents are assigned to rows in the source's order. "least-loaded": each to the row with the
    fewest unread tokens, the lowest of equals. "round-robin": document i of an epoch to row i mod
    ``global_batch_size``, as in the original code; row lengths may then diverge.

    Documents are assigned to all rows, whichever are read, so that rows do not depend on the world
    size. The state has every row's unread tokens, the number of documents consumed, and the
    source's own state where it has one; restoring it reads on from there, or else reads and skips
    as many documents. A source that ends is read again. ``seed`` does not shuffle; it is only
    compared on restore.
    """

    def __init__(
        self,
        source: DataSource,
        tokenizer: Tokenizer,
        *,
        global_batch_size: int,
        rows: range,
        seq_len: int,
        seed: int,
        document_masking: bool = False,
        lookahead: int = 0,
        document_assignment: DocumentAssignment = "least-loaded",
    ) -> None:
        super().__init__(
            f"{source.fingerprint()} {tokenizer.fingerprint()}",
            global_batch_size=global_batch_size,
            rows=rows,
            seq_len=seq_len,
            seed=seed,
            document_masking=document_masking,
            lookahead=lookahead,
        )
        self.source, self.tokenizer = source, tokenizer
        self.document_assignment = document_assignment
        self.epoch = 0
        self.consumed = 0  # documents of this epoch that were assigned or, being empty, dropped
        self._mark = START  # the last place, not after ``consumed``, whose source state is known
        self._queues = [TokenQueue() for _ in range(global_batch_size)]
        self._documents = self._tokenised_documents()

    def segment(self, ahead: int = 0) -> Batch:
        """The next segment of every row. The assignment of documents depends only on the rows'
        unread tokens relative to each other, and so not on how far ahead is read.
        """
        return self.batch(*self.read(self.rows, ahead))

    def read(self, rows: range, ahead: int = 0) -> np.ndarray:
        """Inputs, labels and first_visible of a segment of some rows of the global batch, int64
        [3, B, T + lookahead].
        """
        start, count = ahead * self.seq_len, self.seq_len + self.lookahead
        self._fill(start + count)
        eos_id = self.tokenizer.eos_id
        return np.stack(
            [np.stack(self._queues[row].read(start, count, eos_id)) for row in rows], axis=1
        )

    def advance(self) -> None:
        """Move on to the next segment."""
        self._fill(self.seq_len)
        for queue in self._queues:
            queue.drop(self.seq_len)

    def state(self) -> dict[str, Any]:
        """Documents consumed, a place in the source, and every row's unread tokens."""
        return {
            **self.identity,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "source": self._mark._asdict(),
            "pending": [queue.state() for queue in self._queues],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state, with the document after those it consumed."""
        self.check(state)
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self._mark = Mark(**state.get("source", START._asdict()))
        if self.consumed - self._mark.consumed > GROUP and 0 in self.rows:
            logger.warning(
                "data source %r has no state to resume from: %s documents are read again and"
                " skipped, which takes as long as reading them took",
                self.source.name,
                f"{self.consumed:,}",
            )
        self._queues = [TokenQueue.from_state(queue) for queue in state["pending"]]
        self._documents = self._tokenised_documents()

    def _fill(self, n_tokens: int) -> None:
        """Assign documents until every row has ``n_tokens`` unread tokens."""
        while True:
            queue = min(self._queues, key=lambda queue: queue.n_tokens)
            if queue.n_tokens >= n_tokens:
                return
            number, document = next(self._documents)
            if self.document_assignment == "round-robin":
                queue = self._queues[number % len(self._queues)]
            queue.add(document)

    def _tokenised_documents(self) -> Iterator[tuple[int, np.ndarray]]:
        """The ids of every document from the first not consumed, with its number in the epoch;
        epoch after epoch.
        """
        while True:
            skipped = self.consumed
            rows_with_text: set[int] = set()
            for number, ids in self._rest_of_epoch():
                rows_with_text.add(number % len(self._queues))
                yield number, ids
            if skipped == 0:
                self._require_text(rows_with_text)
            self.epoch, self.consumed, self._mark = self.epoch + 1, 0, START

    def _rest_of_epoch(self) -> Iterator[tuple[int, np.ndarray]]:
        """The ids of this epoch's documents that were not consumed; empty ones are dropped."""
        documents = documents_after(self.source, "train", self._mark.source_state)
        documents = islice(documents, self.consumed - self._mark.consumed, None)
        for group in group_texts(documents, READ_AHEAD, GROUP):
            for ids in encode_documents(group, self.tokenizer):
                number = self.consumed
                self.consumed += 1
                if len(ids):
                    yield number, ids
            source_state = self.source.state()  # nothing was read beyond this group
            if source_state is not None:
                self._mark = Mark(self.consumed, source_state)

    def _require_text(self, rows_with_text: set[int]) -> None:
        """Raise DataError after a whole epoch without text, or, assigned round-robin, without text
        for some row.
        """
        if not rows_with_text:
            raise DataError(no_text_message(self.source, "train", self.consumed))
        n_rows = len(self._queues)
        if self.document_assignment == "round-robin" and len(rows_with_text) < n_rows:
            raise DataError(
                f"the {self.consumed} documents of data source {self.source.name!r}, assigned"
                f" round-robin, leave some of {n_rows} rows without text: lower train.batch_size,"
                " use more text, or set train.document_assignment = 'least-loaded'"
            )
