"""The tasks, as data sources."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from lswt_core.interfaces import DataSource
from lswt_recall.recall_task import CUE, FIRST, Draw, RecallTask, Token

Segment = Annotated[int, Ge(4)]
Vocabulary = Annotated[int, Ge(4)]
Distances = list[Annotated[int, Ge(1)]]
Rounds = Annotated[int, Ge(1)]
Documents = Annotated[int, Ge(1)]


class AssociativeRecall(RecallTask, DataSource):
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
        distances: Distances | None = None,
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


class Copy(RecallTask, DataSource):
    """``tokens`` random ids, and the same ids again, all of them scored."""

    name = "copy"

    def __init__(
        self,
        *,
        tokens: Annotated[int, Ge(1)] = 32,
        segment: Segment = 64,
        vocabulary: Vocabulary = 64,
        distances: Distances | None = None,
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


class Induction(RecallTask, DataSource):
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
        distances: Distances | None = None,
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


class Phonebook(RecallTask, DataSource):
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
        distances: Distances | None = None,
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
