"""Which of torch's fused attention kernels runs."""

from __future__ import annotations

import torch

from lswt_core.interfaces import AttentionRequirements
from lswt_core.plugin_api.attention_merge import Kernel, first_verified
from lswt_core.plugin_api.query_gradient import WITH_TRITON, QueryGradient
from lswt_core.plugin_api.short_blocks import ShortBlocks
from lswt_sdpa.kernels import CpuFlash, Cudnn, EachQueryOfGroup, MemoryEfficient, TorchFlash

HOPPER = 9  # CUDA compute capability from which cuDNN's kernel is faster than flash
CUDA_KERNELS: dict[str, Kernel] = {
    "cudnn": Cudnn(),
    "flash": TorchFlash(),
    "memory-efficient": EachQueryOfGroup(MemoryEfficient()),
}
KERNELS: dict[str, Kernel] = {
    "cpu": CpuFlash(),
    **{name: ShortBlocks(kernel) for name, kernel in CUDA_KERNELS.items()},
    **{
        f"{name} {WITH_TRITON}": ShortBlocks(QueryGradient(kernel))
        for name, kernel in CUDA_KERNELS.items()
    },
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
        names = ["cpu"] if need.device == "cpu" else cuda_kernels(need.dtype, wanted)
        verified = first_verified({name: KERNELS[name] for name in names}, need)
        selected[key] = (verified[0] or "", verified[1])
    return selected[key]


def cuda_kernels(dtype: torch.dtype, wanted: str) -> list[str]:
    """Of KERNELS those for CUDA, or those of the ``wanted`` one, the fastest first: each with
    Triton's gradient of queries alone, then without.
    """
    names = fused_kernels(dtype) if wanted == ANY else [wanted]
    return [choice for name in names for choice in (f"{name} {WITH_TRITON}", name)]


def fused_kernels(dtype: torch.dtype) -> list[str]:
    """CUDA_KERNELS that compute in a dtype, the fastest first."""
    if dtype not in (torch.float16, torch.bfloat16):
        return ["memory-efficient"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= HOPPER:
        return ["cudnn", "flash", "memory-efficient"]
    return ["flash", "cudnn", "memory-efficient"]
