"""How much what a model says depends on where a text is cut into segments. Generation reads one
token at a time, training many: a model that is meant to say the same of both has a small number.
"""

from __future__ import annotations

import numpy as np

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.evaluation.intervals import Mean, mean_over_tokens
from lswt_core.evaluation.memory_gain import require_memory
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import TokenLosses, token_losses

SHORTER = 8  # times as short: half as many tokens each would show less, one token take long


def segment_dependence(model: LoadedModel, text: Text, losses: TokenLosses, seq_len: int) -> Mean:
    """Return by how much the loss of a token changes, whether up or down, when the text is read in
    segments an eighth as long (of a token at least), the memory carried along; ``losses`` are the
    text's in segments of ``seq_len`` tokens; nats, interval over documents.

    0 up to rounding for a model whose positions are distances and whose memory reaches as far
    whatever the segments. A cache of a fixed length reaches further from a long segment's end: that
    counts as well. Raises UsageError if the model has no memory, or segments are of one token.
    """
    require_memory(model, text, seq_len)
    if seq_len == 1:
        raise UsageError("no segments are shorter than those of one token")
    shorter = token_losses(model, text, max(1, seq_len // SHORTER))
    return mean_over_tokens(np.abs(shorter.nll - losses.nll), losses.document)
