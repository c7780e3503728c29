"""torch's fused attention kernels, as far as they tell the logarithms of their sums."""

from __future__ import annotations

import torch
from torch import Tensor

from lswt_core.interfaces import AttentionRequirements
from lswt_core.plugin_api.attention import softmax_scale
from lswt_core.plugin_api.attention_merge import Gradients, Kernel, first_verified

aten = torch.ops.aten
ALIGNED = 32  # the memory-efficient kernel keeps so many sums together
HOPPER = 9  # compute capability from which on cuDNN's kernel is the faster one


class OnCpu(Kernel):
    """The flash kernel for CPUs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, total = aten._scaled_dot_product_flash_attention_for_cpu(
            *swapped(q, k, v), is_causal=causal
        )
        return out.transpose(1, 2), total

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        total: Tensor,
        causal: bool,
    ) -> Gradients:
        """See Kernel."""
        given = swapped(grad, q, k, v, out)
        return back(
            *aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, total, 0.0, causal)
        )


class TorchFlash(Kernel):
    """FlashAttention 2, as it comes with torch: half precision on CUDA."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, total, *_ = aten._scaled_dot_product_flash_attention(
            *swapped(q, k, v), 0.0, causal, False, scale=softmax_scale(q)
        )
        return out.transpose(1, 2), total

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        total: Tensor,
        causal: bool,
    ) -> Gradients:
        """See Kernel. What its random numbers came from matters for dropout alone."""
        seed, offset = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
        lengths = (None, None, q.shape[1], k.shape[1])
        given = (*swapped(grad, q, k, v, out), total, *lengths, 0.0, causal, seed, offset)
        return back(
            *aten._scaled_dot_product_flash_attention_backward(*given, scale=softmax_scale(q))
        )


class Cudnn(Kernel):
    """NVIDIA's cuDNN: half precision on CUDA, the faster one from Hopper on."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, total, *_ = aten._scaled_dot_product_cudnn_attention(
            *swapped(q, k, v), None, True, 0.0, causal, False, scale=softmax_scale(q)
        )
        return out.transpose(1, 2), total.squeeze(-1) if total.ndim == 4 else total

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        total: Tensor,
        causal: bool,
    ) -> Gradients:
        """See Kernel."""
        seed, offset = (q.new_empty((), dtype=torch.int64) for _ in range(2))
        lengths = (None, None, q.shape[1], k.shape[1])
        given = (
            *swapped(grad, q, k, v, out),
            total[..., None].contiguous(),
            seed,
            offset,
            None,
            *lengths,
            0.0,
            causal,
        )
        return back(
            *aten._scaled_dot_product_cudnn_attention_backward(*given, scale=softmax_scale(q))
        )


class MemoryEfficient(Kernel):
    """xFormers' memory-efficient attention, as it comes with torch: any precision on CUDA."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, total, *_ = aten._scaled_dot_product_efficient_attention(
            *swapped(q, k, v), None, True, 0.0, causal, scale=softmax_scale(q)
        )
        return out.transpose(1, 2), total[..., : q.shape[1]]

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        total: Tensor,
        causal: bool,
    ) -> Gradients:
        """See Kernel."""
        # exp(score - inf) is nothing
        total = torch.nn.functional.pad(total, (0, -q.shape[1] % ALIGNED), value=torch.inf)
        seed, offset = (q.new_empty((), dtype=torch.int64) for _ in range(2))
        grad, q_, k_, v_, out = swapped(grad, q, k, v, out)
        given = (
            grad,
            q_,
            k_,
            v_,
            None,
            out,
            total,
            seed,
            offset,
            0.0,
            [True, True, True, False],
            causal,
        )
        return back(
            *aten._scaled_dot_product_efficient_attention_backward(*given, scale=softmax_scale(q))[
                :3
            ]
        )


KERNELS: dict[str, Kernel] = {
    "cpu": OnCpu(),
    "cudnn": Cudnn(),
    "flash": TorchFlash(),
    "memory-efficient": MemoryEfficient(),
}
# what was tried is not tried again
tried_before: dict[tuple[str, torch.dtype, int], tuple[str, list[str]]] = {}


def kernel_name(device: str, dtype: torch.dtype, d_head: int) -> str:
    """Which of KERNELS runs parts one by one on a device; "": none does."""
    return tried(AttentionRequirements(device, dtype, d_head))[0]


def tried(need: AttentionRequirements) -> tuple[str, list[str]]:
    """The same, and what is wrong with those that would be faster."""
    if need.device in ("cpu", "meta"):  # meta: planning, nothing is computed
        return "cpu", []
    if need.device != "cuda":
        return "", [f"no kernel for {need.device} tells the logarithms of its sums"]
    key = (need.device, need.dtype, need.d_head)
    if key not in tried_before:
        name, faults = first_verified(
            {name: KERNELS[name] for name in candidates(need.dtype)}, need
        )
        tried_before[key] = (name or "", faults)
    return tried_before[key]


def candidates(dtype: torch.dtype) -> list[str]:
    """Kernels for a GPU, the fastest first."""
    if dtype not in (torch.float16, torch.bfloat16):
        return ["memory-efficient"]
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= HOPPER
    return (
        ["cudnn", "flash", "memory-efficient"] if hopper else ["flash", "cudnn", "memory-efficient"]
    )


def swapped(*tensors: Tensor) -> list[Tensor]:
    """[B, N, H, D] -> [B, H, N, D], as torch's kernels want it."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def back(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Gradients [B, H, N, D] -> [B, N, H, D]."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
