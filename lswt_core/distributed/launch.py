"""Rank and world size from the environment that a launcher (torchrun, or Slurm's srun) sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lswt_core.errors import Incompatible

# the first one that is set is used
RANK_VARIABLES, LOCAL_RANK_VARIABLES = ("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID")
RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
FIX = "start the processes with torchrun, or have the launcher set it for each of them"


class ProcessRank(NamedTuple):
    """A process's rank in its run."""

    rank: int = 0
    size: int = 1
    local: int | None = None  # its rank on its machine; None: not set
    local_name: str = LOCAL_RANK_VARIABLES[0]  # the variable that sets it

    def device_number(self, visible: int) -> int:
        """The index of this process's accelerator among the visible ones; raises Incompatible if
        it is not known.
        """
        if self.size == 1 or visible == 0:
            return self.local or 0
        if visible == 1 and (self.local is None or self.local_name != LOCAL_RANK_VARIABLES[0]):
            # Slurm can show each process one device of its own; SLURM_LOCALID counts processes
            return 0
        if self.local is None:
            raise Incompatible(
                f"{self.size} processes and {visible} accelerators, but neither of"
                f" {' and '.join(LOCAL_RANK_VARIABLES)} is set: the accelerator of rank"
                f" {self.rank} is not known; {FIX}"
            )
        if self.local >= visible:
            shown = "1 accelerator is" if visible == 1 else f"{visible} accelerators are"
            raise Incompatible(
                f"{self.local_name} = {self.local}, but only {shown} visible: start as many"
                " processes on a machine as it shows"
            )
        return self.local


def read_launcher(environment: Mapping[str, str]) -> ProcessRank:
    """Read this process's rank from the environment; a single process where WORLD_SIZE is not set.
    Raises Incompatible for a variable that is missing or not an integer.
    """
    size = read_integer(environment, "WORLD_SIZE") if "WORLD_SIZE" in environment else 1
    local_name = next(
        (name for name in LOCAL_RANK_VARIABLES if name in environment), LOCAL_RANK_VARIABLES[0]
    )
    local = read_integer(environment, local_name) if local_name in environment else None
    if size == 1:
        return ProcessRank(local=local if local_name == LOCAL_RANK_VARIABLES[0] else None)
    rank_name = next((name for name in RANK_VARIABLES if name in environment), None)
    for name in (rank_name or RANK_VARIABLES[0], *RENDEZVOUS_VARIABLES):
        if name not in environment:
            raise Incompatible(f"WORLD_SIZE = {size}, but {name} is not set; {FIX}")
    rank = read_integer(environment, str(rank_name))
    if not 0 <= rank < size:
        raise Incompatible(f"{rank_name} = {rank} is no process of WORLD_SIZE = {size}; {FIX}")
    return ProcessRank(rank, size, local, local_name)


def read_integer(environment: Mapping[str, str], name: str) -> int:
    """Read an integer variable."""
    try:
        return int(environment[name])
    except ValueError:
        raise Incompatible(f"{name} = {environment[name]!r} is no whole number; {FIX}") from None
