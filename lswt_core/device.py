"""A process's device: accelerator, dtype, compilation, memory, and process-wide settings."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from lswt_core.plugin_api.compilation import raise_recompile_limit

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def configure_process() -> None:
    """Make the process-wide settings of training, evaluation and benchmarks: flush denormals to
    zero (numbers below 1e-38 carry no information and halve a CPU's speed), keep freed memory,
    leave libraries out of garbage collections.
    """
    torch.set_flush_denormal(True)
    keep_freed_memory()
    freeze_imports()


@cache
def freeze_imports() -> None:
    """Leave what this process has imported so far out of collections of reference cycles: it lives
    to the end, and going through it again and again takes a sixth of the time of a run of a few
    steps. Once a process, since what is a cycle by then is never collected.
    """
    gc.freeze()


def keep_freed_memory(keep: bool = True) -> bool:
    """Let glibc's malloc keep freed memory for the next step. Otherwise (False, its default) it
    returns large blocks to the system, which must provide and clear their pages anew in every
    step: a sixth of a CPU's time. Returns whether malloc can be configured.
    """
    settings = {M_MMAP_MAX: 1 << 16, M_TRIM_THRESHOLD: 1 << 17}
    if keep:
        settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return all(mallopt(setting, value) for setting, value in settings.items())


def device_name(device: torch.device) -> str:
    """The name of a CUDA device, e.g. "NVIDIA H100 PCIe"; "" for any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def device_count() -> int:
    """The number of accelerators that torch sees."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def pick_device(local: int) -> torch.device:
    """Select accelerator number ``local`` as torch's current one; the CPU if there is none."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    device = torch.device(accelerator.type, local)
    torch.accelerator.set_device_index(local)
    return device


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device without waiting for what the device has yet to do:
    to a GPU from pinned memory. A plain ``to`` waits.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Precision(NamedTuple):
    """Mixed precision: the dtype that a step computes in, by autocast; parameters and moments are
    always float32.
    """

    dtype: torch.dtype
    why: str

    @classmethod
    def choose(cls, name: str, device: torch.device) -> Precision:
        """Resolve ``train.precision``; "auto" is bfloat16 if the hardware has it natively."""
        if name != "auto":
            return cls(getattr(torch, name), "the recipe asks for it")
        if has_bfloat16(device):
            return cls(torch.bfloat16, f"{device.type} computes in it natively")
        return cls(torch.float32, f"this {device.type} has no native bfloat16")

    def autocast(
        self, device: torch.device, cache_weights: bool = True
    ) -> AbstractContextManager[object]:
        """The autocast context of a forward pass; it may cache cast weights until it ends."""
        if not self.casts(device):
            return nullcontext()
        return torch.autocast(device.type, self.dtype, cache_enabled=cache_weights)

    @contextmanager
    def shared_casts(self, device: torch.device) -> Iterator[None]:
        """Within it, forward passes under ``autocast`` cast a weight once for all of them; it is
        itself no autocast, and no weight may change. (Compiled blocks cast within their graphs.)
        """
        if not self.casts(device):
            yield
            return
        # a cache of cast weights is dropped at the end of the outermost autocast context
        with self.autocast(device), torch.autocast(device.type, enabled=False):
            yield

    def casts(self, device: torch.device) -> bool:
        """Whether ``autocast`` casts anything."""
        return self.dtype != torch.float32 and device.type != "meta"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        features: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


def should_compile(mode: str, device: torch.device) -> bool:
    """Whether to compile a run's blocks; "auto" does so on CUDA, where fused kernels pay."""
    return mode == "blocks" or (mode == "auto" and device.type == "cuda" and has_triton())


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """torch.compile a decoder's blocks in place, with static shapes and without graph breaks: equal
    blocks share two graphs, one for empty memories and one for later segments.
    """
    options = raise_recompile_limit()
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, **options)


def allow_two_backward_passes() -> None:
    """Let a compiled block's forward pass be differentiated twice; by default the backward graph
    reuses the saved activations' memory. Call before anything is compiled.
    """
    from torch._functorch import config  # slow to import

    config.donated_buffer = False


def available_memory(device: torch.device) -> int:
    """Bytes this process may still allocate on the device; for the CPU the lesser of the machine's
    available memory and the cgroup's.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine, cgroup = available_machine_memory(), available_cgroup_memory()
    return machine if cgroup is None else min(machine, cgroup)


def available_machine_memory() -> int:
    """The machine's available memory in bytes."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: total memory, for lack of a portable way
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_cgroup_memory() -> int | None:
    """Bytes left below the cgroup's (a container's) memory limit; None without one."""
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = (cgroup / "memory.current").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used)
