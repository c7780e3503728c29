"""What it costs to keep KV caches in a narrower type between segments."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.evaluation.intervals import Mean, mean_over_tokens
from lswt_core.evaluation.memory_gain import require_memory
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import Carry, TokenLosses, token_losses
from lswt_core.train.memory_placement import DeviceMemory
from lswt_core.train.narrow_memory import NARROW, NarrowMemory, kv_caches


def narrow_carry(model: LoadedModel, dtype: torch.dtype) -> Carry:
    """Return the carry that keeps keys and values in a narrower type."""
    memory = NarrowMemory(DeviceMemory(), model.decoder, dtype)
    return lambda state: memory.fetch([memory.keep(state)], 0)


class NarrowError(NamedTuple):
    """The cost of one type."""

    dtype: str  # as train.memory_dtype names it
    increase: Mean  # of the loss, on the same tokens
    largest: float  # change of a token's loss, in magnitude


def narrow_errors(
    model: LoadedModel, text: Text, seq_len: int, full: TokenLosses
) -> list[NarrowError]:
    """Return how much the loss behind the documents' first segments grows with every type of
    train.memory_dtype; ``full`` are the text's losses with the states as they are. Raises
    UsageError if the model has no KV cache, or no document is long enough.
    """
    require_memory(model, text, seq_len)
    if not any(kv_caches(block) for block in model.decoder.blocks):
        raise UsageError("no layer of this model keeps keys and values between segments")
    errors, behind = [], full.position >= seq_len
    for name, dtype in NARROW.items():
        losses = token_losses(model, text, seq_len, narrow_carry(model, dtype))
        change = (losses.nll - full.nll)[behind]
        increase = mean_over_tokens(change, full.document[behind])
        errors.append(NarrowError(name, increase, float(abs(change).max())))
    return errors
