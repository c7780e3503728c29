"""Reading metrics.jsonl, the log of a run: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lswt_core.errors import DataError

TAIL_BYTES = 65536  # more than the longest line of a log


class Series(NamedTuple):
    """One metric over steps, where it was logged and finite."""

    steps: list[int]
    values: list[float]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a log in order; raises DataError, with the line, if one is broken.

    An incomplete last line (of a run that is still writing, or was killed) is left out.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    entries = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError(f"it is {line[:40]!r}")
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a JSON object: {error}") from error
        entries.append(entry)
    return entries


def read_last_training_entry(path: Path) -> dict[str, Any] | None:
    """Return the newest entry of a training step, reading only the end of the log; None if there
    is no log yet, or no such entry in its end.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        if line.startswith(b"{") and line.endswith(b"}\n"):
            entry: dict[str, Any] = json.loads(line)
            if "loss" in entry:
                return entry
    return None


def series(entries: Iterable[Mapping[str, Any]], name: str) -> Series:
    """Return one metric of many entries."""
    points = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
    return Series([step for step, _ in points], [value for _, value in points])


def smooth(values: Sequence[float]) -> list[float]:
    """Return the centred running mean, over a twenty-fifth of the curve; the window is narrower
    towards both ends, so that the mean does not lag.
    """
    reach = len(values) // 50
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        begin = i - min(reach, i)
        end = min(i + min(reach, i) + 1, len(values))
        means.append((sums[end] - sums[begin]) / (end - begin))
    return means
