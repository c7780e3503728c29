"""A small data source, for components that hold one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from lswt_core.interfaces import DataSource, Document

SIZES = {"train": 60, "valid": 20}  # documents


class ReferenceText(DataSource):
    """Made-up documents of 1 to 17 words."""

    name = "reference-text"

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """The documents of a split."""
        for number in range(SIZES[split]):
            yield Document(f"{split}-{number}", f"{split} {number}" + " word" * (7 * number % 17))

    def fingerprint(self) -> str:
        """A constant: so is the text."""
        return self.name
