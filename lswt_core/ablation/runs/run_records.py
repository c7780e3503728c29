"""Reads what runs recorded in their directories: initial values, batches and environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lswt_core.ablation.certificate import RunRecord
from lswt_core.ablation.runs.store import RunStore
from lswt_core.errors import CheckpointError
from lswt_core.train.environment import is_intact, read_record

INITIAL_VALUES, BATCHES, PEAK_MEMORY = "start.json", "batches.txt", "peak.json"
ENVIRONMENT_KEYS = ("device", "processes", "precision", "machine", "versions")


def read_run_record(directory: Path) -> RunRecord | None:
    """Return a run's initial values and batches; None if it has not started. Raises CheckpointError
    if its initial values are damaged.
    """
    initial, batches = directory / INITIAL_VALUES, directory / BATCHES
    if not initial.is_file() or not batches.is_file():
        return None
    try:
        values = read_record(initial)
    except ValueError as error:
        raise CheckpointError(
            f"{initial} is damaged, so nobody can tell which values the run started from: {error}\n"
            f"  fix: remove {directory}; the same command makes this run again"
        ) from error
    return RunRecord(values, batches.read_text(encoding="utf-8").splitlines())


def read_environment(store: RunStore, keys: Sequence[str]) -> dict[str, Any]:
    """Return the environment of the first run whose record can be read; it is part of the cache
    key, so that runs of one ablation share it.
    """
    for key in keys:
        path = store.directory(key) / "environment.json"
        if is_intact(path):
            record = read_record(path)
            return {name: record[name] for name in ENVIRONMENT_KEYS if name in record}
    return {"device": str(torch.device("cpu"))}
