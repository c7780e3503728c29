"""Rows that read a source too large to tokenise beforehand."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import numpy as np

from lswt_core.data.contiguous import Rows
from lswt_core.data.token_cache import groups, nothing
from lswt_core.errors import DataError
from lswt_core.interfaces import Batch, DataSource, Tokenizer

DocumentAssignment = Literal["least-loaded", "round-robin"]
READ_AHEAD = 1 << 18  # characters tokenised at a time


class StreamingRows(Rows):
    """A streaming source: documents are dealt in their order.

    Dealing "least-loaded", each goes to the row with the fewest tokens left (the lowest of equals);
    "round-robin", document i of an epoch goes to row i mod ``global_batch_size``, as in the
    original code, however unlike the rows then grow.

    Every process deals all rows and reads its own, so the rows do not depend on the number of
    processes. The state holds every row's unread tokens and the number of documents dealt; going on
    reads past that many. A source that ends begins again. The order of a stream is its source's:
    ``seed`` is only compared when a state is restored.
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
        document_assignment: DocumentAssignment = "least-loaded",
    ) -> None:
        fingerprint = f"{source.fingerprint()} {tokenizer.fingerprint()}"
        super().__init__(
            fingerprint,
            global_batch_size=global_batch_size,
            rows=rows,
            seq_len=seq_len,
            seed=seed,
            document_masking=document_masking,
        )
        self.source, self.tokenizer, self.document_assignment = (
            source,
            tokenizer,
            document_assignment,
        )
        self.epoch = 0
        self.consumed = 0  # documents of this epoch that were dealt or, being empty, dropped
        self._pending = [Pending() for _ in range(global_batch_size)]
        self._dealt = self._deal()

    def segment(self, ahead: int = 0) -> Batch:
        """The next tokens of every row. Which row a document goes to depends on how much each has
        left beside the others, and so not on how far ahead it is dealt.
        """
        self._fill((ahead + 1) * self.seq_len)
        read = [
            self._pending[row].read(ahead * self.seq_len, self.seq_len, self.tokenizer.eos_id)
            for row in self.rows
        ]
        # [B, T] each
        inputs, labels, first_visible = (np.stack(columns) for columns in zip(*read, strict=True))
        return self.batch(inputs, labels, first_visible)

    def advance(self) -> None:
        """Commit: move on to the next segment."""
        self._fill(self.seq_len)
        for row in self._pending:
            row.drop(self.seq_len)

    def state(self) -> dict[str, Any]:
        """How many documents were dealt, and what is unread of them."""
        pending = [row.state() for row in self._pending]
        return {**self.identity, "epoch": self.epoch, "consumed": self.consumed, "pending": pending}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state: the documents that were dealt are read past."""
        self.check(state)
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self._pending = [Pending.restored(row) for row in state["pending"]]
        self._dealt = self._deal()

    def _fill(self, size: int) -> None:
        """Deal documents until every row has so many tokens."""
        while (shortest := min(self._pending, key=len)).size < size:
            number, document = next(self._dealt)
            (
                shortest
                if self.document_assignment == "least-loaded"
                else self._pending[number % len(self._pending)]
            ).add(document)

    def _deal(self) -> Iterator[tuple[int, np.ndarray]]:
        """Documents as ids under their numbers in the epoch, from the first that was not dealt yet,
        without end.
        """
        while True:
            before, fed = self.consumed, set[int]()
            for batch in groups(islice(self.source.documents("train"), before, None), READ_AHEAD):
                for document, ids in zip(
                    batch, self.tokenizer.encode([document.text for document in batch]), strict=True
                ):
                    self.consumed += 1
                    if document.text:
                        fed.add((self.consumed - 1) % len(self._pending))
                        yield (
                            self.consumed - 1,
                            np.array([self.tokenizer.bos_id, *ids], dtype=np.int64),
                        )
            if before == 0 and not fed:
                raise DataError(nothing(self.source, "train", self.consumed))
            if (
                before == 0
                and self.document_assignment == "round-robin"
                and len(fed) < len(self._pending)
            ):
                raise DataError(
                    f"the {self.consumed} documents of data source {self.source.name!r}, dealt in"
                    f" turn, leave some of {len(self._pending)} rows without text: take fewer"
                    " train.batch_size, more text, or train.document_assignment = 'least-loaded'"
                )
            self.epoch, self.consumed = self.epoch + 1, 0


class Pending:
    """One row's unread tokens, document by document."""

    def __init__(self) -> None:
        self.begun = 0  # tokens of the first document that were read
        self.documents: list[np.ndarray] = []  # what is unread of each
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def add(self, document: np.ndarray) -> None:
        """Append a document."""
        self.documents.append(document)
        self.size += len(document)

    def read(self, skipped: int, count: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The inputs, labels and document starts, [count] each, after some that are skipped;
        nothing is dropped.
        """
        inputs = np.concatenate(self.documents)
        lengths = np.array([len(document) for document in self.documents])
        bounds = np.cumsum(lengths)
        labels = np.roll(inputs, -1)
        labels[bounds - 1] = end
        first_visible = bounds - lengths
        first_visible[0] = -self.begun
        read = slice(skipped, skipped + count)
        return inputs[read], labels[read], np.repeat(first_visible, lengths)[read] - skipped

    def drop(self, count: int) -> None:
        """Forget the next tokens."""
        self.size -= count
        while self.documents and count >= len(self.documents[0]):
            count -= len(self.documents.pop(0))
            self.begun = 0
        if count:
            self.documents[0] = self.documents[0][count:]
            self.begun += count

    def state(self) -> dict[str, Any]:
        """The unread tokens, for JSON."""
        unread = np.concatenate([*self.documents, np.empty(0, dtype=np.int64)]).astype("<i4")
        lengths = [len(document) for document in self.documents]
        return {
            "begun": self.begun,
            "lengths": lengths,
            "tokens": b64encode(unread.tobytes()).decode(),
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Pending:
        """The row that ``state`` was taken of."""
        row = cls()
        unread = np.frombuffer(b64decode(state["tokens"]), dtype="<i4").astype(np.int64)
        for document in np.split(unread, np.cumsum(state["lengths"])[:-1]):
            if len(document):
                row.add(document)
        row.begun = state["begun"]
        return row
