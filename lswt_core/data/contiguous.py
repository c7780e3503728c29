"""A finite corpus as contiguous token streams, one a row of the global batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lswt_core.data.rows import RowLayout
from lswt_core.data.scored import as_labels, end_labels, plain_ids
from lswt_core.data.token_file import Tokens
from lswt_core.errors import DataError
from lswt_core.interfaces import Batch
from lswt_core.plugin_api.seeding import derive_seed


class EpochOrder(NamedTuple):
    """The documents of an epoch, laid end to end."""

    documents: np.ndarray  # [documents] indices into the corpus, in the epoch's order
    bounds: np.ndarray  # [documents + 1] where each begins in the epoch's token stream


class ContiguousRows(RowLayout):
    """Rows that read a finite corpus, epoch after epoch (implements ``data.Rows``).

    Every epoch shuffles the documents, lays them end to end and cuts the result into
    ``global_batch_size`` contiguous streams of ``length`` tokens; the remainder, less than a token
    a row, is left out. Row r reads stream r of every epoch in turn. A segment is a pure function of
    corpus, seed, row and cursor.
    """

    def __init__(
        self,
        tokens: Tokens,
        eos_id: int,
        *,
        global_batch_size: int,
        rows: range,
        seq_len: int,
        seed: int,
        document_masking: bool = False,
        lookahead: int = 0,
        shuffle: bool = True,
        whole_documents: bool = False,
    ) -> None:
        """``whole_documents``: rows begin at documents, all of which have one length. Raises
        DataError if the corpus has less than one segment a row.
        """
        super().__init__(
            tokens.fingerprint,
            global_batch_size=global_batch_size,
            rows=rows,
            seq_len=seq_len,
            seed=seed,
            document_masking=document_masking,
            lookahead=lookahead,
        )
        self.identity["shuffle"] = shuffle
        self.tokens, self.eos_id, self.shuffle, self.seed = tokens, eos_id, shuffle, seed
        self.length = len(tokens.ids) // global_batch_size  # tokens a row reads in an epoch
        self.cursor = 0  # tokens every row has read
        self._sizes = np.diff(tokens.document_starts, append=len(tokens.ids))  # [documents]
        if whole_documents:
            self.length -= self.length % require_one_length(self._sizes)
        self._orders: dict[int, EpochOrder] = {}  # of the current epoch and the next
        if self.length < seq_len:
            raise DataError(
                f"the text has {len(tokens.ids)} tokens, {global_batch_size} rows of {seq_len}"
                f" tokens need {global_batch_size * seq_len}: use a smaller batch size, a shorter"
                " sequence length or more text"
            )

    def segment(self, ahead: int = 0) -> Batch:
        """The next segment of every row; it may begin in one epoch and end in the next."""
        cursor = self.cursor + ahead * self.seq_len
        reach = cursor + np.arange(self.seq_len + self.lookahead)
        epochs, offsets = np.divmod(reach, self.length)
        parts = []
        for epoch in np.unique(epochs):
            parts.append(self._read(int(epoch), offsets[epochs == epoch], cursor))
        inputs, labels, first_visible = (
            np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)
        )
        return self.batch(inputs, labels, first_visible)

    def advance(self) -> None:
        """Move on to the next segment."""
        self.cursor += self.seq_len

    def state(self) -> dict[str, Any]:
        """The cursor and what it refers to."""
        return {**self.identity, "cursor": self.cursor}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved cursor."""
        self.check(state)
        self.cursor = state["cursor"]

    def _read(
        self, epoch: int, offsets: np.ndarray, cursor: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, labels and first_visible, [B, t] each, at ``offsets`` [t] into the rows' streams
        of an epoch. first_visible counts from the segment at ``cursor``.
        """
        ids, order = self.tokens.ids, self._order(epoch)
        stream_starts = np.asarray(self.rows, dtype=np.int64)[:, None] * self.length  # [B, 1]
        positions = stream_starts + offsets  # [B, t] in the epoch's token stream
        document = np.searchsorted(order.bounds, positions, side="right") - 1  # [B, t] in order
        begin, end = order.bounds[document], order.bounds[document + 1]
        # [B, t] in the corpus
        index = self.tokens.document_starts[order.documents[document]] + positions - begin
        labels = as_labels(ids[np.minimum(index + 1, len(ids) - 1)])
        at_end, starts = positions + 1 == end, self.tokens.document_starts[order.documents]
        labels[at_end] = end_labels(ids[starts[document[at_end]]], self.eos_id)
        first_visible = np.maximum(begin - stream_starts, 0) + epoch * self.length - cursor
        return plain_ids(ids[index]), labels, first_visible

    def _order(self, epoch: int) -> EpochOrder:
        """The document order of an epoch; the last two are cached."""
        if epoch not in self._orders:
            documents = np.arange(len(self._sizes))
            if self.shuffle:
                # sorted raw numbers, because Generator.permutation may change with numpy's version
                generator = np.random.PCG64(derive_seed(self.seed, "documents", epoch))
                documents = np.argsort(generator.random_raw(len(documents)), kind="stable")
            bounds = np.concatenate(([0], np.cumsum(self._sizes[documents])))
            for cached in [*self._orders]:
                if cached != epoch - 1:
                    del self._orders[cached]
            self._orders[epoch] = EpochOrder(documents, bounds)
        return self._orders[epoch]


def require_one_length(sizes: np.ndarray) -> int:
    """Return the length of all documents; raises DataError if there are several."""
    lengths = np.unique(sizes)
    if len(lengths) > 1:
        raise DataError(
            f"documents have {lengths[0]} to {lengths[-1]} tokens, but their source has a"
            " segment_length, and so all must have the same whole number of segments"
        )
    return int(lengths[0])
