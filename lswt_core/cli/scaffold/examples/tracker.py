"""A tracker: metrics in a CSV file."""

import csv
from collections.abc import Mapping
from typing import Annotated

from annotated_types import Ge

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import RunInfo, Tracker


class Example(Tracker):
    """Writes step, name and value of every metric to a CSV file in the run directory, a line each,
    at one step in ``every``. A resumed run appends; of repeated steps the last lines count.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, run: RunInfo, *, every: Annotated[int, Ge(1)] = 1) -> None:
        super().__init__(run)
        self.path, self.every = run.directory / f"{self.name}.csv", every
        if not run.resumed:
            self.path.unlink(missing_ok=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Change this: record metrics. ``close`` is called at the end of the run."""
        if step % self.every == 0:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows((step, name, value) for name, value in metrics.items())


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
