"""torch's fused attention kernels that return the logsumexp of the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from lswt_core.interfaces import AttentionRequirements
from lswt_core.plugin_api.attention import softmax_scale
from lswt_core.plugin_api.attention_merge import Gradients, Kernel, first_verified

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
    "cudnn": Cudnn(),
    "flash": TorchFlash(),
    "memory-efficient": MemoryEfficient(),
}
# The kernel selected for a device, dtype and head width, and what is wrong with faster ones.
selected: dict[tuple[str, torch.dtype, int], tuple[str, list[str]]] = {}


def kernel_name(device: str, dtype: torch.dtype, d_head: int) -> str:
    """Which of KERNELS runs blocks one by one on a device; "": none."""
    return select_kernel(AttentionRequirements(device, dtype, d_head))[0]


def select_kernel(need: AttentionRequirements) -> tuple[str, list[str]]:
    """The fastest kernel that passes its test on the device, "" if none does, and what is wrong
    with those that would be faster.
    """
    if need.device in ("cpu", "meta"):  # meta: memory estimates, nothing is computed
        return "cpu", []
    if need.device != "cuda":
        return "", [f"no kernel for {need.device} returns the logsumexp of the scores"]
    key = (need.device, need.dtype, need.d_head)
    if key not in selected:
        candidates = {name: KERNELS[name] for name in cuda_kernels(need.dtype)}
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


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, N, H, D] -> [B, H, N, D], the layout of torch's kernels."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Gradients [B, H, N, D] -> [B, N, H, D]."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
