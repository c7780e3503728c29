"""Text as its UTF-8 bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Tokenizer
from lswt_core.plugin_api.tokenizers import CHUNK_CHARACTERS, save_fast_tokenizer


class Bytes(Tokenizer):
    """One id a byte, and two more that begin and end a document. Needs no file and fits every text."""

    name = "bytes"

    def __init__(self) -> None:
        pass

    @property
    def vocab_size(self) -> int:
        """258."""
        return 258

    @property
    def bos_id(self) -> int:
        """256."""
        return 256

    @property
    def eos_id(self) -> int:
        """257."""
        return 257

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes of each text."""
        return [list(text.encode()) for text in texts]

    def split_long_text(self, text: str) -> Iterator[str]:
        """It can be cut anywhere."""
        return (
            text[begin : begin + CHUNK_CHARACTERS]
            for begin in range(0, max(1, len(text)), CHUNK_CHARACTERS)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some bytes; what is no UTF-8, as a model may write it, becomes U+FFFD."""
        return bytes(value for value in ids if value < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        """There is only one such mapping."""
        return "bytes"

    def save(self, directory: Path) -> None:
        """As byte-level BPE without merges."""
        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        mapping = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        mapping.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        mapping.decoder = decoders.ByteLevel()
        mapping.add_special_tokens(["<|begin|>", "<|end|>"])
        save_fast_tokenizer(mapping, self.bos_id, self.eos_id, directory)


def byte_characters() -> list[str]:
    """The characters that stand for bytes in byte-level BPE: Latin-1's visible ones for themselves,
    the others from U+0100 on.
    """
    visible = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


@hookimpl
def lswt_components() -> list[type]:
    """Offer the byte tokenizer."""
    return [Bytes]
