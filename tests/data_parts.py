"""Texts for the tests of data: a source, and what is to be read of it."""

import json
from collections.abc import Iterator

from lswt_core.interfaces import DataSource, Document

BEGIN, END = 256, 257  # of the byte tokenizer
TEXTS = ["alpha beta", "b", "c" * 37, "delta is a longer one, é included", "epsilon", "f" * 5]


class Given(DataSource):
    """Texts written down in the test."""

    name = "given"

    def __init__(self, texts: list[str], held: list[str] | None = None) -> None:
        self.texts = {"train": texts, "valid": held or []}
        self.reads = 0

    def documents(self, split: str) -> Iterator[Document]:
        self.reads += 1
        yield from (
            Document(f"{split}/{number}", text) for number, text in enumerate(self.texts[split])
        )

    def fingerprint(self) -> str:
        return json.dumps(self.texts)


def laid(texts: list[str]) -> list[tuple[int, int, int]]:
    """Texts end to end, token by token: input, label, place where its document begins."""
    tokens: list[tuple[int, int, int]] = []
    for text in texts:
        begin, ids = len(tokens), list(text.encode())
        tokens += [
            (value, following, begin)
            for value, following in zip([BEGIN, *ids], [*ids, END], strict=True)
        ]
    return tokens
