"""Tokens that a long context decides: LongPPL (Fang et al. 2024, arXiv 2410.23771)."""

from __future__ import annotations

import math
from typing import NamedTuple

from lswt_core.evaluation.token_losses import TokenLosses

GAIN = 2.0  # nats that the long context is worth at least
LOSS = 2.0  # nats that are left with it at most


class KeyTokens(NamedTuple):
    """Key tokens of a text, as this model itself finds them."""

    tokens: int
    share: float  # of the tokens behind their document's first segment
    perplexity: float | None  # LongPPL with the whole context; None: there is no key token
    short_perplexity: float | None  # of the same tokens without it


def key_tokens(full: TokenLosses, short: TokenLosses, seq_len: int) -> KeyTokens:
    """Return the tokens with l_short - l_full > 2 and l_full < 2, from the losses with all of the
    context and with the segment alone.
    """
    behind = full.position >= seq_len
    is_key = behind & (short.nll - full.nll > GAIN) & (full.nll < LOSS)
    count = int(is_key.sum())
    if not count:
        return KeyTokens(0, 0.0, None, None)
    return KeyTokens(
        count,
        count / int(behind.sum()),
        math.exp(full.nll[is_key].mean()),
        math.exp(short.nll[is_key].mean()),
    )
