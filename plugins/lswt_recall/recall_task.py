"""What all recall tasks share: documents of facts and questions, segments apart."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lswt_core.interfaces import DataSource, Document
from lswt_core.plugin_api.seeding import derive_seed

FILLER, CUE = 0, 1  # ids: of what says nothing, and of the beginning of a question
FIRST = 2  # the first id that is drawn


class Token(NamedTuple):
    """One token of a document."""

    id: int
    is_scored: bool = False


class Draw:
    """Random numbers of one document. Of raw numbers alone: what numpy's Generator makes of them
    may change with its version.
    """

    def __init__(self, *about: Any) -> None:
        self.raw = np.random.PCG64(derive_seed(*about)).random_raw

    def integers(self, low: int, high: int, size: int) -> list[int]:
        """Numbers from ``low`` up to ``high``, exclusively."""
        return [int(low + number) for number in self.raw(size) % np.uint64(high - low)]

    def order(self, size: int) -> list[int]:
        """The numbers below ``size`` in a random order."""
        return [int(i) for i in np.argsort(self.raw(size), kind="stable")]

    def different(self, low: int, high: int, size: int) -> list[int]:
        """Different numbers from ``low`` up to ``high``, exclusively."""
        return [low + i for i in self.order(high - low)[:size]]


class RecallTask(DataSource):
    """Documents of ``rounds``: a segment states facts, and the last segment of the round, a
    ``distance`` of segments later, asks about them. Only answers are scored. A document's distance
    is one of ``distances`` (default: 1), and its id begins with it; what is between fact and
    question is one id.

    ``segment`` must be train.seq_len, so that a question is never in the segment of its facts. An
    epoch has ``documents``, the validation set ``held_out`` others. Those of training begin with
    some segments that say nothing, so that not all rows are asked at the same step. Read with the
    tokenizer ``integers``, whose ``size`` is at least ``vocabulary``.
    """

    streaming = True
    selects_scored = True

    def __init__(
        self,
        *,
        segment: int,
        vocabulary: int,
        distances: Sequence[int] | None,
        rounds: int,
        documents: int,
        held_out: int,
        seed: int,
    ) -> None:
        distances = [1] if distances is None else distances
        if not distances:
            raise ValueError("distances is empty: give the segments between fact and question")
        self.segment = self.segment_length = segment
        self.vocabulary, self.distances = vocabulary, sorted(set(distances))
        self.rounds = rounds
        self.sizes = {"train": documents, "valid": held_out}
        self.seed, self.next = seed, 0

    @abstractmethod
    def draw(self, draw: Draw) -> tuple[list[Token], list[Token]]:
        """Facts and questions."""

    def documents(
        self, split: Literal["train", "valid"], after: Mapping[str, Any] | None = None
    ) -> Iterator[Document]:
        """The documents of a split, after a ``state()``."""
        for number in range(0 if after is None else after["next"], self.sizes[split]):
            self.next = number + 1
            yield self.document(split, number)

    def state(self) -> dict[str, Any]:
        """The number of the next document."""
        return {"next": self.next}

    def document(self, split: str, number: int) -> Document:
        """One document, whose content depends on the options, the split and its number alone."""
        draw = Draw(self.seed, split, number)
        distance = self.distances[draw.integers(0, len(self.distances), 1)[0]]
        size = (self.distances[-1] + 1) * self.segment  # of a round
        quiet = draw.integers(0, self.distances[-1] + 1, 1)[0] * self.segment
        tokens = [Token(FILLER)] * (quiet if split == "train" else 0)
        for _ in range(self.rounds):
            facts, questions = self.draw(draw)
            round_ = [Token(FILLER)] * size
            asked = size - self.segment
            put(round_, asked - distance * self.segment + 1, facts)
            put(round_, asked, questions)
            tokens += round_
        return as_document(f"distance {distance}/{split}/{number}", tokens[1:])  # one is BOS

    def fingerprint(self) -> str:
        """The task and its options."""
        options = {key: value for key, value in vars(self).items() if key != "next"}
        return f"{self.name} {json.dumps(options, sort_keys=True)}"

    def require_room(self, facts: int, questions: int, ids: int) -> None:
        """Raise ValueError unless a segment and the vocabulary are large enough."""
        if max(1 + facts, questions) > self.segment:
            raise ValueError(f"segment = {self.segment}: it takes {max(1 + facts, questions)}")
        if ids > self.vocabulary - FIRST:
            raise ValueError(f"vocabulary = {self.vocabulary}: this task takes {ids + FIRST} ids")


def put(tokens: list[Token], at: int, others: Sequence[Token]) -> None:
    """Replace tokens from a place on."""
    tokens[at : at + len(others)] = others


def as_document(name: str, tokens: Sequence[Token]) -> Document:
    """Tokens as text, and the ranges of characters that are scored."""
    words, scored, at = [], list[tuple[int, int]](), 0
    for token in tokens:
        word = f"{token.id} "
        if token.is_scored:
            scored.append((at, at + len(word)))
        words.append(word)
        at += len(word)
    return Document(name, "".join(words), tuple(scored))
