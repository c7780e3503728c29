"""The held-out text that a model is evaluated on."""

from __future__ import annotations

from typing import NamedTuple

from lswt_core.data import Rows, Tokens


class HeldOut(NamedTuple):
    """What a model is evaluated on."""

    tokens: Tokens
    rows: Rows  # fresh at every evaluation: its cursor stands at the beginning
    segments: int  # how many segments of every row are read
    unigram_perplexity: float  # of the simplest model, for comparison
