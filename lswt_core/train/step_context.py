"""What all steps of a run share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.model.train_module import TrainModule
from lswt_core.train.memory_placement import DeviceMemory, MemoryPlacement


class Interrupted(Exception):
    """A stop was requested within a step; nothing of the step is kept."""


class StepContext(NamedTuple):
    """What all steps of a run share."""

    loss: TrainModule
    world: World
    precision: Precision
    seed: int
    rows: range  # of the global batch, for this data-parallel rank
    micro_batch_size: int
    stopping: Callable[[], bool] = lambda: False  # polled between micro-batches
    placement: MemoryPlacement = DeviceMemory()  # of memory states
