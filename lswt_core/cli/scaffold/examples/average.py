"""An average of the weights: the mean of all weights since a step."""

from typing import Annotated

from annotated_types import Ge

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import WeightAverage


class Example(WeightAverage):
    """The mean of the weights after updates ``first``, ``first + 1``, ...; until then the weights
    themselves.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, *, first: Annotated[int, Ge(1)] = 100) -> None:
        self.first = first

    def rate(self, step: int) -> float:
        """Change this: how far the average moves to the weights after update ``step``."""
        return 1 / max(1, step - self.first + 1)


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
