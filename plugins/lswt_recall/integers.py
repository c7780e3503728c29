"""Text that is a list of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tokenizers
from annotated_types import Ge, Le
from tokenizers import models, pre_tokenizers

from lswt_core.errors import DataError
from lswt_core.interfaces import Tokenizer
from lswt_core.plugin_api.tokenizers import save_fast_tokenizer


class Integers(Tokenizer):
    """Numbers below ``size`` in a text, separated by spaces, are the ids; then BOS and EOS. For
    text that is tokenised already, and for made-up tasks.
    """

    name = "integers"

    def __init__(self, *, size: Annotated[int, Ge(1), Le(1_048_576)] = 256) -> None:
        self.size = size

    @property
    def vocab_size(self) -> int:
        """The numbers, BOS and EOS."""
        return self.size + 2

    @property
    def bos_id(self) -> int:
        """The first id after the numbers."""
        return self.size

    @property
    def eos_id(self) -> int:
        """The second id after the numbers."""
        return self.size + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The numbers of each text. Raises DataError for anything else."""
        return [self.read(text) for text in texts]

    def read(self, text: str) -> list[int]:
        """The numbers of a text."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(
                f"the tokenizer 'integers' reads numbers separated by spaces: {error}; take another"
                " tokenizer for text"
            ) from error
        outside = [number for number in ids if not 0 <= number < self.size]
        if outside:
            raise DataError(
                f"the text has the number {outside[0]}, and ids are from 0 to {self.size - 1}:"
                " correct the text or, before training, raise tokenizer.size"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The ids as numbers; BOS and EOS are left out."""
        return " ".join(str(id_) for id_ in ids if id_ < self.size)

    def fingerprint(self) -> str:
        """The number of ids."""
        return f"integers {self.size}"

    def save(self, directory: Path) -> None:
        """Write the files of a vocabulary of numbers as ``decode`` writes them; others, such as
        "07", it refuses.
        """
        vocabulary = {str(number): number for number in range(self.size)}
        mapping = tokenizers.Tokenizer(models.WordLevel(vocabulary))
        mapping.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        mapping.add_special_tokens(["<|begin|>", "<|end|>"])
        save_fast_tokenizer(mapping, self.bos_id, self.eos_id, directory)
