"""The tokens of one streamed row that were assigned and not yet read."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any

import numpy as np

from lswt_core.data.scored import as_labels, plain_ids
from lswt_core.interfaces import IGNORE


class TokenQueue:
    """One row's unread tokens, document by document."""

    def __init__(self) -> None:
        self.begun = 0  # tokens of the first document that were already read
        self.documents: list[np.ndarray] = []  # unread tokens of each, as they are stored, int64
        self.scores_end: list[bool] = []  # whether the end of each is predicted
        self.n_tokens = 0

    def add(self, document: np.ndarray) -> None:
        """Append a document's tokens, BOS first."""
        self.append(document, bool(document[0] >= 0))

    def append(self, document: np.ndarray, scores_end: bool) -> None:
        """Append tokens, with which a document ends that was begun before, or a whole one."""
        self.documents.append(document)
        self.scores_end.append(scores_end)
        self.n_tokens += len(document)

    def read(
        self, start: int, count: int, eos_id: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, labels and first_visible of tokens ``start`` to ``start + count``, [count] each;
        first_visible counts from ``start``. Nothing is dropped.
        """
        stored = np.concatenate(self.documents)
        lengths = np.array([len(document) for document in self.documents])
        ends = np.cumsum(lengths)
        labels = as_labels(np.roll(stored, -1))
        labels[ends - 1] = np.where(self.scores_end, eos_id, IGNORE)
        document_starts = ends - lengths
        document_starts[0] = -self.begun
        first_visible = np.repeat(document_starts, lengths)
        chosen = slice(start, start + count)
        return plain_ids(stored[chosen]), labels[chosen], first_visible[chosen] - start

    def drop(self, count: int) -> None:
        """Remove the next tokens."""
        self.n_tokens -= count
        while self.documents and count >= len(self.documents[0]):
            count -= len(self.documents.pop(0))
            self.scores_end.pop(0)
            self.begun = 0
        if count:
            self.documents[0] = self.documents[0][count:]
            self.begun += count

    def state(self) -> dict[str, Any]:
        """The unread tokens, as JSON data."""
        unread = np.concatenate([*self.documents, np.empty(0, dtype=np.int64)]).astype("<i4")
        return {
            "begun": self.begun,
            "lengths": [len(document) for document in self.documents],
            "unscored_ends": [i for i, scored in enumerate(self.scores_end) if not scored],
            "tokens": b64encode(unread.tobytes()).decode(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TokenQueue:
        """The queue of a ``state()``."""
        queue = cls()
        unread = np.frombuffer(b64decode(state["tokens"]), dtype="<i4").astype(np.int64)
        unscored = state.get("unscored_ends", ())
        for number, document in enumerate(np.split(unread, np.cumsum(state["lengths"])[:-1])):
            if len(document):
                queue.append(document, number not in unscored)
        queue.begun = state["begun"]
        return queue
