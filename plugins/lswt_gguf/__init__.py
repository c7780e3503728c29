"""The tokenizer in a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from lswt_core.errors import DataError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Tokenizer
from lswt_core.plugin_api.gguf import GgufFile, locate_gguf
from lswt_core.plugin_api.tokenizers import save_fast_tokenizer, split_long_text

CONTROL = 3  # the token type of special tokens in GGUF


def byte_level(*first: Any) -> Any:
    """GPT-2's pre-tokenizer (Radford et al. 2019), after other ones."""
    return pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False)])


# By the name in ``tokenizer.ggml.pre`` (llama.cpp's llama-vocab.cpp).
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": byte_level,
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
}


class GgufTokenizer(Tokenizer):
    """The byte-level BPE in a GGUF file's metadata. ``path`` is a file, or "package:NAME" for
    the one in an installed Python package.

    Special tokens spelled out in a text are tokenised as plain characters. Bytes without a token
    are dropped, as by the model's original tokenizer: SmolLM2's lacks some control characters.
    """

    name = "gguf"

    def __init__(self, *, path: str) -> None:
        self.path = path

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int:
        """The id of the BOS token."""
        return self._file.field("tokenizer.ggml.bos_token_id")

    @property
    def eos_id(self) -> int:
        """The id of the EOS token."""
        return self._file.field("tokenizer.ggml.eos_token_id")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [
            encoding.ids
            for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def split_long_text(self, text: str) -> Iterator[str]:
        """Split between words."""
        return split_long_text(self._tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def fingerprint(self) -> str:
        """A hash of vocabulary, merges and special tokens."""
        return blake2b(
            f"{self._tokenizer.to_str()} {self.bos_id} {self.eos_id}".encode(), digest_size=16
        ).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the files of a fast tokenizer."""
        save_fast_tokenizer(self._tokenizer, self.bos_id, self.eos_id, directory)

    def vocab(self) -> Mapping[str, int]:
        """The vocabulary, byte-level, with special tokens."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def _file(self) -> GgufFile:
        return GgufFile(locate_gguf(self.path, "tokenizer.path"))

    @cached_property
    def _tokenizer(self) -> FastTokenizer:
        """The `tokenizers` library's tokenizer with the file's vocabulary and merges."""
        file, tokens = self._file, self._file.tokens()
        family, pre = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre")
        if family != "gpt2" or pre not in PRE_TOKENIZERS:
            known = ", ".join(f"gpt2/{name}" for name in PRE_TOKENIZERS)
            raise DataError(
                f"tokenizer.path = {self.path!r}: the file's tokenizer is {family}/{pre}, which is"
                f" not supported; supported: {known}\n  fix: use the same model's tokenizer with"
                " tokenizer.use=hf, or another file"
            )
        merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
        tokenizer = FastTokenizer(models.BPE(vocab=tokens, merges=merges))
        tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS[pre](), decoders.ByteLevel()
        types = file.field("tokenizer.ggml.token_type")
        special = [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == CONTROL
        ]
        tokenizer.add_special_tokens(special)
        tokenizer.encode_special_tokens = True  # in a text, as plain characters
        return tokenizer


@hookimpl
def lswt_components() -> list[type]:
    """Offer the GGUF tokenizer."""
    return [GgufTokenizer]
