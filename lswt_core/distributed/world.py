"""The data-parallel ranks of a run and their collectives."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lswt_core.device import device_count, pick_device
from lswt_core.distributed.launch import read_launcher
from lswt_core.distributed.rank_monitor import RankMonitor, no_advice
from lswt_core.distributed.rendezvous import meet
from lswt_core.errors import Incompatible, LswtError, ResourceError

# of a collective within a step, where one rank may still compile
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# while one rank tokenises or writes a checkpoint; RankMonitor notices one that is lost
BARRIER_TIMEOUT = timedelta(days=7)


class World(NamedTuple):
    """The data-parallel ranks of a run: each has its own rows of the batch, and a piece of the
    model (see ``distributed.sharding``).
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    # all ranks, on the CPU, with BARRIER_TIMEOUT; None: torch's default group
    patient: dist.ProcessGroup | None = None
    # likewise, for checkpoints that are written while training goes on
    saving: dist.ProcessGroup | None = None
    # ranks as (replicas of the model, shards of a replica); None: one process
    mesh: DeviceMesh | None = None
    # watches the other ranks; None: one process, or not connected yet
    monitor: RankMonitor | None = None

    @classmethod
    def read(cls) -> World:
        """The rank of this process, and its device, which is made torch's current one. Raises
        Incompatible if they are not known.
        """
        process = read_launcher(os.environ)
        device = pick_device(process.device_number(device_count()))
        return cls(process.rank, process.size, device)

    @contextmanager
    def connected(self, advice: Callable[[], str] = no_advice) -> Iterator[World]:
        """The same rank, connected with the others, if there are any. Raises RankLost if one does
        not come, or in place of an error that the loss of another rank explains; ``advice`` says
        then what is saved and what to do. The others are told how the block ends.
        """
        if self.size == 1:
            yield self
            return
        monitor, store = meet(self.rank, self.size, os.environ)
        monitor.advice = advice
        try:
            with monitor.naming_lost_ranks():
                monitor.wait_for_all()
                yield self.with_groups(store)._replace(monitor=monitor)
        except BaseException as error:
            monitor.leave(error)
            end_soon(error, monitor.lost_after)
            raise
        monitor.leave(None)
        dist.destroy_process_group()

    def with_groups(self, store: dist.Store) -> World:
        """The same rank, with process groups."""
        dist.init_process_group(
            "gloo" if self.device.type == "cpu" else None,
            store=store,
            timeout=COLLECTIVE_TIMEOUT,
            rank=self.rank,
            world_size=self.size,
        )
        patient, saving = (
            dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT) for _ in range(2)
        )
        return self._replace(patient=patient, saving=saving)

    def naming_lost_ranks(self) -> AbstractContextManager[None]:
        """``RankMonitor.naming_lost_ranks``, where there are other ranks."""
        return nullcontext() if self.monitor is None else self.monitor.naming_lost_ranks()

    def n_shards(self, wanted: int | Literal["all"]) -> int:
        """Over how many ranks a replica of the model is cut, from ``train.shard``. Raises
        ResourceError if that does not divide the number of ranks.
        """
        shards = self.size if wanted == "all" else wanted
        if self.size % shards:
            valid = [n for n in range(1, self.size + 1) if self.size % n == 0]
            raise ResourceError(
                f"train.shard = {wanted} does not divide {self.size} processes; choose"
                f" {', '.join(map(str, valid))} or 'all'"
            )
        return shards

    def with_mesh(self, shard: int | Literal["all"]) -> World:
        """The same ranks, arranged as replicas of shards. Raises ResourceError."""
        shards = self.n_shards(shard)
        if self.size == 1:
            return self
        shape = (self.size // shards, shards)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicas", "shards"))
        return self._replace(mesh=mesh)

    def rows(self, total: int) -> range:
        """The rows of the global batch that this rank has. Raises ResourceError if ranks would
        have unequal numbers of rows.
        """
        if total % self.size:
            raise ResourceError(
                f"train.batch_size = {total} cannot be shared evenly by {self.size} processes;"
                f" choose a multiple of {self.size}"
            )
        return self.share(total)

    def micro_batch_size(self, total: int, wanted: int | None) -> int:
        """Rows per forward pass: ``wanted``, or all of this rank's. Raises ResourceError if that
        does not divide them.
        """
        own = len(self.rows(total))
        if wanted is not None and wanted < own and own % wanted:
            raise ResourceError(
                f"train.micro_batch_size = {wanted} does not divide the {own} rows that each of"
                f" {self.size} processes has of train.batch_size = {total}; choose a divisor of"
                f" {own}"
            )
        return min(wanted or own, own)

    def share(self, total: int) -> range:
        """The rows out of ``total`` that are this rank's share, as even as possible; empty where
        there are more ranks than rows.
        """
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce a tensor to its sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def in_background(self) -> World:
        """The same ranks, for a thread beside that of training: collectives of two threads must not
        meet.
        """
        return self._replace(patient=self.saving)

    def gather_texts(self, text: str) -> list[str]:
        """All-gather a string: those of all ranks, by rank."""
        if self.size == 1:
            return [text]
        own = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self.patient)
        longest = max(map(int, sizes))
        padded = nn.functional.pad(own, (0, longest - len(own)))
        gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self.patient)
        return [
            bytes(text_bytes[:size].tolist()).decode()
            for text_bytes, size in zip(gathered, map(int, sizes), strict=True)
        ]

    def wait(self) -> None:
        """Barrier over all ranks, however long one of them tokenises or writes a checkpoint."""
        if self.size > 1:
            dist.barrier(group=self.patient)


def spaced_rows(fraction: float, total: int) -> list[int]:
    """Indices of a fraction of a global batch's rows, evenly spaced so that ranks share the work.
    Raises Incompatible if it rounds to no row.
    """
    count = round(fraction * total)
    if not 1 <= count <= total:
        raise Incompatible(
            f"optimizer.fraction = {fraction:g} of {total} rows is {count} rows: "
            f"choose a fraction from {1 / total:g} to 1, or more train.batch_size"
        )
    return [i * total // count for i in range(count)]


def end_soon(error: BaseException, seconds: float) -> None:
    """Let this process end by itself and say why, undisturbed by torchrun, which tells all ranks to
    end once one has; but end it if it still stands after so many seconds, as where a communicator
    waits for ranks that are lost.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = getattr(error, "exit_code", LswtError.exit_code)
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
