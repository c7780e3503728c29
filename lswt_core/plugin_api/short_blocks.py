"""Attention to a block of few keys, as attention sinks are, by plain matrix products: a fused
kernel splits its work by keys and leaves most of a GPU idle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lswt_core.plugin_api.attention import grouped_matmul, softmax_scale
from lswt_core.plugin_api.attention_merge import BackwardInputs, Gradients, Kernel

SHORT = 32  # keys, of which a fused kernel takes 64 or 128 at a time


class ShortBlocks(Kernel):
    """A kernel that leaves blocks of at most SHORT keys to plain products, which a compiler fuses
    with the merge of the blocks' outputs. Scores are rounded to the dtype of the queries.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.soft_cap = kernel, kernel.soft_cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        if not is_short(k, causal):
            return self.kernel.forward(q, k, v, causal)
        scores, _ = self.scores(q, k)
        logsumexp = scores.logsumexp(-1)
        p = (scores - logsumexp[..., None]).exp().to(v.dtype)
        return sum_over_keys(p, v), logsumexp

    def backward(self, inputs: BackwardInputs) -> Gradients:
        """See Kernel."""
        grad, q, k, v, *_, causal = inputs
        if not is_short(k, causal):
            return self.kernel.backward(inputs)
        p, ds = self.weights(inputs)
        dq = sum_over_keys(ds, k)
        return dq, sum_over_queries(ds, q, k), sum_over_queries(p.to(v.dtype), grad, v)

    def query_gradient(self, inputs: BackwardInputs) -> Tensor:
        """See Kernel."""
        if not is_short(inputs.k, inputs.causal):
            return self.kernel.query_gradient(inputs)
        _, ds = self.weights(inputs)
        return sum_over_keys(ds, inputs.k)

    def weights(self, inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
        """Of the softmax over all blocks the weights [B, H, T, N], in float32 or wider, and the
        gradient of q . k, in the dtype of the queries.
        """
        grad, q, k, v, out, logsumexp, _ = inputs
        scores, slope = self.scores(q, k)
        p = (scores - logsumexp[..., None]).exp()
        dp = grouped_matmul(grad.transpose(1, 2), v.permute(0, 2, 3, 1)).to(p.dtype)
        mean = (grad.to(p.dtype) * out).sum(-1).transpose(1, 2)[..., None]  # [B, H, T, 1]
        return p, (p * (dp - mean) * slope).to(q.dtype)

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | float]:
        """Scaled and capped scores [B, H, T, N] in float32 or wider, and their derivative by q . k
        (a number without a cap).
        """
        product = grouped_matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1))
        scale = softmax_scale(q)
        scores = product.to(torch.promote_types(q.dtype, torch.float32)) * scale
        if not self.soft_cap:
            return scores, scale
        capped = (scores / self.soft_cap).tanh()
        return self.soft_cap * capped, scale * (1 - capped.square())


def is_short(k: Tensor, causal: bool) -> bool:
    """Whether a block with keys [B, N, G, D] is left to plain products."""
    return not causal and k.shape[1] <= SHORT


def sum_over_keys(weights: Tensor, rows: Tensor) -> Tensor:
    """For every query the sum of rows [B, N, G, D] of its group, times weights [B, H, T, N]:
    [B, T, H, D].
    """
    return grouped_matmul(weights, rows.transpose(1, 2)).transpose(1, 2)


def sum_over_queries(weights: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """For every key [B, N, G, D] the sum of rows [B, T, H, D], times weights [B, H, T, N], over the
    queries of its group: [B, N, G, D].
    """
    groups = keys.shape[2]
    weights = weights.unflatten(1, (groups, -1)).flatten(2, 3)  # [B, G, H/G * T, N]
    rows = rows.transpose(1, 2).unflatten(1, (groups, -1)).flatten(2, 3)  # [B, G, H/G * T, D]
    return (weights.mT @ rows).transpose(1, 2)
