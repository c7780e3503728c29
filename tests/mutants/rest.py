"""A source of text, tokenizers and a tracker, each wrong in one way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lswt_core.interfaces import DataSource, Document, RunInfo, Tokenizer, Tracker
from mutants.meant import meant


@meant("repeatable")
class Once(DataSource):
    """Can be read once."""

    name = "once"

    def __init__(self) -> None:
        self.left = {split: iter([Document(split, "text")]) for split in ("train", "valid")}

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        yield from self.left[split]

    def fingerprint(self) -> str:
        return "once"


@meant("round trip")
class Lossy(Tokenizer):
    """Knows no capital letters."""

    name = "lossy"
    size, begin, end = 258, 256, 257

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.lower().encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        return "lossy"


@meant("pieces")
class Marked(Tokenizer):
    """Marks the beginning of what it is given, also of what is the middle of a text."""

    name = "marked"
    size, begin, end = 259, 256, 257

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[258, *text.encode()] for text in texts]

    def split_long_text(self, text: str) -> Iterator[str]:
        return (text[positions : positions + 1000] for positions in range(0, len(text), 1000))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        return "marked"


@meant("records")
class Fussy(Tracker):
    """Cannot take what is not finite."""

    name = "fussy"

    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)

    def log(self, metrics: Any, step: int) -> None:
        for value in metrics.values():
            int(value)
