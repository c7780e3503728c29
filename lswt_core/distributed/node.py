"""The ranks of a run that are on one machine: what its first rank reads, the others are given."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lswt_core.distributed.world import BARRIER_TIMEOUT, World
from lswt_core.errors import DataError


class Node(NamedTuple):
    """The ranks on this rank's machine, and a process group of them on the CPU, for one thread."""

    rank: int
    ranks: tuple[int, ...]
    group: Any  # a ProcessGroup

    @classmethod
    def find(cls, world: World) -> Node:
        """The machine of this rank, known by its name; all ranks call this. A collective may take
        as long as reading takes: RankMonitor notices a rank that is lost.
        """
        hosts = world.gather_texts(socket.gethostname())
        own: Node | None = None
        for host in dict.fromkeys(hosts):
            ranks = tuple(rank for rank, name in enumerate(hosts) if name == host)
            # every rank takes part in making every group
            group = dist.new_group(list(ranks), timeout=BARRIER_TIMEOUT, backend="gloo")
            if world.rank in ranks:
                own = cls(world.rank, ranks, group)
        assert own is not None
        return own

    @property
    def leader(self) -> int:
        """The first rank of the machine."""
        return self.ranks[0]

    @property
    def is_leader(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.rank == self.leader

    def deal(self, read: Callable[[], Sequence[Tensor]], like: Tensor) -> Tensor:
        """What the leader reads for this rank: of ``read()``, which the leader alone calls, one
        contiguous tensor a rank of the machine, all of the shape and dtype of ``like``. A DataError
        is raised by all; another error of the leader ends its process, which the others notice.
        """
        parts: list[Tensor] = []
        fault = ""
        if self.is_leader:
            try:
                parts = list(read())
            except DataError as error:
                fault = str(error)
        fault = self.share_text(fault)
        if fault:
            raise DataError(fault)
        own = torch.empty_like(like)
        dist.scatter(own, parts if self.is_leader else None, src=self.leader, group=self.group)
        return own

    def share_text(self, text: str) -> str:
        """The leader's text."""
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        dist.broadcast(size, src=self.leader, group=self.group)
        if not int(size):
            return ""
        if not self.is_leader:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, src=self.leader, group=self.group)
        return bytes(content.tolist()).decode()
