"""The warnings that a run prints or logs, kept beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lswt_core.reporting.console import Console

WARNINGS = "warnings.txt"


class WarningsFile(logging.Handler):
    """Appends every warning to a file, one a line."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        """``warn`` prints a warning."""
        super().__init__(logging.WARNING)
        self.path, self.warn = path, warn

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what a module logs, or Python's warnings."""
        self.keep(record.getMessage())

    def keep(self, text: str) -> None:
        """Keep a warning."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(" ".join(text.split()) + "\n")

    def print(self, text: str) -> None:
        """Keep a warning and print it."""
        self.keep(text)
        self.warn(text)


@contextmanager
def recorded_warnings(directory: Path, console: Console) -> Iterator[None]:
    """Keep what a console, modules and Python warn of while the block runs."""
    kept, root = WarningsFile(directory / WARNINGS, console.warn), logging.getLogger()
    console.warn = kept.print  # type: ignore[method-assign]
    logging.captureWarnings(True)
    root.addHandler(kept)
    try:
        yield
    finally:
        root.removeHandler(kept)
        logging.captureWarnings(False)
        del console.warn


def read_warnings(directory: Path) -> list[str]:
    """Return the different warnings of a run, in order."""
    path = directory / WARNINGS
    if not path.is_file():
        return []
    return list(dict.fromkeys(path.read_text(encoding="utf-8").splitlines()))
