"""torch's fused attention kernels that return the logsumexp of the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.plugin_api.attention import softmax_scale
from lswt_core.plugin_api.attention_merge import BackwardInputs, Gradients, Kernel

aten = torch.ops.aten
LOGSUMEXP_ALIGNMENT = 32  # the memory-efficient kernel pads its logsumexps to a multiple


class CpuFlash(Kernel):
    """torch's flash kernel for CPUs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first(q, k, v), is_causal=causal
        )
        return out.transpose(1, 2), logsumexp

    def backward(self, inputs: BackwardInputs) -> Gradients:
        """See Kernel."""
        grad, q, k, v, out, logsumexp, causal = inputs
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads_first(grad, q, k, v, out), logsumexp, 0.0, causal
        )
        return tokens_first(*gradients)


class TorchFlash(Kernel):
    """torch's build of FlashAttention 2: half precision on CUDA."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, logsumexp, *_ = aten._scaled_dot_product_flash_attention(
            *heads_first(q, k, v), 0.0, causal, False, scale=softmax_scale(q)
        )
        return out.transpose(1, 2), logsumexp

    def backward(self, inputs: BackwardInputs) -> Gradients:
        """See Kernel. Seed and offset matter for dropout alone."""
        grad, q, k, v, out, logsumexp, causal = inputs
        seed, offset = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
        lengths = (None, None, q.shape[1], k.shape[1])
        gradients = aten._scaled_dot_product_flash_attention_backward(
            *heads_first(grad, q, k, v, out),
            logsumexp,
            *lengths,
            0.0,
            causal,
            seed,
            offset,
            scale=softmax_scale(q),
        )
        return tokens_first(*gradients)


class Cudnn(Kernel):
    """NVIDIA's cuDNN: half precision on CUDA, the fastest on Hopper and newer."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(
            *heads_first(q, k, v), None, True, 0.0, causal, False, scale=softmax_scale(q)
        )
        if logsumexp.ndim == 4:
            logsumexp = logsumexp.squeeze(-1)
        return out.transpose(1, 2), logsumexp

    def backward(self, inputs: BackwardInputs) -> Gradients:
        """See Kernel."""
        grad, q, k, v, out, logsumexp, causal = inputs
        seed, offset = (q.new_empty((), dtype=torch.int64) for _ in range(2))
        lengths = (None, None, q.shape[1], k.shape[1])
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first(grad, q, k, v, out),
            logsumexp[..., None].contiguous(),
            seed,
            offset,
            None,
            *lengths,
            0.0,
            causal,
            scale=softmax_scale(q),
        )
        return tokens_first(*gradients)


class EachQueryOfGroup(Kernel):
    """A kernel that knows no grouped heads, called once for every query head of a group: keys and
    values are not repeated in memory.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        if q.shape[2] == k.shape[2]:
            return self.kernel.forward(q, k, v, causal)
        calls = [
            self.kernel.forward(part, k, v, causal) for part in split_query_groups(q, k.shape[2], 2)
        ]
        out = join_query_groups([out for out, _ in calls], 2)
        return out, join_query_groups([logsumexp for _, logsumexp in calls], 1)

    def backward(self, inputs: BackwardInputs) -> Gradients:
        """See Kernel."""
        if inputs.q.shape[2] == inputs.k.shape[2]:
            return self.kernel.backward(inputs)
        calls = [self.kernel.backward(part) for part in split_by_query_head(inputs)]
        dk, dv = (torch.stack([call[i] for call in calls]).sum(0) for i in (1, 2))
        return join_query_groups([call[0] for call in calls], 2), dk, dv

    def query_gradient(self, inputs: BackwardInputs) -> Tensor:
        """See Kernel."""
        if inputs.q.shape[2] == inputs.k.shape[2]:
            return self.kernel.query_gradient(inputs)
        calls = [self.kernel.query_gradient(part) for part in split_by_query_head(inputs)]
        return join_query_groups(calls, 2)


class MemoryEfficient(Kernel):
    """torch's build of xFormers' memory-efficient attention: any dtype on CUDA."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, logsumexp, *_ = aten._scaled_dot_product_efficient_attention(
            *heads_first(q, k, v), None, True, 0.0, causal, scale=softmax_scale(q)
        )
        return out.transpose(1, 2), logsumexp[..., : q.shape[1]]

    def backward(self, inputs: BackwardInputs) -> Gradients:
        """See Kernel."""
        grad, q, k, v, out, logsumexp, causal = inputs
        padding = -q.shape[1] % LOGSUMEXP_ALIGNMENT
        # exp(score - inf) is 0
        logsumexp = torch.nn.functional.pad(logsumexp, (0, padding), value=torch.inf)
        seed, offset = (q.new_empty((), dtype=torch.int64) for _ in range(2))
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            *heads_first(grad, q, k, v),
            None,
            out.transpose(1, 2),
            logsumexp,
            seed,
            offset,
            0.0,
            [True, True, True, False],
            causal,
            scale=softmax_scale(q),
        )
        return tokens_first(dq, dk, dv)


def split_by_query_head(inputs: BackwardInputs) -> list[BackwardInputs]:
    """The inputs for the first query heads of all groups, those for the second, and so on."""
    groups = inputs.k.shape[2]
    totals = [total.contiguous() for total in split_query_groups(inputs.logsumexp, groups, 1)]
    by_token = (split_query_groups(t, groups, 2) for t in (inputs.grad, inputs.q, inputs.out))
    return [
        inputs._replace(grad=grad, q=q, out=out, logsumexp=total)
        for grad, q, out, total in zip(*by_token, totals, strict=True)
    ]


def split_query_groups(tensor: Tensor, groups: int, dim: int) -> tuple[Tensor, ...]:
    """Split the query heads H of a dimension: the first of every group, the second, ..., [.., G,
    ..] each.
    """
    return tensor.unflatten(dim, (groups, -1)).unbind(dim + 1)


def join_query_groups(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Undo `split_query_groups`."""
    return torch.stack(list(tensors), dim + 1).flatten(dim, dim + 1)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, N, H, D] -> [B, H, N, D], the layout of torch's kernels."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Gradients [B, H, N, D] -> [B, N, H, D]."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
