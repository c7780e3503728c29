"""What all steps of a run share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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

    def autocast(self, precision: Precision | None = None) -> AbstractContextManager[object]:
        """The autocast context of a forward pass, by default in the run's precision."""
        # on several ranks cast weights would outlive the gathered parameters that they are of
        precision, keeps_casts = precision or self.precision, self.world.size == 1
        return precision.autocast(self.world.device, cache_weights=keeps_casts)

    def shared_casts(self) -> AbstractContextManager[None]:
        """The context of all micro-batches of a gradient: weights are cast once, unless that would
        keep what activation checkpointing drops.
        """
        if self.world.size > 1 or self.loss.decoder.activation_checkpointing:
            return nullcontext()
        return self.precision.shared_casts(self.world.device)
