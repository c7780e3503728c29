"""The tokens of one streamed row that were assigned and not yet read."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any

import numpy as np


class TokenQueue:
    """One row's unread tokens, document by document."""

    def __init__(self) -> None:
        self.begun = 0  # tokens of the first document that were already read
        self.documents: list[np.ndarray] = []  # unread tokens of each, int64
        self.n_tokens = 0

    def add(self, document: np.ndarray) -> None:
        """Append a document's tokens."""
        self.documents.append(document)
        self.n_tokens += len(document)

    def read(
        self, start: int, count: int, eos_id: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, labels and first_visible of tokens ``start`` to ``start + count``, [count] each;
        first_visible counts from ``start``. Nothing is dropped.
        """
        inputs = np.concatenate(self.documents)
        lengths = np.array([len(document) for document in self.documents])
        ends = np.cumsum(lengths)
        labels = np.roll(inputs, -1)
        labels[ends - 1] = eos_id
        document_starts = ends - lengths
        document_starts[0] = -self.begun
        first_visible = np.repeat(document_starts, lengths)
        chosen = slice(start, start + count)
        return inputs[chosen], labels[chosen], first_visible[chosen] - start

    def drop(self, count: int) -> None:
        """Remove the next tokens."""
        self.n_tokens -= count
        while self.documents and count >= len(self.documents[0]):
            count -= len(self.documents.pop(0))
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
            "tokens": b64encode(unread.tobytes()).decode(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TokenQueue:
        """The queue of a ``state()``."""
        queue = cls()
        unread = np.frombuffer(b64decode(state["tokens"]), dtype="<i4").astype(np.int64)
        for document in np.split(unread, np.cumsum(state["lengths"])[:-1]):
            if len(document):
                queue.add(document)
        queue.begun = state["begun"]
        return queue
