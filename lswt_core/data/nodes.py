"""How many machines a run is on."""

from __future__ import annotations

from collections.abc import Mapping


def count_nodes(environment: Mapping[str, str]) -> int:
    """The number of machines that a launcher (torchrun, srun) says it started processes on; 1 if it
    says nothing.
    """
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NNODES")
    size, local, nodes = (int_or_none(environment.get(name)) for name in names)
    if size is None or size < 2:
        return 1
    if local:
        return -(-size // local)
    return nodes or 1


def int_or_none(text: str | None) -> int | None:
    """A whole number; None if it is none."""
    return int(text) if text is not None and text.isdigit() else None
