"""The tokens whose attention and hidden states are probed."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lswt_core.decode.load_run import LoadedModel
from lswt_core.evaluation.texts import Text

PROBED_ROWS, PROBED_TOKENS = 8, 512  # whose attention weights are in memory at once
ALIKE = 0.9  # times the longest document: how long shorter ones are at least


def probe_batch(model: LoadedModel, text: Text) -> Tensor:
    """Return the first segments [B, T] of the longest documents, up to PROBED_TOKENS of each: of
    those that have as many or, where none has, that are about as long as the longest.
    """
    size = min(PROBED_TOKENS, model.seq_len)
    longest = sorted(text.documents, key=len, reverse=True)[:PROBED_ROWS]
    if len(longest[0]) < size:
        size = math.ceil(ALIKE * len(longest[0]))
    device = next(model.decoder.parameters()).device
    rows = np.stack([ids[:size] for ids in longest if len(ids) >= size])
    return torch.from_numpy(rows).to(device)
