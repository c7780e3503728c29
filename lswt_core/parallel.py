"""Where and in what precision a run computes: device, processes, numbers. The only core module that reads torchrun's variables."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._triton import has_triton

from lswt_core.errors import Incompatible, ResourceError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
# Graphs of one function. torch counts a block's over all layers, recipes, shapes and modes of a process, and stops at 8 by itself.
GRAPHS = 1024


class World(NamedTuple):
    """The processes of a run (torchrun), each with the same model and its own rows."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def join(cls) -> World:
        """Find this process's device, and its peers if torchrun started it."""
        size, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
        device = pick_device(local)
        torch.set_flush_denormal(True)  # numbers below 1e-38 are no information, and halve a CPU's speed
        keep_freed_memory()
        if size > 1 and not dist.is_initialized():
            dist.init_process_group(backend="gloo" if device.type == "cpu" else None)
        return cls(rank, size, device)

    def leave(self) -> None:
        """Part from the peers."""
        if self.size > 1:
            dist.destroy_process_group()

    def rows(self, total: int) -> range:
        """The rows of the global batch that this process owns."""
        if total % self.size:
            raise ResourceError(f"train.rows = {total} cannot be shared evenly by {self.size} processes; choose a multiple")
        share = total // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up every parameter's gradient over all processes: losses are shares, so their sum is the whole."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """All processes' rows, in global order (dimension 0)."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        everyone = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(everyone, tensor)
        return torch.cat(everyone)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            dist.barrier()


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the C library keep what is freed for the next step, or (False) give large blocks back to the system as it does by itself,
    which must then provide and clear every page of every step anew: a sixth of a CPU's time. Returns whether the library can be told.
    """
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1} if keep else {M_MMAP_MAX: 1 << 16, M_TRIM_THRESHOLD: 1 << 17}
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return False
    return all(mallopt(setting, value) for setting, value in settings.items())


def spread_rows(fraction: float, total: int) -> list[int]:
    """A share of the rows of a global batch, rounded to whole rows and spread evenly, so that processes share the work."""
    count = round(fraction * total)
    if not 1 <= count <= total:
        raise Incompatible(
            f"optimizer.fraction = {fraction:g} of {total} rows is {count} rows: "
            f"choose a fraction from {1 / total:g} to 1, or more train.rows"
        )
    return [i * total // count for i in range(count)]


def pick_device(local: int) -> torch.device:
    """The accelerator torch has, number ``local`` of it, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
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

    def autocast(self, device: torch.device, remember: bool = True) -> AbstractContextManager[object]:
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


def compiles(wanted: str, device: torch.device) -> bool:
    """Whether a run's blocks are compiled: by itself on CUDA, where kernels are fused that a CPU would gain nothing by."""
    return wanted == "blocks" or (wanted == "auto" and device.type == "cuda" and has_triton())


def compile_each(blocks: Iterable[nn.Module]) -> None:
    """Compile modules of one make, in place: shapes are fixed, so that there are two graphs for all of them, one for a cold memory and
    one for a warm one, and nothing of a block is left to Python. torch keeps what it has compiled for the next run.
    """
    options = allow_graphs()
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, **options)


def allow_graphs() -> dict[str, int]:
    """Let a function have GRAPHS graphs; returns what ``torch.compile`` must be told besides. A newer torch keeps its configuration
    for each thread, and a block that a backward pass recomputes on a GPU is called in another one.
    """
    from torch._dynamo import config  # not with torch itself: it takes time

    config.recompile_limit = config.accumulated_recompile_limit = GRAPHS
    told = "recompile_limit" in signature(torch.compile).parameters
    return {"recompile_limit": GRAPHS} if told else {}


def allow_two_backward_passes() -> None:
    """Let compiled blocks keep, after a backward pass, what another one from the same forward pass needs; by itself their graphs write
    over it. To be called before anything is compiled.
    """
    from torch._functorch import config  # not with torch itself: it takes time

    config.donated_buffer = False


def available_memory(device: torch.device) -> int:
    """Bytes this process may still take on the device: for the CPU the machine's free memory, or the control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [available_of_machine(), *(limit for limit in (available_of_group(),) if limit is not None)]
    return min(limits)


def available_of_machine() -> int:
    """The machine's available memory in bytes."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: all of it, as nothing portable tells what is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_of_group() -> int | None:
    """What the control group (a container's limit) leaves, in bytes; None without a limit."""
    try:
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return None if most == "max" else int(most) - int(used)
    except OSError:
        return None
