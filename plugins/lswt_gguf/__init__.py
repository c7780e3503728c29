"""The tokenizer inside of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Rules

from lswt_core.errors import DataError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Tokenizer
from lswt_core.plugin_api.gguf import GgufFile, locate_gguf
from lswt_core.plugin_api.tokenizers import save_fast_tokenizer, split_long_text

CONTROL = 3  # the type of tokens that no text contains, in the file's list of types


def byte_level(*before: Any) -> Any:
    """GPT-2's way of splitting a text before merges apply (Radford et al. 2019), after other
    splits.
    """
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])


SPLITS: dict[
    str, Callable[[], Any]
] = {  # by the file's own name for it (llama.cpp's llama-vocab.cpp)
    "gpt-2": byte_level,
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
}


class GgufTokenizer(Tokenizer):
    """The byte-level BPE that a GGUF file carries beside its weights; ``path`` is a file, or
    "package:NAME" for the one that an installed Python package has brought.

    Built from the file's metadata in seconds. Control tokens that are spelled out in a text are
    tokenised as plain characters. Bytes that its vocabulary lacks are dropped, as its authors'
    tokenizer does: SmolLM2's has no control characters but the usual ones.
    """

    name = "gguf"

    def __init__(self, *, path: str) -> None:
        self.path = path

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._rules.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int:
        """The id of the beginning-of-sequence token."""
        return self._file.field("tokenizer.ggml.bos_token_id")

    @property
    def eos_id(self) -> int:
        """The id of the end-of-sequence token."""
        return self._file.field("tokenizer.ggml.eos_token_id")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [
            encoding.ids
            for encoding in self._rules.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def split_long_text(self, text: str) -> Iterator[str]:
        """Cut between words."""
        return split_long_text(self._rules, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; control tokens have none."""
        return self._rules.decode(list(ids), skip_special_tokens=True)

    def fingerprint(self) -> str:
        """A hash of vocabulary, merges and special tokens."""
        return blake2b(
            f"{self._rules.to_str()} {self.bos_id} {self.eos_id}".encode(), digest_size=16
        ).hexdigest()

    def save(self, directory: Path) -> None:
        """As the library's tokenizer."""
        save_fast_tokenizer(self._rules, self.bos_id, self.eos_id, directory)

    def vocab(self) -> Mapping[str, int]:
        """The whole vocabulary, byte-level."""
        return self._rules.get_vocab(with_added_tokens=True)

    @cached_property
    def _file(self) -> GgufFile:
        return GgufFile(locate_gguf(self.path, "tokenizer.path"))

    @cached_property
    def _rules(self) -> Rules:
        """The library's tokenizer from the file's vocabulary and merges."""
        file, tokens = self._file, self._file.tokens()
        family, split = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre")
        if family != "gpt2" or split not in SPLITS:
            known = ", ".join(f"gpt2/{name}" for name in SPLITS)
            raise DataError(
                f"tokenizer.path = {self.path!r}: the file's tokenizer is {family}/{split}, this"
                f" one reads {known}\n  fix: take the same model's tokenizer with tokenizer.use=hf,"
                " or another file"
            )
        merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
        rules = Rules(models.BPE(vocab=tokens, merges=merges))
        rules.pre_tokenizer, rules.decoder = SPLITS[split](), decoders.ByteLevel()
        control = [
            token
            for token, kind in zip(tokens, file.field("tokenizer.ggml.token_type"), strict=True)
            if kind == CONTROL
        ]
        rules.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in control]
        )
        rules.encode_special_tokens = True
        return rules


@hookimpl
def lswt_components() -> list[type]:
    """Offer the tokenizer."""
    return [GgufTokenizer]
