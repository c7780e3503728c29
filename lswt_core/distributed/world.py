"""The processes of a run (torchrun) and their collectives. The only core module that reads
torchrun's variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lswt_core.device import device_count, keep_freed_memory, pick_device
from lswt_core.distributed.launch import read_launcher
from lswt_core.errors import Incompatible, ResourceError

# at most between two processes within a step, where one of them may still compile
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# at most while one process prepares a text or writes a checkpoint; one that dies is noticed at once
BARRIER_TIMEOUT = timedelta(days=7)


class World(NamedTuple):
    """The processes of a run (torchrun), each with the same model and its own rows."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    # all processes, on the CPU, waiting for each other for LONG_WAIT; None: torch's own
    patient: dist.ProcessGroup | None = None

    @classmethod
    def join(cls) -> World:
        """Find this process's device, and its peers if it was launched with some."""
        process = read_launcher(os.environ)
        device = pick_device(process.device_number(device_count()))
        # numbers below 1e-38 are no information, and halve a CPU's speed
        torch.set_flush_denormal(True)
        keep_freed_memory()
        if process.size == 1:
            return cls(device=device)
        if not dist.is_initialized():
            backend = "gloo" if device.type == "cpu" else None
            dist.init_process_group(
                backend, timeout=COLLECTIVE_TIMEOUT, rank=process.rank, world_size=process.size
            )
        return cls(
            process.rank,
            process.size,
            device,
            dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT),
        )

    def leave(self) -> None:
        """Part from the peers."""
        if self.size > 1:
            dist.destroy_process_group()

    def rows(self, total: int) -> range:
        """The rows of the global batch that this process owns."""
        if total % self.size:
            raise ResourceError(
                f"train.batch_size = {total} cannot be shared evenly by {self.size} processes;"
                " choose a multiple"
            )
        return self.share(total)

    def micro_batch_size(self, total: int, wanted: int | None) -> int:
        """Rows of the global batch that this process runs at a time: ``wanted``, or all it owns."""
        own = len(self.rows(total))
        if wanted is not None and wanted < own and own % wanted:
            raise ResourceError(
                f"train.micro_batch_size = {wanted} does not divide the {own} rows that each of"
                f" {self.size} processes has of train.batch_size = {total}; choose a divisor of"
                f" {own}"
            )
        return min(wanted or own, own)

    def share(self, total: int) -> range:
        """What of some rows is this process's, as even as it can be; nothing where there are more
        processes than rows.
        """
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return (
            flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag), device=self.device)))
        )

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up every parameter's gradient over all processes: losses are shares, so their sum is
        the whole.
        """
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
        dist.all_gather(
            everyone, nn.functional.pad(own, (0, longest - len(own))), group=self.patient
        )
        return [
            bytes(raw[:size].tolist()).decode()
            for raw, size in zip(everyone, map(int, sizes), strict=True)
        ]

    def wait(self) -> None:
        """Go on when all processes are here, however long one of them prepares a text or writes a
        checkpoint.
        """
        if self.size > 1:
            dist.barrier(group=self.patient)


def spaced_rows(fraction: float, total: int) -> list[int]:
    """A share of the rows of a global batch, rounded to whole rows and spread evenly, so that
    processes share the work.
    """
    count = round(fraction * total)
    if not 1 <= count <= total:
        raise Incompatible(
            f"optimizer.fraction = {fraction:g} of {total} rows is {count} rows: "
            f"choose a fraction from {1 / total:g} to 1, or more train.batch_size"
        )
    return [i * total // count for i in range(count)]
