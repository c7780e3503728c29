"""Runs that share their beginning: a run that goes on from another run's checkpoint, where the two
are the same up to that step.

A run that is asked to keeps its checkpoints of some steps in BRANCHES, as hard links. Grafted into
the directory of another run, such a checkpoint makes it a run that was stopped there: resumed, it
ends bitwise as if it had been made from its first step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lswt_core.ablation.runs.run_records import BATCHES, INITIAL_VALUES
from lswt_core.ablation.runs.self_check import FLAWS
from lswt_core.ablation.runs.store import OUTCOME, WORKER_LOCK, write_json
from lswt_core.checkpoint import RunLock, Saved, Store, Written, verify
from lswt_core.checkpoint.compatibility import differences
from lswt_core.checkpoint.saved import directory_name
from lswt_core.checkpoint.store import encode
from lswt_core.errors import BusyError, CheckpointError
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.recipe import Recipe

REQUEST, BRANCHES = "branches.json", "branches"
RECORDS = (INITIAL_VALUES, BATCHES, "metrics.jsonl", "environment.json")
LENGTH = {"train.steps", "train.tokens"}  # in which runs that share their beginning differ


def request_branches(directory: Path, steps: Iterable[int]) -> None:
    """Ask a run that has not started to keep its checkpoints of some steps."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / REQUEST, sorted(requested_branches(directory).union(steps)))


def requested_branches(directory: Path) -> frozenset[int]:
    """Return the steps whose checkpoints a run shall keep."""
    try:
        return frozenset(json.loads((directory / REQUEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return frozenset()


def remove_branches(directory: Path) -> None:
    """Remove the checkpoints that a run kept for others."""
    (directory / REQUEST).unlink(missing_ok=True)
    shutil.rmtree(directory / BRANCHES, ignore_errors=True)


class BranchStore(Store):
    """A store of checkpoints that keeps those of some steps for other runs."""

    def __init__(self, directory: Path, *, keep: int, branches: frozenset[int]) -> None:
        super().__init__(directory, keep=keep)
        self.branches = branches

    def publish(self, temporary: Path, step: int) -> None:
        """Publish a checkpoint, and keep it if it is to be kept."""
        super().publish(temporary, step)
        if step in self.branches:
            self.keep_branch(step)

    def keep_branch(self, step: int) -> None:
        """Link a checkpoint's files into BRANCHES, where it appears whole or not at all."""
        target = self.directory.parent / BRANCHES / directory_name(step)
        partial = target.with_name(f".tmp-{step}-{os.getpid()}")
        partial.mkdir(parents=True, exist_ok=True)
        for file in self.path(step).iterdir():
            link(file, partial / file.name)
        with suppress(OSError):  # it is there already
            partial.rename(target)
        shutil.rmtree(partial, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Make a hard link; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def graft(trunk: Path, step: int, directory: Path, recipe: Recipe) -> bool:
    """Let the run of a directory begin at the checkpoint that another run kept of a step; whether
    that was possible.

    It is not, and the run begins at its first step, where the checkpoint is missing or damaged,
    where the other run found flaws of its own, where recipes differ in more than LENGTH, and where
    the run has begun or is under way.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with RunLock(directory, WORKER_LOCK), RunLock(directory):
            store = Store(directory / "checkpoints", keep=recipe.checkpoint.keep)
            saved = verify(trunk / BRANCHES / directory_name(step))
            has_begun = store.steps() or (directory / OUTCOME).exists()
            if has_begun or (trunk / FLAWS).exists() or not is_shared(saved, recipe):
                return False
            for name in RECORDS:
                write_atomically(directory / name, (trunk / name).read_bytes())
            publish_branch(saved, store, recipe)
    except (BusyError, CheckpointError, OSError):
        return False
    return True


def is_shared(saved: Saved, recipe: Recipe) -> bool:
    """Whether a recipe's run is that of a checkpoint, but for its length, and resumes bitwise."""
    changes = differences(saved.document("recipe"), recipe.resolved())
    return recipe.checkpoint.memory == "exact" and {key for key, *_ in changes} <= LENGTH


def publish_branch(saved: Saved, store: Store, recipe: Recipe) -> None:
    """Publish a checkpoint in another store, as that of another recipe."""
    temporary = store.begin(saved.step)
    try:
        written = {}
        for name, record in saved.manifest.files.items():
            if name != "recipe.json":
                link(saved.path / name, temporary / name)
                written[name] = Written(record.bytes, record.sha256)
        store.seal(temporary, saved.step, written, encode({"recipe": recipe.resolved()}))
        store.publish(temporary, saved.step)
    except BaseException:
        store.abandon(temporary)
        raise
