"""Where and in what precision a process computes: accelerator, dtype, compilation, memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._triton import has_triton

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
# Graphs of one function. torch counts a block's over all layers, recipes, shapes and modes of a
# process, and stops at 8 by itself.
MAX_GRAPHS = 1024


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the C library keep what is freed for the next step, or (False) give large blocks back to
    the system as it does by itself, which must then provide and clear every page of every step
    anew: a sixth of a CPU's time. Returns whether the library can be told.
    """
    settings = (
        {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
        if keep
        else {M_MMAP_MAX: 1 << 16, M_TRIM_THRESHOLD: 1 << 17}
    )
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return False
    return all(mallopt(setting, value) for setting, value in settings.items())


def device_name(device: torch.device) -> str:
    """What an accelerator calls itself; "" of anything else."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def device_count() -> int:
    """How many accelerators torch sees."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def pick_device(local: int) -> torch.device:
    """The accelerator torch has, number ``local`` of it, else the CPU."""
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if accelerator is None:
        return torch.device("cpu")
    device = torch.device(accelerator.type, local)
    torch.accelerator.set_device_index(local)
    return device


class Precision(NamedTuple):
    """What a step computes in; parameters and moments are float32 throughout."""

    dtype: torch.dtype
    why: str

    @classmethod
    def choose(cls, wanted: str, device: torch.device) -> Precision:
        """What the recipe asks for; "auto" is bfloat16 where the hardware computes in it."""
        if wanted != "auto":
            return cls(getattr(torch, wanted), "the recipe asks for it")
        if has_bfloat16(device):
            return cls(torch.bfloat16, f"{device.type} computes in it natively")
        return cls(torch.float32, f"this {device.type} has no native bfloat16")

    def autocast(
        self, device: torch.device, remember: bool = True
    ) -> AbstractContextManager[object]:
        """The context a forward pass runs in; it may remember rounded weights to its end."""
        if self.dtype == torch.float32 or device.type == "meta":
            return nullcontext()
        return torch.autocast(device.type, self.dtype, cache_enabled=remember)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


def should_compile(wanted: str, device: torch.device) -> bool:
    """Whether a run's blocks are compiled: by itself on CUDA, where kernels are fused that a CPU
    would gain nothing by.
    """
    return wanted == "blocks" or (wanted == "auto" and device.type == "cuda" and has_triton())


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile modules of one make, in place: shapes are fixed, so that there are two graphs for all
    of them, one for a cold memory and one for a warm one, and nothing of a block is left to Python.
    torch keeps what it has compiled for the next run.
    """
    options = raise_recompile_limit()
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, **options)


def raise_recompile_limit() -> dict[str, int]:
    """Let a function have GRAPHS graphs; returns what ``torch.compile`` must be told besides. A
    newer torch keeps its configuration for each thread, and a block that a backward pass recomputes
    on a GPU is called in another one.
    """
    from torch._dynamo import config  # not with torch itself: it takes time

    config.recompile_limit = config.accumulated_recompile_limit = MAX_GRAPHS
    told = "recompile_limit" in signature(torch.compile).parameters
    return {"recompile_limit": MAX_GRAPHS} if told else {}


def allow_two_backward_passes() -> None:
    """Let compiled blocks keep, after a backward pass, what another one from the same forward pass
    needs; by itself their graphs write over it. To be called before anything is compiled.
    """
    from torch._functorch import config  # not with torch itself: it takes time

    config.donated_buffer = False


def available_memory(device: torch.device) -> int:
    """Bytes this process may still take on the device: for the CPU the machine's free memory, or
    the control group's limit.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [
        available_machine_memory(),
        *(limit for limit in (available_cgroup_memory(),) if limit is not None),
    ]
    return min(limits)


def available_machine_memory() -> int:
    """The machine's available memory in bytes."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: all of it, as nothing portable tells what is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_cgroup_memory() -> int | None:
    """What the control group (a container's limit) leaves, in bytes; None without a limit."""
    try:
        most, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current")
        )
        return None if most == "max" else int(most) - int(used)
    except OSError:
        return None
