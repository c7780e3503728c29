"""The data loader: batches of token segments for a trainer, and the position to resume at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from lswt_core.errors import DataError
from lswt_core.interfaces import IGNORE, Batch


class BatchStream(Protocol):
    """A stream of batches, in which every row reads on where its last segment ended."""

    def segment(self, ahead: int = 0) -> Batch:
        """The next segment of every row, [B, T], or the one after ``ahead`` more. Repeated calls
        return the same tokens until ``advance``.
        """

    def advance(self) -> None:
        """Move on to the next segment."""


class Rows(BatchStream, Protocol):
    """A batch stream over some rows of the global batch, with a position that can be saved."""

    def state(self) -> dict[str, Any]:
        """The position in the data, as JSON data, which the first rank saves. The same for every
        choice of rows, so that a run can be resumed with another world size.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a position. Raises DataError if it belongs to other data, batch size,
        sequence length or seed.
        """

    def close(self) -> None:
        """Release files and threads."""


class RowLayout:
    """The rows of the global batch that a data-parallel rank reads, and what identifies them in a
    saved position.
    """

    def __init__(
        self,
        fingerprint: str,
        *,
        global_batch_size: int,
        rows: range,
        seq_len: int,
        seed: int,
        document_masking: bool,
        lookahead: int = 0,
    ) -> None:
        """``lookahead``: labels beyond a segment that batches hold (Batch.labels_ahead). What is
        consumed does not depend on it.
        """
        assert all(0 <= row < global_batch_size for row in rows), (
            f"{rows} are not among {global_batch_size} rows"
        )
        self.rows, self.seq_len, self.document_masking = rows, seq_len, document_masking
        self.lookahead = lookahead
        self.identity: dict[str, Any] = {
            "fingerprint": fingerprint,
            "global_batch_size": global_batch_size,
            "seq_len": seq_len,
            "seed": seed,
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise DataError, naming every difference, if a saved position belongs to other rows."""
        changed = [key for key, value in self.identity.items() if state.get(key) != value]
        if not changed:
            return
        listed = "; ".join(
            f"{key} was {state.get(key)!r} and is {self.identity[key]!r}" for key in changed
        )
        why = "the rows would read other tokens"
        if "fingerprint" in changed:
            why = "the text, its tokenizer or its split changed"
        raise DataError(
            f"the saved position in the data does not fit ({listed}): {why}; undo the change or"
            " start a new run"
        )

    def batch(self, inputs: np.ndarray, labels: np.ndarray, first_visible: np.ndarray) -> Batch:
        """A batch of int64 arrays [B, T + lookahead]; ``first_visible`` only with document
        masking, where labels of documents that begin after the segment are IGNORE.
        """
        size = self.seq_len
        own = [np.ascontiguousarray(x[:, :size]) for x in (inputs, labels, first_visible)]
        batch = Batch(torch.from_numpy(own[0]), torch.from_numpy(own[1]))
        ahead = labels[:, size:]
        if self.document_masking:
            batch = batch._replace(first_visible=torch.from_numpy(own[2]))
            ahead = np.where(first_visible[:, size:] < size, ahead, IGNORE)
        if self.lookahead:
            batch = batch._replace(labels_ahead=torch.from_numpy(np.ascontiguousarray(ahead)))
        return batch

    def close(self) -> None:
        """Nothing to release."""
