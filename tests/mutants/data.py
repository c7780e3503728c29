"""A data source, tokenizers and a tracker with one mistake each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lswt_core.interfaces import DataSource, Document, RunInfo, Tokenizer, Tracker
from mutants.expected import caught_by


@caught_by("repeatable")
class ReadOnce(DataSource):
    """Its documents can be read once."""

    name = "read-once"

    def __init__(self) -> None:
        self.iterators = {split: iter([Document(split, "text")]) for split in ("train", "valid")}

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        yield from self.iterators[split]

    def fingerprint(self) -> str:
        return "read-once"


@caught_by("scored ranges")
class BackwardRanges(DataSource):
    """Its ranges of scored characters are not in order."""

    name = "backward-ranges"
    selects_scored = True

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        yield Document(split, "some text", ((5, 9), (0, 4)))

    def fingerprint(self) -> str:
        return self.name


@caught_by("scored ranges")
class SilentRanges(BackwardRanges):
    """It does not say that only some of its tokens are predicted."""

    name = "silent-ranges"
    selects_scored = False

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        yield Document(split, "some text", ((0, 4),))


@caught_by("round trip")
class Lowercasing(Tokenizer):
    """Encodes capital letters as small ones."""

    name = "lowercasing"
    vocab_size, bos_id, eos_id = 258, 256, 257

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.lower().encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        return "lowercasing"


@caught_by("long texts")
class MarksPieces(Tokenizer):
    """Adds a token at the start of every piece of a long text."""

    name = "marks-pieces"
    vocab_size, bos_id, eos_id = 259, 256, 257

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[258, *text.encode()] for text in texts]

    def split_long_text(self, text: str) -> Iterator[str]:
        return (text[start : start + 1000] for start in range(0, len(text), 1000))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        return "marks-pieces"


@caught_by("metrics")
class FiniteOnly(Tracker):
    """Fails on numbers that are not finite."""

    name = "finite-only"

    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)

    def log(self, metrics: Any, step: int) -> None:
        for value in metrics.values():
            int(value)


class TwoDocuments(DataSource):
    """A correct source, the base of mutants."""

    def __init__(self, *, prefix: str = "text") -> None:
        self.prefix = prefix

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        for word in self.words():
            yield Document(f"{split} {word}", f"{self.prefix} {word} {split}")

    def words(self) -> list[str]:
        return [f"word {i}" for i in range(20)]

    def fingerprint(self) -> str:
        return self.prefix


@caught_by("states")
class OneBehind(TwoDocuments, DataSource):
    """Goes on with the document that its state was taken at."""

    name = "one-behind"

    def documents(self, split: Literal["train", "valid"], after: Any = None) -> Iterator[Document]:
        for self.number, document in enumerate(super().documents(split)):
            if after is None or self.number >= after["number"]:
                yield document

    def state(self) -> dict[str, Any]:
        return {"number": self.number}


@caught_by("states")
class LiveState(OneBehind, DataSource):
    """Hands out a state that it goes on changing."""

    name = "live-state"

    def documents(self, split: Literal["train", "valid"], after: Any = None) -> Iterator[Document]:
        self.place = {"number": -1 if after is None else after["number"]}
        for number, document in enumerate(TwoDocuments.documents(self, split)):
            if number > self.place["number"]:
                self.place["number"] = number
                yield document

    def state(self) -> dict[str, Any]:
        return self.place


@caught_by("order")
class SetOrder(TwoDocuments, DataSource):
    """Its documents come in the order of a set."""

    name = "set-order"

    def words(self) -> list[str]:
        return list(set(super().words()))


@caught_by("fingerprint")
class ConstantFingerprint(TwoDocuments, DataSource):
    """Its fingerprint does not follow its documents."""

    name = "constant-fingerprint"

    def fingerprint(self) -> str:
        return "constant"


class Bytes(Tokenizer):
    """A correct tokenizer, the base of mutants."""

    vocab_size, bos_id, eos_id = 258, 256, 257

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        return "bytes"


@caught_by("special tokens")
class EndsAtNewline(Bytes, Tokenizer):
    """Its EOS is the newline."""

    name, eos_id = "ends-at-newline", 10


@caught_by("fingerprint")
class SameForAll(Bytes, Tokenizer):
    """Its fingerprint leaves out an option that changes ids."""

    name = "same-for-all"

    def __init__(self, *, offset: int = 0) -> None:
        self.offset = offset

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[(i + self.offset) % 256 for i in ids] for ids in super().encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([(i - self.offset) % 256 for i in ids])
