"""A tracker: a run's numbers in a table that every program reads."""

import csv
from collections.abc import Mapping
from typing import Annotated

from annotated_types import Ge

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import RunInfo, Tracker


class Example(Tracker):
    """A CSV file in the run directory, called as the component is: step, name and value of every
    number, a line each, of one step in ``every``. A run that is continued appends; of steps that
    stand twice the later lines count.
    """

    name = "example"
    citation = "@misc{lswt_example, title={lswt-example}, author={its authors}}"

    def __init__(self, run: RunInfo, *, every: Annotated[int, Ge(1)] = 1) -> None:
        super().__init__(run)
        self.path, self.every = run.directory / f"{self.name}.csv", every
        if not run.resumed:
            self.path.unlink(missing_ok=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Change where the numbers go; ``close`` is called at the end of the run."""
        if step % self.every == 0:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows((step, name, value) for name, value in metrics.items())


@hookimpl
def lswt_components() -> list[type]:
    """What this plugin offers."""
    return [Example]
