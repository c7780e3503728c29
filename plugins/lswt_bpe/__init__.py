"""Byte-level byte-pair encoding, trained on the run's own text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import tokenizers
from annotated_types import Ge
from tokenizers import decoders, models, pre_tokenizers, trainers

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Document, Tokenizer
from lswt_core.plugin_api.atomic_write import OTHER_CACHE, write_atomically
from lswt_core.plugin_api.tokenizers import save_fast_tokenizer, split_long_text

SPECIALS = ["<|begin|>", "<|end|>"]  # ids 0 and 1; spelled out in a text: plain characters


class BytePair(Tokenizer):
    """Byte-level BPE with GPT-2's pre-tokenizer (Sennrich et al. 2016, arXiv 1508.07909; Radford et
    al. 2019). Encodes every text losslessly.

    Trained on the first ``train_characters`` of the training documents, and cached in the format of
    the `tokenizers` library. A small text may give fewer than ``vocab_size`` ids.
    """

    name = "bpe"
    citation = """@inproceedings{sennrich2016neural,
  title={Neural Machine Translation of Rare Words with Subword Units},
  author={Sennrich, Rico and Haddow, Barry and Birch, Alexandra},
  booktitle={ACL}, year={2016}}"""

    def __init__(
        self,
        *,
        vocab_size: Annotated[int, Ge(258)] = 8192,
        train_characters: Annotated[int, Ge(1)] = 200_000_000,
    ) -> None:
        self.requested_size, self.train_characters = vocab_size, train_characters
        self._tokenizer: tokenizers.Tokenizer | None = None

    def fit(
        self, documents: Callable[[], Iterable[Document]], fingerprint: str, cache: Path
    ) -> None:
        """Load the tokenizer of this text and these options from the cache, or train it (6 s for
        11 MB) and save it there.
        """
        key = json.dumps([fingerprint, self.requested_size, self.train_characters])
        path = cache / f"bpe-{blake2b(key.encode(), digest_size=16).hexdigest()}.json"
        self._tokenizer = load_cached(path)
        if self._tokenizer is None:
            self._tokenizer = self._train(documents())
            write_atomically(path, self._tokenizer.to_str().encode(), OTHER_CACHE)
        self._tokenizer.encode_special_tokens = True  # not saved in the file

    @property
    def vocab_size(self) -> int:
        """Number of ids, the two special ones included."""
        return self._fitted.get_vocab_size()

    @property
    def bos_id(self) -> int:
        """The id of "<|begin|>"."""
        return SPECIALS.index("<|begin|>")

    @property
    def eos_id(self) -> int:
        """The id of "<|end|>"."""
        return SPECIALS.index("<|end|>")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [
            encoding.ids
            for encoding in self._fitted.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def split_long_text(self, text: str) -> Iterator[str]:
        """Split between words."""
        return split_long_text(self._fitted, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        return self._fitted.decode(list(ids), skip_special_tokens=True)

    def fingerprint(self) -> str:
        """A hash of vocabulary and merges."""
        return blake2b(self._fitted.to_str().encode(), digest_size=16).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the files of a fast tokenizer."""
        save_fast_tokenizer(self._fitted, self.bos_id, self.eos_id, directory)

    def vocab(self) -> Mapping[str, int]:
        """The vocabulary, byte-level, with special tokens."""
        return self._fitted.get_vocab(with_added_tokens=True)

    @property
    def _fitted(self) -> tokenizers.Tokenizer:
        assert self._tokenizer is not None, "call fit first"
        return self._tokenizer

    def _train(self, documents: Iterable[Document]) -> tokenizers.Tokenizer:
        """Learn the merges."""
        tokenizer = untrained()
        splitter = untrained()  # a tokenizer is locked while it is trained
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=self.requested_size,
            special_tokens=SPECIALS,
            initial_alphabet=alphabet,
            show_progress=False,
        )
        texts = (
            piece for text in self._texts(documents) for piece in split_long_text(splitter, text)
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    def _texts(self, documents: Iterable[Document]) -> Iterator[str]:
        """The first ``train_characters`` characters; a stream of documents may be endless."""
        left = self.train_characters
        for document in documents:
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                return


def untrained() -> tokenizers.Tokenizer:
    """A tokenizer of bytes with GPT-2's pre-tokenizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_cached(path: Path) -> tokenizers.Tokenizer | None:
    """A tokenizer from the cache; None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception:  # the library raises nothing more specific
        return None


@hookimpl
def lswt_components() -> list[type]:
    """Offer trained BPE."""
    return [BytePair]
