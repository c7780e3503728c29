"""Statistics of tokens: the unigram baseline, and whether a tokenizer fits the embedding table."""

from __future__ import annotations

import numpy as np

from lswt_core.data.token_file import Tokens
from lswt_core.errors import DataError
from lswt_core.interfaces import Tokenizer

BLOCK = 1 << 22  # ids counted at a time: bincount copies them to int64


def unigram_perplexity(train: Tokens, valid: Tokens, eos_id: int, vocab_size: int) -> float:
    """Validation perplexity of the add-one smoothed unigram model: the baseline of a model that
    ignores its context.
    """
    valid_counts = count_labels(valid, eos_id, vocab_size)  # [V]
    log_probability = unigram_log_probability(train, eos_id, vocab_size)
    return float(np.exp(-(valid_counts @ log_probability) / valid_counts.sum()))


def unigram_log_probability(train: Tokens, eos_id: int, vocab_size: int) -> np.ndarray:
    """Logarithms of the add-one smoothed probabilities of the training text's labels, [V]."""
    counts = count_labels(train, eos_id, vocab_size)  # [V]
    log_probability: np.ndarray = np.log(counts + 1) - np.log(counts.sum() + vocab_size)
    return log_probability


def count_labels(tokens: Tokens, eos_id: int, vocab_size: int) -> np.ndarray:
    """How often each id is a label, [V]: every id that is predicted but the first of each document,
    and one EOS a document whose end is.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    if tokens.label_counts is not None:
        counts[: len(tokens.label_counts)] = tokens.label_counts
        return counts
    for begin in range(0, len(tokens.ids), BLOCK):
        counts += count_scored(tokens.ids[begin : begin + BLOCK], vocab_size)
    counts_bos = count_scored(tokens.ids[tokens.document_starts], vocab_size)
    counts -= counts_bos
    counts[eos_id] += counts_bos.sum()
    return counts


def count_scored(stored: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs among those that are predicted, [V]."""
    scored = stored[stored >= 0] if stored.dtype.kind == "i" else stored
    return np.bincount(scored, minlength=vocab_size)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise DataError if the tokenizer has more ids than the embedding table has rows."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, the embedding table"
            f" {vocab_size} rows: set embedding.vocab_size to at least {tokenizer.vocab_size}, or"
            " take a tokenizer with a smaller vocabulary"
        )
