"""What the launcher of a run's processes (torchrun, or Slurm's srun) tells each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lswt_core.errors import Incompatible

# the first that is set counts
RANK_VARIABLES, LOCAL_RANK_VARIABLES = ("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID")
RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")  # where processes find each other
FIX = "start the processes with torchrun, or have the launcher set it for each of them"


class ProcessRank(NamedTuple):
    """A process among those of its run."""

    rank: int = 0
    size: int = 1
    local: int | None = None  # its number on its machine, if that was told
    local_name: str = LOCAL_RANK_VARIABLES[0]  # the variable that tells it

    def device_number(self, visible: int) -> int:
        """Which of so many visible accelerators is this process's; raises Incompatible where that
        cannot be known.
        """
        if self.size == 1 or visible == 0:
            return self.local or 0
        if visible == 1 and (self.local is None or self.local_name != LOCAL_RANK_VARIABLES[0]):
            # each process is shown a device of its own, as Slurm can; its number counts processes
            return 0
        if self.local is None:
            raise Incompatible(
                f"{self.size} processes and {visible} accelerators, but neither of"
                f" {' and '.join(LOCAL_RANK_VARIABLES)} is set: which of them process {self.rank} shall take is"
                f" not known; {FIX}"
            )
        if self.local >= visible:
            shown = "1 accelerator is" if visible == 1 else f"{visible} accelerators are"
            raise Incompatible(
                f"{self.local_name} = {self.local}, but only {shown} visible: start as many"
                " processes on a machine as it shows"
            )
        return self.local


def read_launcher(environment: Mapping[str, str]) -> ProcessRank:
    """Who this process is by its environment; alone where WORLD_SIZE is not set. Raises
    Incompatible for what is missing or no number.
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
    """A variable that holds a number."""
    try:
        return int(environment[name])
    except ValueError:
        raise Incompatible(f"{name} = {environment[name]!r} is no whole number; {FIX}") from None
