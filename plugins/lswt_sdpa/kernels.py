"""torch's fused attention kernels that return the logsumexp of the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.interfaces import AttentionRequirements
from lswt_core.plugin_api.attention import softmax_scale
from lswt_core.plugin_api.attention_merge import Gradients, Kernel, first_verified
from lswt_core.plugin_api.short_blocks import ShortBlocks

aten = torch.ops.aten
LOGSUMEXP_ALIGNMENT = 32  # the memory-efficient kernel pads its logsumexps to a multiple
HOPPER = 9  # CUDA compute capability from which cuDNN's kernel is faster than flash


class CpuFlash(Kernel):
    """torch's flash kernel for CPUs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first(q, k, v), is_causal=causal
        )
        return out.transpose(1, 2), logsumexp

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        causal: bool,
    ) -> Gradients:
        """See Kernel."""
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

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        causal: bool,
    ) -> Gradients:
        """See Kernel. Seed and offset matter for dropout alone."""
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

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        causal: bool,
    ) -> Gradients:
        """See Kernel."""
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

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        causal: bool,
    ) -> Gradients:
        """See Kernel."""
        groups = k.shape[2]
        if q.shape[2] == groups:
            return self.kernel.backward(grad, q, k, v, out, logsumexp, causal)
        parts = zip(
            split_query_groups(grad, groups, 2),
            split_query_groups(q, groups, 2),
            split_query_groups(out, groups, 2),
            split_query_groups(logsumexp, groups, 1),
            strict=True,
        )
        calls = [
            self.kernel.backward(d, query, k, v, o, total.contiguous(), causal)
            for d, query, o, total in parts
        ]
        dk, dv = (torch.stack([call[i] for call in calls]).sum(0) for i in (1, 2))
        return join_query_groups([call[0] for call in calls], 2), dk, dv


class MemoryEfficient(Kernel):
    """torch's build of xFormers' memory-efficient attention: any dtype on CUDA."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, logsumexp, *_ = aten._scaled_dot_product_efficient_attention(
            *heads_first(q, k, v), None, True, 0.0, causal, scale=softmax_scale(q)
        )
        return out.transpose(1, 2), logsumexp[..., : q.shape[1]]

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        causal: bool,
    ) -> Gradients:
        """See Kernel."""
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


KERNELS: dict[str, Kernel] = {
    "cpu": CpuFlash(),
    "cudnn": ShortBlocks(Cudnn()),
    "flash": ShortBlocks(TorchFlash()),
    "memory-efficient": ShortBlocks(EachQueryOfGroup(MemoryEfficient())),
}
ANY = "auto"  # the fastest kernel
# The kernel selected for a device, dtype, head width, size of a group of query heads and the kernel
# that is wanted, and what is wrong with faster ones.
selected: dict[tuple[str, torch.dtype, int, int, str], tuple[str, list[str]]] = {}


def kernel_name(
    device: str, dtype: torch.dtype, d_head: int, queries_per_kv: int = 1, wanted: str = ANY
) -> str:
    """Which of KERNELS runs blocks one by one on a device; "": none."""
    need = AttentionRequirements(device, dtype, d_head, queries_per_kv=queries_per_kv)
    return select_kernel(need, wanted)[0]


def select_kernel(need: AttentionRequirements, wanted: str = ANY) -> tuple[str, list[str]]:
    """The fastest kernel, or the one that is ``wanted``, that passes its test on the device, "" if
    none does, and what is wrong with those that would be faster.
    """
    if wanted != ANY and need.device not in ("cuda", "meta"):
        return "", [f"it runs on CUDA devices, not on {need.device}"]
    # on the meta device (memory estimates) nothing is computed; not every torch's CPU kernel has
    # grouped heads
    if need.device == "meta" or (need.device == "cpu" and need.queries_per_kv == 1):
        return "cpu", []
    if need.device not in ("cpu", "cuda"):
        return "", [f"no kernel for {need.device} returns the logsumexp of the scores"]
    key = (need.device, need.dtype, need.d_head, need.queries_per_kv, wanted)
    if key not in selected:
        names = ["cpu"] if need.device == "cpu" else cuda_kernels(need.dtype)
        names = names if wanted == ANY else [wanted]
        candidates = {name: KERNELS[name] for name in names}
        verified = first_verified(candidates, need)
        selected[key] = (verified[0] or "", verified[1])
    return selected[key]


def cuda_kernels(dtype: torch.dtype) -> list[str]:
    """Kernels for CUDA, the fastest first."""
    if dtype not in (torch.float16, torch.bfloat16):
        return ["memory-efficient"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= HOPPER:
        return ["cudnn", "flash", "memory-efficient"]
    return ["flash", "cudnn", "memory-efficient"]


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
