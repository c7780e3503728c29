"""Checks of whole runs, as a user starts them: one with evaluation, checkpoint and sample, and one
on all devices.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import SkipTest

from lswt_core.acceptance.item import require
from lswt_core.acceptance.training import TABLES, require_close
from lswt_core.checkpoint import Store
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.metrics_log import read_metrics

STEPS = 12
ROUNDING = 1e-4  # of float32, over STEPS updates: gradients are summed in another order
WORDS = ("sense", "and", "sensibility", "pride", "prejudice", ".")


def write_recipe(folder: Path, batch_size: int) -> Path:
    """The small model's recipe with a text of its own, which needs no network."""
    words = random.Random(0)
    text = folder / "text"
    text.mkdir()
    for i in range(8):
        document = " ".join(words.choice(WORDS) for _ in range(2000))
        text.joinpath(f"{i}.txt").write_text(document, encoding="utf-8")
    tables: dict[str, Any] = {
        **TABLES,
        "data": {"use": "text", "paths": [str(text)]},
        "train": {
            **TABLES["train"],
            "steps": STEPS,
            "batch_size": batch_size,
            "compile": "auto",
            "log_every": 1,
        },
        "evaluate": {"every": 6, "tokens": 2048, "batch_size": 2},
        "checkpoint": {"every": 6},
        "sample": {"tokens": 16},
    }
    recipe = Recipe.from_dict(tables, where="the acceptance's run", registry=Registry())
    path = folder / "small.toml"
    path.write_text(recipe.dump(), encoding="utf-8")
    return path


def train(command: list[str], recipe: Path, out: Path, *overrides: str) -> list[float]:
    """Run to the end in processes of their own; returns the losses of all steps."""
    words = [*command, "-m", "lswt_core.run", str(recipe), *overrides, "--out", str(out)]
    cache = {"LSWT_CACHE_DIR": str(recipe.parent / "cache")}
    done = subprocess.run(words, env=os.environ | cache, stdout=sys.stderr, check=False)
    require(done.returncode == 0, f"exit code {done.returncode} of {' '.join(words)}")
    losses = [one["loss"] for one in read_metrics(out / "metrics.jsonl") if one.get("loss")]
    require(len(losses) == STEPS, f"{len(losses)} losses of {STEPS} steps")
    return losses


def check_run() -> dict[str, Any]:
    """A run ends with losses that fell, evaluations, an intact checkpoint, sample and report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "run"
        losses = train([sys.executable], write_recipe(folder, 4), out)
        require(all(map(math.isfinite, losses)), "a loss is not finite")
        require(losses[-1] < losses[0], f"the loss rose from {losses[0]} to {losses[-1]}")
        missing = [one for one in ("sample.txt", "report.html") if not (out / one).is_file()]
        require(not missing, f"the run has no {' and no '.join(missing)}")
        notes: list[str] = []
        saved = Store(out / "checkpoints").newest(notes.append)
        require(saved is not None and saved.step == STEPS and not notes, f"checkpoint: {notes}")
        evaluations = [
            one["eval/loss"] for one in read_metrics(out / "metrics.jsonl") if one.get("eval/loss")
        ]
    return {"losses": [losses[0], losses[-1]], "evaluations": evaluations}


def check_all_devices(processes: int) -> dict[str, Any]:
    """The losses of a model cut over several processes, one a device, are those of one process."""
    if processes < 2:
        raise SkipTest("there are not several devices")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(folder, 2 * processes)
        one = train([sys.executable], recipe, folder / "one")
        all_of_them = train([sys.executable, *launch], recipe, folder / "all", "train.shard=all")
    return {"processes": processes, "error": require_close("losses", all_of_them, one, ROUNDING)}
