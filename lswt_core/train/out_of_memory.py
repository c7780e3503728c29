"""Out of memory: how it is recognised, and what a user is told."""

from __future__ import annotations

import torch

from lswt_core.errors import ResourceError
from lswt_core.train.step_context import StepContext


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; on the CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory_error(context: StepContext) -> ResourceError:
    """The error for a step that does not fit into memory."""
    device, rows = context.world.device, context.micro_batch_size
    if rows == 1:
        return ResourceError(
            f"not even one row fits into the memory of {device}: shorten train.seq_len or take a"
            " smaller model"
        )
    return ResourceError(
        f"a micro-batch of {rows} rows does not fit into the memory of {device}:"
        f" set train.micro_batch_size={rows // 2} (the result stays the same)"
    )
