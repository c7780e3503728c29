"""The tokens whose attention and hidden states are probed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lswt_core.decode.load_run import LoadedModel
from lswt_core.evaluation.texts import Text

PROBED_ROWS, PROBED_TOKENS = 8, 512  # whose attention weights are in memory at once


def probe_batch(model: LoadedModel, text: Text) -> Tensor:
    """Return the beginnings of documents [B, T], all as long as the shortest of them."""
    longest = sorted(text.documents, key=len, reverse=True)[:PROBED_ROWS]
    size = min(PROBED_TOKENS, model.seq_len, len(longest[-1]))
    device = next(model.decoder.parameters()).device
    return torch.from_numpy(np.stack([ids[:size] for ids in longest])).to(device)
