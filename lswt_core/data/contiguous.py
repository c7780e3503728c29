"""Rows of continuous tokens: what each row of the global batch reads next, as a function of a
cursor that can be saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from lswt_core.data.token_cache import Tokens
from lswt_core.errors import DataError
from lswt_core.interfaces import Batch
from lswt_core.plugin_api.seeding import derive_seed


class Rows(ABC):
    """Segments for some rows of the global batch, every row reading on where it stopped.

    ``segment`` returns the same tokens until ``advance`` commits to them, so a step that fails can
    be taken again; it can look ahead, which commits nothing either. ``rows`` are the rows this
    process reads; the state is the same whichever they are, so a run can go on with another number
    of processes.
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
    ) -> None:
        assert all(0 <= row < global_batch_size for row in rows), (
            f"{rows} are not among {global_batch_size} rows"
        )
        self.rows, self.seq_len, self.document_masking = rows, seq_len, document_masking
        self.identity: dict[str, Any] = {
            "fingerprint": fingerprint,
            "global_batch_size": global_batch_size,
            "seq_len": seq_len,
            "seed": seed,
        }

    @abstractmethod
    def segment(self, ahead: int = 0) -> Batch:
        """The next ``context`` tokens of every row, [B, T], with `starts` under
        ``document_masking``; or those that will be next after so many advances.
        """

    @abstractmethod
    def advance(self) -> None:
        """Commit: move on to the next segment."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where the rows stand, for JSON."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; raise DataError if it is of other data, rows, context or seed."""

    def close(self) -> None:  # noqa: B027  (most have nothing to let go of)
        """Let go of what reading needs; nothing is read any more."""

    def check(self, state: dict[str, Any]) -> None:
        """Raise DataError, naming every difference, if a state does not belong to these rows."""
        differing = {
            key: (state.get(key), value)
            for key, value in self.identity.items()
            if state.get(key) != value
        }
        if not differing:
            return
        listed = "; ".join(
            f"{key} was {before!r} and is {now!r}" for key, (before, now) in differing.items()
        )
        why = (
            "the text, its tokenizer or its split changed"
            if "fingerprint" in differing
            else "the rows would read other tokens"
        )
        raise DataError(
            f"the saved position in the data does not fit ({listed}): {why}; undo the change or"
            " start a new run"
        )

    def batch(self, inputs: np.ndarray, labels: np.ndarray, first_visible: np.ndarray) -> Batch:
        """A batch of int64 arrays [B, T]."""
        parted = torch.from_numpy(first_visible) if self.document_masking else None
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), first_visible=parted)


class ContiguousRows(Rows):
    """A finite corpus, epoch after epoch.

    In every epoch the documents are put in another order, laid end to end, and the one stream is
    cut into ``global_batch_size`` lanes of equal ``length`` (the rest, less than a token a row, is
    left out); row r reads lane r, then lane r of the next epoch. So a segment is a pure function of
    corpus, seed, row and cursor, and one document is enough. ``end`` is the tokenizer's.
    """

    def __init__(
        self,
        tokens: Tokens,
        end: int,
        *,
        global_batch_size: int,
        rows: range,
        seq_len: int,
        seed: int,
        document_masking: bool = False,
        shuffle: bool = True,
    ) -> None:
        super().__init__(
            tokens.fingerprint,
            global_batch_size=global_batch_size,
            rows=rows,
            seq_len=seq_len,
            seed=seed,
            document_masking=document_masking,
        )
        self.identity["shuffle"] = shuffle
        self.tokens, self.end, self.shuffle, self.seed = tokens, end, shuffle, seed
        self.length = len(tokens.ids) // global_batch_size  # tokens a row reads in an epoch
        self.cursor = 0  # tokens every row has read
        self._sizes = np.diff(tokens.document_starts, append=len(tokens.ids))  # [documents]
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of this epoch and the next
        if self.length < seq_len:
            needed = (
                f"{global_batch_size} rows of {seq_len} tokens need {global_batch_size * seq_len}"
            )
            raise DataError(
                f"the text has {len(tokens.ids)} tokens, {needed}: take fewer rows, a shorter"
                " context or more text"
            )

    def segment(self, ahead: int = 0) -> Batch:
        """The next tokens of every row; a segment may begin in one epoch and end in the next."""
        cursor = self.cursor + ahead * self.seq_len
        epochs, offsets = np.divmod(cursor + np.arange(self.seq_len), self.length)
        parts = [
            self._read(int(epoch), offsets[epochs == epoch], cursor) for epoch in np.unique(epochs)
        ]
        inputs, labels, first_visible = (
            np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)
        )
        return self.batch(inputs, labels, first_visible)

    def advance(self) -> None:
        """Commit: move on to the next segment."""
        self.cursor += self.seq_len

    def state(self) -> dict[str, Any]:
        """The cursor, and what it counts in."""
        return {**self.identity, "cursor": self.cursor}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a cursor."""
        self.check(state)
        self.cursor = state["cursor"]

    def _read(
        self, epoch: int, offsets: np.ndarray, cursor: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, labels and document first_visible [B, t], as seen from a cursor, at some offsets
        [t] into the lanes of an epoch.
        """
        ids, (order, bounds) = self.tokens.ids, self._order(epoch)
        lanes = np.asarray(self.rows, dtype=np.int64)[:, None] * self.length  # [B, 1]
        at = lanes + offsets  # [B, t] places in the epoch's stream
        which = np.searchsorted(bounds, at, side="right") - 1
        place = self.tokens.document_starts[order[which]] + at - bounds[which]  # in ids
        following = ids[np.minimum(place + 1, len(ids) - 1)].astype(np.int64)
        labels = np.where(at + 1 == bounds[which + 1], self.end, following)
        first_visible = np.maximum(bounds[which] - lanes, 0) + epoch * self.length - cursor
        return ids[place].astype(np.int64), labels, first_visible

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in their order [documents], and where each begins in it
        [documents + 1].
        """
        if epoch not in self._orders:
            order = np.arange(len(self._sizes))
            if self.shuffle:
                # Sorting raw numbers, unlike Generator.permutation, gives the same order in every
                # release of numpy.
                order = np.argsort(
                    np.random.PCG64(derive_seed(self.seed, "documents", epoch)).random_raw(
                        len(order)
                    ),
                    kind="stable",
                )
            bounds = np.concatenate(([0], np.cumsum(self._sizes[order])))
            kept = {other: value for other, value in self._orders.items() if other == epoch - 1}
            self._orders = {**kept, epoch: (order, bounds)}
        return self._orders[epoch]
