"""The held-out text (validation set) of a run: how much of it is evaluated, in which rows. Which
documents are held out is for the data source to decide (``DataSource.documents("valid")``).
"""

from __future__ import annotations

from typing import NamedTuple

from lswt_core.data import ContiguousRows, Tokens
from lswt_core.distributed.world import World
from lswt_core.errors import DataError
from lswt_core.recipe import Recipe


class HeldOut(NamedTuple):
    """A validation set, at its beginning."""

    tokens: Tokens
    rows: ContiguousRows  # unshuffled
    segments: int  # number of segments that every row evaluates
    unigram_perplexity: float  # baseline; NaN for a stream
    # this rank has no rows: it runs one that is another's, because all ranks gather parameters
    # together, and counts nothing
    is_idle: bool = False


def choose_held_out(
    recipe: Recipe,
    tokens: Tokens,
    eos_id: int,
    world: World,
    unigram: float,
    *,
    whole_documents: bool = False,
) -> HeldOut:
    """The held-out tokens in ``evaluate.batch_size`` rows, or as many as there are segments for. Of
    each row the first segments are evaluated, about ``evaluate.tokens`` tokens in all.
    ``whole_documents``: rows begin at documents, all of which have one length. Raises DataError if
    the text is shorter than a segment.
    """
    seq_len, n_tokens = recipe.train.seq_len, len(tokens.ids)
    batch_size = min(recipe.evaluate.batch_size, n_tokens // seq_len)
    if batch_size < 1:
        raise DataError(
            f"the held-out text has {n_tokens:,} tokens, but evaluation needs a segment of"
            f" {seq_len}: give it more text, or shorten train.seq_len"
        )
    tokens_per_row = min(n_tokens, recipe.evaluate.tokens) // batch_size
    rows = ContiguousRows(
        tokens,
        eos_id,
        global_batch_size=batch_size,
        rows=world.share(batch_size) or range(1),
        seq_len=seq_len,
        seed=0,
        document_masking=recipe.train.document_masking,
        shuffle=False,
        whole_documents=whole_documents,
    )
    segments, is_idle = max(1, tokens_per_row // seq_len), not world.share(batch_size)
    return HeldOut(tokens, rows, segments, unigram, is_idle)
