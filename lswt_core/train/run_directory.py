"""The run directory, which all ranks hold together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lswt_core.checkpoint import RunLock, Store
from lswt_core.distributed.world import World
from lswt_core.errors import BusyError
from lswt_core.plugin_api.atomic_write import make_output_directory


@contextmanager
def hold_directory(directory: Path, world: World) -> Iterator[None]:
    """Make and lock the run directory; rank 0 holds the lock for all. Raises BusyError, on every
    rank, if another run holds it.
    """
    make_output_directory(directory, "--out")
    with ExitStack() as held:
        refusal = ""
        if world.rank == 0:
            try:
                held.enter_context(RunLock(directory))
            except BusyError as error:
                refusal = str(error)
        refusal = world.gather_texts(refusal)[0]
        if refusal:
            raise BusyError(refusal)
        yield


def describe_saved(store: Store, command: str) -> str:
    """What a run that ends now has saved, and how it is resumed."""
    steps = store.steps()
    if not steps:
        return f"no step is saved yet, and the same command starts again: {command}"
    return f"step {max(steps):,} is saved, and the same command resumes: {command}"
