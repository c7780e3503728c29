"""The tasks, as data sources."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge

from lswt_core.interfaces import DataSource, Document
from lswt_core.plugin_api.seeding import derive_seed

FILLER, CUE = 0, 1  # ids: of what says nothing, and of the beginning of a question
FIRST = 2  # the first id that is drawn
Segment = Annotated[int, Ge(4)]
Vocabulary = Annotated[int, Ge(4)]
Distances = Sequence[Annotated[int, Ge(1)]]
Rounds = Annotated[int, Ge(1)]
Documents = Annotated[int, Ge(1)]


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
    is one of ``distances``, and its id begins with it; what is between fact and question is one id.

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
        segment: Segment = 64,
        vocabulary: Vocabulary = 64,
        distances: Distances = (1,),
        rounds: Rounds = 8,
        documents: Documents = 1_000_000,
        held_out: Documents = 256,
        seed: int = 0,
    ) -> None:
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


class AssociativeRecall(RecallTask):
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): ``pairs`` of a key and
    a value, all keys different; then every key again, in another order, each with its value, which
    is scored.
    """

    name = "associative-recall"
    citation = """@article{arora2023zoology,
  title={Zoology: Measuring and Improving Recall in Efficient Language Models},
  author={Arora, Simran and Eyuboglu, Sabri and Timalsina, Aman and others},
  journal={arXiv preprint arXiv:2312.04927}, year={2023}}"""

    def __init__(
        self,
        *,
        pairs: Annotated[int, Ge(1)] = 8,
        segment: Segment = 64,
        vocabulary: Vocabulary = 64,
        distances: Distances = (1,),
        rounds: Rounds = 8,
        documents: Documents = 1_000_000,
        held_out: Documents = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(
            segment=segment,
            vocabulary=vocabulary,
            distances=distances,
            rounds=rounds,
            documents=documents,
            held_out=held_out,
            seed=seed,
        )
        self.pairs = pairs
        self.require_room(2 * pairs, 2 * pairs + 1, 2 * pairs)
        self.middle = (FIRST + self.vocabulary) // 2  # keys are below it, values from it on

    def draw(self, draw: Draw) -> tuple[list[Token], list[Token]]:
        """Pairs, and the same pairs in another order."""
        keys = draw.different(FIRST, self.middle, self.pairs)
        values = draw.integers(self.middle, self.vocabulary, self.pairs)
        facts = [Token(id_) for pair in zip(keys, values, strict=True) for id_ in pair]
        questions = [Token(CUE)]
        for i in draw.order(self.pairs):
            questions += [Token(keys[i]), Token(values[i], is_scored=True)]
        return facts, questions


class Copy(RecallTask):
    """``tokens`` random ids, and the same ids again, all of them scored."""

    name = "copy"

    def __init__(
        self,
        *,
        tokens: Annotated[int, Ge(1)] = 32,
        segment: Segment = 64,
        vocabulary: Vocabulary = 64,
        distances: Distances = (1,),
        rounds: Rounds = 8,
        documents: Documents = 1_000_000,
        held_out: Documents = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(
            segment=segment,
            vocabulary=vocabulary,
            distances=distances,
            rounds=rounds,
            documents=documents,
            held_out=held_out,
            seed=seed,
        )
        self.tokens = tokens
        self.require_room(tokens, tokens + 1, 1)

    def draw(self, draw: Draw) -> tuple[list[Token], list[Token]]:
        """The ids, once and again."""
        ids = draw.integers(FIRST, self.vocabulary, self.tokens)
        return [Token(id_) for id_ in ids], [Token(CUE), *(Token(id_, True) for id_ in ids)]


class Induction(RecallTask):
    """``tokens`` different ids in a random order; then some of them, each followed by the one that
    followed it, which is scored (induction heads: Olsson et al. 2022, arXiv 2209.11895).
    """

    name = "induction"
    citation = """@article{olsson2022context,
  title={In-context Learning and Induction Heads},
  author={Olsson, Catherine and Elhage, Nelson and Nanda, Neel and others},
  journal={arXiv preprint arXiv:2209.11895}, year={2022}}"""

    def __init__(
        self,
        *,
        tokens: Annotated[int, Ge(2)] = 24,
        questions: Annotated[int, Ge(1)] = 8,
        segment: Segment = 64,
        vocabulary: Vocabulary = 64,
        distances: Distances = (1,),
        rounds: Rounds = 8,
        documents: Documents = 1_000_000,
        held_out: Documents = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(
            segment=segment,
            vocabulary=vocabulary,
            distances=distances,
            rounds=rounds,
            documents=documents,
            held_out=held_out,
            seed=seed,
        )
        self.tokens, self.questions = tokens, questions
        self.require_room(tokens, 2 * questions + 1, tokens)
        if questions >= tokens:
            raise ValueError(f"questions = {questions}: there are {tokens - 1} different ones")

    def draw(self, draw: Draw) -> tuple[list[Token], list[Token]]:
        """The ids, and pairs of neighbours."""
        ids = draw.different(FIRST, self.vocabulary, self.tokens)
        questions = [Token(CUE)]
        for i in draw.order(self.tokens - 1)[: self.questions]:
            questions += [Token(ids[i]), Token(ids[i + 1], is_scored=True)]
        return [Token(id_) for id_ in ids], questions


class Phonebook(RecallTask):
    """``entries`` of a name of ``name_length`` ids and a number of ``digits`` ids; then names of
    ``questions`` entries, each with its number, which is scored (Jelassi et al. 2024, arXiv
    2402.01032).
    """

    name = "phonebook"
    citation = """@article{jelassi2024repeat,
  title={Repeat After Me: Transformers are Better than State Space Models at Copying},
  author={Jelassi, Samy and Brandfonbrener, David and Kakade, Sham M and Malach, Eran},
  journal={arXiv preprint arXiv:2402.01032}, year={2024}}"""

    def __init__(
        self,
        *,
        entries: Annotated[int, Ge(1)] = 4,
        questions: Annotated[int, Ge(1)] = 2,
        name_length: Annotated[int, Ge(1)] = 3,
        digits: Annotated[int, Ge(1)] = 5,
        segment: Segment = 64,
        vocabulary: Vocabulary = 64,
        distances: Distances = (1,),
        rounds: Rounds = 8,
        documents: Documents = 1_000_000,
        held_out: Documents = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(
            segment=segment,
            vocabulary=vocabulary,
            distances=distances,
            rounds=rounds,
            documents=documents,
            held_out=held_out,
            seed=seed,
        )
        self.entries, self.questions = entries, questions
        self.name_length, self.digits = name_length, digits
        size = name_length + digits
        self.require_room(entries * size, questions * size + 1, 2 * entries)
        if questions > entries:
            raise ValueError(f"questions = {questions}: there are {entries} entries")
        self.middle = (FIRST + self.vocabulary) // 2  # names are below it, digits from it on

    def draw(self, draw: Draw) -> tuple[list[Token], list[Token]]:
        """All entries, and some of them again."""
        book = []
        for first in draw.different(FIRST, self.middle, self.entries):
            rest = draw.integers(FIRST, self.middle, self.name_length - 1)
            number = draw.integers(self.middle, self.vocabulary, self.digits)
            book.append(([first, *rest], number))
        facts = [Token(id_) for name, number in book for id_ in (*name, *number)]
        questions = [Token(CUE)]
        for i in draw.order(self.entries)[: self.questions]:
            name, number = book[i]
            questions += [*map(Token, name), *(Token(id_, True) for id_ in number)]
        return facts, questions
