"""Metrics as TensorBoard event files in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lswt_core.errors import PluginError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import RunInfo, Tracker


class TensorBoard(Tracker):
    """Event files for ``tensorboard --logdir <run>/tensorboard``."""

    name = "tensorboard"
    libraries = ("tensorboard",)

    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PluginError(
                f"track.tensorboard needs a missing package ({error}): pip install"
                " 'lswt-core[tensorboard]'"
            ) from error
        self._writer_type = SummaryWriter
        self._writer: Any = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics."""
        # A resumed run replaces what was logged from this step on.
        if self._writer is None:
            self._writer = self._writer_type(
                str(self.run.directory / "tensorboard"), purge_step=step
            )
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()


@hookimpl
def lswt_components() -> list[type]:
    """Offer the TensorBoard tracker."""
    return [TensorBoard]
