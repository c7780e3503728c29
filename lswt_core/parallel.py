"""Where and in what precision a run computes: device, processes, numbers."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._triton import has_triton

from lswt_core.errors import Incompatible, ResourceError
from lswt_core.launch import launched

EXCHANGE = timedelta(minutes=30)  # at most between two processes within a step, where one of them may still compile
LONG_WAIT = timedelta(days=7)  # at most while one process prepares a text or writes a checkpoint; one that dies is noticed at once
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
# Graphs of one function. torch counts a block's over all layers, recipes, shapes and modes of a process, and stops at 8 by itself.
GRAPHS = 1024


class World(NamedTuple):
    """The processes of a run (torchrun), each with the same model and its own rows."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    patient: dist.ProcessGroup | None = None  # all processes, on the CPU, waiting for each other for LONG_WAIT; None: torch's own

    @classmethod
    def join(cls) -> World:
        """Find this process's device, and its peers if it was launched with some."""
        process = launched(os.environ)
        device = pick_device(process.device_number(visible_devices()))
        torch.set_flush_denormal(True)  # numbers below 1e-38 are no information, and halve a CPU's speed
        keep_freed_memory()
        if process.size == 1:
            return cls(device=device)
        if not dist.is_initialized():
            backend = "gloo" if device.type == "cpu" else None
            dist.init_process_group(backend, timeout=EXCHANGE, rank=process.rank, world_size=process.size)
        return cls(process.rank, process.size, device, dist.new_group(backend="gloo", timeout=LONG_WAIT))

    def leave(self) -> None:
        """Part from the peers."""
        if self.size > 1:
            dist.destroy_process_group()

    def rows(self, total: int) -> range:
        """The rows of the global batch that this process owns."""
        if total % self.size:
            raise ResourceError(f"train.rows = {total} cannot be shared evenly by {self.size} processes; choose a multiple")
        return self.share(total)

    def micro_rows(self, total: int, wanted: int | None) -> int:
        """Rows of the global batch that this process runs at a time: ``wanted``, or all it owns."""
        own = len(self.rows(total))
        if wanted is not None and wanted < own and own % wanted:
            raise ResourceError(
                f"train.micro_rows = {wanted} does not divide the {own} rows that each of {self.size} processes has of "
                f"train.rows = {total}; choose a divisor of {own}"
            )
        return min(wanted or own, own)

    def share(self, total: int) -> range:
        """What of some rows is this process's, as even as it can be; nothing where there are more processes than rows."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

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

    def gather_texts(self, text: str) -> list[str]:
        """What every process says, by rank."""
        if self.size == 1:
            return [text]
        own = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self.patient)
        longest = max(map(int, sizes))
        everyone = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(everyone, nn.functional.pad(own, (0, longest - len(own))), group=self.patient)
        return [bytes(raw[:size].tolist()).decode() for raw, size in zip(everyone, map(int, sizes), strict=True)]

    def wait(self) -> None:
        """Go on when all processes are here, however long one of them prepares a text or writes a checkpoint."""
        if self.size > 1:
            dist.barrier(group=self.patient)


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


def device_name(device: torch.device) -> str:
    """What an accelerator calls itself; "" of anything else."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def visible_devices() -> int:
    """How many accelerators torch sees."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


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
