"""What can be said of tokens before any model has seen them."""

from __future__ import annotations

import numpy as np

from lswt_core.data.token_cache import Tokens
from lswt_core.errors import DataError
from lswt_core.interfaces import Tokenizer

BLOCK = 1 << 22  # ids counted at a time: bincount copies them to int64


def unigram_perplexity(train: Tokens, valid: Tokens, end: int, vocab_size: int) -> float:
    """Held-out perplexity of the add-one smoothed unigram model: what a model that ignores its
    context reaches.
    """
    seen, held = label_counts(train, end, vocab_size), label_counts(valid, end, vocab_size)
    log_probability = np.log(seen + 1) - np.log(seen.sum() + vocab_size)  # [V]
    return float(np.exp(-(held @ log_probability) / held.sum()))


def label_counts(tokens: Tokens, end: int, vocab_size: int) -> np.ndarray:
    """How often each id is a label, [V]: every id but the documents' first, and one `end` a
    document.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for begin in range(0, len(tokens.ids), BLOCK):
        counts += np.bincount(tokens.ids[begin : begin + BLOCK], minlength=vocab_size)
    counts -= np.bincount(tokens.ids[tokens.document_starts], minlength=vocab_size)
    counts[end] += len(tokens.document_starts)
    return counts


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise DataError if the tokenizer has ids that the embedding table has no row for."""
    if tokenizer.vocab_size > vocab_size:
        cure = (
            f"set embedding.vocab_size to at least {tokenizer.vocab_size}, or take a tokenizer with"
            " a smaller vocabulary"
        )
        raise DataError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, the embedding table"
            f" {vocab_size} rows: {cure}"
        )
