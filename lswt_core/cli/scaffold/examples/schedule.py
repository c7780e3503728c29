"""A learning-rate schedule: linear warm-up, then linear decay."""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Horizon, Schedule


class Example(Schedule):
    """Rises from 0 over the share ``warmup`` of the run, then falls to ``floor``, which the last
    step reaches.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(
        self,
        horizon: Horizon,
        *,
        warmup: Annotated[float, Gt(0), Lt(1)] = 0.1,
        floor: Annotated[float, Ge(0), Le(1)] = 0.1,
    ) -> None:
        super().__init__(horizon)
        self.warmup, self.floor = warmup, floor

    def factor(self, step: int) -> float:
        """Change this: the share of the peak learning rate in step ``step`` (1, 2, ...)."""
        done = min(step / self.horizon.end, 1.0)
        decayed = self.floor + (1 - self.floor) * (1 - done) / (1 - self.warmup)
        return min(done / self.warmup, decayed)


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
