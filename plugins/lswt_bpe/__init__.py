"""Byte-level byte-pair encoding, trained once on the run's own text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import tokenizers
from annotated_types import Ge
from tokenizers import decoders, models, pre_tokenizers, trainers

from lswt_core.errors import ResourceError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Document, Tokenizer
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.plugin_api.tokenizers import save_fast_tokenizer, split_long_text

SPECIALS = ["<|begin|>", "<|end|>"]  # ids 0 and 1; in a text they are plain characters


class BytePair(Tokenizer):
    """Byte-level BPE with GPT-2's splitting (Sennrich et al. 2016, arXiv 1508.07909; Radford et al.
    2019): fits every text, losslessly.

    It learns from the first ``train_characters`` of the training documents and is kept in the
    cache, in the format of the `tokenizers` library. A small text may have fewer than
    ``vocab_size`` ids to offer.
    """

    name = "bpe"
    citation = """@inproceedings{sennrich2016neural,
  title={Neural Machine Translation of Rare Words with Subword Units}, author={Sennrich, Rico and Haddow, Barry and Birch, Alexandra},
  booktitle={ACL}, year={2016}}"""

    def __init__(
        self,
        *,
        vocab_size: Annotated[int, Ge(258)] = 8192,
        train_characters: Annotated[int, Ge(1)] = 200_000_000,
    ) -> None:
        self.requested_size, self.train_characters = vocab_size, train_characters
        self._mapping: tokenizers.Tokenizer | None = None

    def fit(
        self, documents: Callable[[], Iterable[Document]], fingerprint: str, cache: Path
    ) -> None:
        """Take the tokenizer of this text and these options from the cache, or train it (6 s for 11
        MB) and put it there.
        """
        key = json.dumps([fingerprint, self.requested_size, self.train_characters])
        path = cache / f"bpe-{blake2b(key.encode(), digest_size=16).hexdigest()}.json"
        self._mapping = load(path)
        if self._mapping is None:
            self._mapping = self._train(documents())
            save(self._mapping, path)
        self._mapping.encode_special_tokens = True  # not part of the file

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
        """Cut between words."""
        return split_long_text(self._fitted, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; the two special ones have none."""
        return self._fitted.decode(list(ids), skip_special_tokens=True)

    def fingerprint(self) -> str:
        """A hash of vocabulary and merges."""
        return blake2b(self._fitted.to_str().encode(), digest_size=16).hexdigest()

    def save(self, directory: Path) -> None:
        """As the library's own tokenizer."""
        save_fast_tokenizer(self._fitted, self.bos_id, self.eos_id, directory)

    def vocab(self) -> Mapping[str, int]:
        """The whole vocabulary, byte-level."""
        return self._fitted.get_vocab(with_added_tokens=True)

    @property
    def _fitted(self) -> tokenizers.Tokenizer:
        assert self._mapping is not None, "fit comes before everything else"
        return self._mapping

    def _train(self, documents: Iterable[Document]) -> tokenizers.Tokenizer:
        """Learn merges."""
        # one that is being trained cannot be asked for anything
        mapping, other = untrained(), untrained()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=self.requested_size,
            special_tokens=SPECIALS,
            initial_alphabet=alphabet,
            show_progress=False,
        )
        texts = (piece for text in self._texts(documents) for piece in split_long_text(other, text))
        mapping.train_from_iterator(texts, trainer)
        return mapping

    def _texts(self, documents: Iterable[Document]) -> Iterator[str]:
        """The first characters of the text: a stream of documents need not end."""
        left = self.train_characters
        for document in documents:
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                return


def untrained() -> tokenizers.Tokenizer:
    """Bytes, split into words as GPT-2 does."""
    mapping = tokenizers.Tokenizer(models.BPE())
    mapping.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    mapping.decoder = decoders.ByteLevel()
    return mapping


def load(path: Path) -> tokenizers.Tokenizer | None:
    """A tokenizer from the cache; None if it is not there, or is damaged (it is then trained
    again).
    """
    if not path.is_file():
        return None
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception:  # the library raises nothing more special
        return None


def save(mapping: tokenizers.Tokenizer, path: Path) -> None:
    """Write a trained tokenizer to the cache. Raises ResourceError."""
    advice = "set LSWT_CACHE_DIR to a directory that can be written"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{path.parent} cannot be created: {error.strerror or error}; {advice}"
        ) from error
    write_atomically(path, mapping.to_str().encode(), advice)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the trained tokenizer."""
    return [BytePair]
