"""A tokenizer of the transformers library."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lswt_core.errors import DataError, PluginError
from lswt_core.interfaces import Tokenizer
from lswt_core.plugin_api.hub import hub_options, summarise_error
from lswt_core.plugin_api.tokenizers import split_long_text


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer that AutoTokenizer loads from ``path``: a name on the Hub or a local directory.

    Documents begin with its BOS and end with its EOS token (OPT's are the same). Special tokens
    spelled out in a text are tokenised as plain characters.
    """

    name = "hf"

    def __init__(self, *, path: str = "facebook/opt-125m", revision: str = "") -> None:
        self.path, self.revision = path, revision

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._vocabulary.values()) + 1

    @property
    def bos_id(self) -> int:
        """The id of the beginning-of-sequence token."""
        return self._special("bos_token")

    @property
    def eos_id(self) -> int:
        """The id of the end-of-sequence token."""
        return self._special("eos_token")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        if not texts:  # which the library refuses
            return []
        options = {
            "add_special_tokens": False,
            "split_special_tokens": True,
            "return_attention_mask": False,
            "verbose": False,  # no warning about texts longer than the tokenizer's model reads
        }
        return self._tokenizer(list(texts), **options)["input_ids"]

    def split_long_text(self, text: str) -> Iterable[str]:
        """Split between words, if the tokenizer is a fast one."""
        if self._tokenizer.is_fast:
            return split_long_text(self._tokenizer.backend_tokenizer, text)
        return [text]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def fingerprint(self) -> str:
        """A hash of vocabulary, merges and special tokens."""
        rules = self._tokenizer.backend_tokenizer.to_str() if self._tokenizer.is_fast else ""
        fields = [
            type(self._tokenizer).__name__,
            sorted(self._vocabulary.items()),
            rules,
            self.bos_id,
            self.eos_id,
        ]
        return blake2b(json.dumps(fields).encode(), digest_size=16).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files, with special tokens in a text tokenised as characters."""
        tokenizer = copy.deepcopy(self._tokenizer)
        tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
        tokenizer.save_pretrained(directory)

    def vocab(self) -> Mapping[str, int]:
        """The whole vocabulary, added tokens included."""
        return self._vocabulary

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    @cached_property
    def _tokenizer(self) -> Any:
        """The library's tokenizer, loaded at first use: importing the library takes seconds."""
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise PluginError(
                f"tokenizer 'hf' needs the transformers library: {error}; pip install"
                " 'transformers>=5.3'"
            ) from error
        try:
            return AutoTokenizer.from_pretrained(self.path, **hub_options(self.revision))
        except Exception as error:  # the library and its network client raise errors of any class
            raise DataError(
                f"tokenizer {self.path!r} cannot be loaded: {summarise_error(error)}\n  fix: check"
                " tokenizer.path; without a network set it to a local directory with the"
                " tokenizer's files, or use tokenizer.use=bpe (trained on your text) or"
                " tokenizer.use=bytes"
            ) from error

    def _special(self, role: str) -> int:
        """The id of a special token."""
        value = getattr(self._tokenizer, f"{role}_id")
        if value is None:
            raise DataError(
                f"tokenizer {self.path!r} has no {role}, which documents must begin or end with:"
                " set it in its tokenizer_config.json, or use another tokenizer"
            )
        return value
