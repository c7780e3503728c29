"""Text as its UTF-8 bytes."""

from __future__ import annotations

from collections.abc import Sequence

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Tokenizer


class Bytes(Tokenizer):
    """One id a byte, and two more that begin and end a document. Needs no file and fits every text."""

    name = "bytes"

    def __init__(self) -> None:
        pass

    @property
    def size(self) -> int:
        """258."""
        return 258

    @property
    def begin(self) -> int:
        """256."""
        return 256

    @property
    def end(self) -> int:
        """257."""
        return 257

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes of each text."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some bytes; what is no UTF-8, as a model may write it, becomes U+FFFD."""
        return bytes(value for value in ids if value < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        """There is only one such mapping."""
        return "bytes"


@hookimpl
def lswt_components() -> list[type]:
    """Offer the byte tokenizer."""
    return [Bytes]
