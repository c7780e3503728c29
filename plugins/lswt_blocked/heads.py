"""How batch and heads become one dimension, for B rows, G key/value heads, and R = H/G query heads
that share one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.interfaces import KVBlock
from lswt_core.plugin_api.attention import softmax_scale


def concatenate_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Several [B, n, G, D] -> one [BG, N, D]."""
    return torch.cat([tensor.transpose(1, 2) for tensor in tensors], dim=2).flatten(0, 1)


def flatten_queries(q: Tensor, groups: int) -> Tensor:
    """Queries [B, T, H, D] -> [BG, T R, D], a copy."""
    q = q.unflatten(2, (groups, -1)).transpose(1, 2)  # [B, G, T, R, D]
    return q.new_empty(q.shape).copy_(q).flatten(0, 1).flatten(1, 2)


def scale_queries(q: Tensor, groups: int) -> Tensor:
    """Queries [B, T, H, D] -> [BG, T R, D], times 1 / sqrt(D)."""
    return flatten_queries(q, groups).mul_(softmax_scale(q))


def unflatten_queries(tensor: Tensor, groups: int, queries_per_kv: int) -> Tensor:
    """[BG, T R, D] -> [B, T, H, D], contiguous, as the next projection needs it."""
    tensor = tensor.unflatten(1, (-1, queries_per_kv))
    tensor = tensor.unflatten(0, (-1, groups)).transpose(1, 2)  # [B, T, G, R, D]
    return tensor.new_empty(tensor.shape).copy_(tensor).flatten(2, 3)


def unflatten_heads(tensor: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[BG, N, D] -> [B, N, G, D], contiguous, as the next projection needs it."""
    tensor = tensor.unflatten(0, (-1, groups)).transpose(1, 2)
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def visible_by_group(block: KVBlock) -> Tensor | None:
    """The keys that each query sees but for the causal mask, [B or 1, G or 1, T, H/G or 1, N];
    None: all.
    """
    mask = block._replace(causal=False).visible()
    if mask is None:
        return None
    full = (1, 1, block.q.shape[1], block.k.shape[1])
    mask = mask.expand(torch.broadcast_shapes(mask.shape, full))  # [B or 1, H or 1, T, N]
    groups = block.k.shape[2] if mask.shape[1] > 1 else 1
    return mask.unflatten(1, (groups, -1)).transpose(2, 3)
