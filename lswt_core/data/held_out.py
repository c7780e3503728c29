"""The validation set of a run."""

from __future__ import annotations

from typing import NamedTuple

from lswt_core.data import ContiguousRows, Tokens


class HeldOut(NamedTuple):
    """A validation set, at its beginning."""

    tokens: Tokens
    rows: ContiguousRows  # unshuffled
    segments: int  # number of segments that every row evaluates
    unigram_perplexity: float  # baseline; NaN for a stream
    # this rank has no rows: it runs one that is another's, because all ranks gather parameters
    # together, and counts nothing
    is_idle: bool = False
