"""Byte-level tokenizer without a vocabulary file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Tokenizer
from lswt_core.plugin_api.tokenizers import CHUNK_CHARACTERS, save_fast_tokenizer


class Bytes(Tokenizer):
    """UTF-8 bytes as ids, BOS and EOS. Needs no file and no training, and encodes every text."""

    name = "bytes"

    def __init__(self) -> None:
        pass

    @property
    def vocab_size(self) -> int:
        """258: 256 bytes, BOS and EOS."""
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
        """Split anywhere."""
        return (
            text[start : start + CHUNK_CHARACTERS]
            for start in range(0, max(1, len(text)), CHUNK_CHARACTERS)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some bytes; invalid UTF-8, which a model may generate, becomes U+FFFD."""
        return bytes(value for value in ids if value < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        """A constant: there is only one such mapping."""
        return "bytes"

    def save(self, directory: Path) -> None:
        """Write the files of a byte-level BPE without merges."""
        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
        save_fast_tokenizer(tokenizer, self.bos_id, self.eos_id, directory)


def byte_characters() -> list[str]:
    """The characters that represent bytes in byte-level BPE: Latin-1's printable ones themselves,
    U+0100 and following for the others.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@hookimpl
def lswt_components() -> list[type]:
    """Offer the byte-level tokenizer."""
    return [Bytes]
