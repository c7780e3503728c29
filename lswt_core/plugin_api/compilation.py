"""torch.compile, for functions that many layers, recipes and shapes share."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

# torch.compile's limit of graphs per function. It counts a block's over all layers, recipes, shapes
# and modes of a process; torch's default is 8.
MAX_GRAPHS = 1024


def raise_recompile_limit() -> dict[str, Any]:
    """Allow MAX_GRAPHS graphs per function; returns further arguments for ``torch.compile``. Newer
    versions of torch keep this setting per thread, and activation checkpointing on a GPU recomputes
    blocks in another thread, so there it is passed as an argument.
    """
    from torch._dynamo import config  # slow to import

    config.recompile_limit = config.accumulated_recompile_limit = MAX_GRAPHS
    if "recompile_limit" in signature(torch.compile).parameters:
        return {"recompile_limit": MAX_GRAPHS}
    return {}
