"""Arms of equal training time: the number of steps that takes an arm as long as the baseline's take
the baseline, by a paired measurement on this machine.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lswt_core.ablation.match import Matched
from lswt_core.ablation.recipe_diff import covers
from lswt_core.ablation.runs.store import write_json
from lswt_core.ablation.statistics.paired_runs import paired_test
from lswt_core.data import cache_directory
from lswt_core.errors import ResourceError, UsageError
from lswt_core.recipe import Recipe

STEPS = "train.steps"
TIMER = "lswt_core.ablation.runs.time_steps"
Times = list[list[float]]  # seconds per update by round: the baseline's, the arm's
logger = logging.getLogger(__name__)


def time_steps(baseline: Recipe, arm: Recipe, threads: int, plugins: Sequence[Path]) -> Times:
    """Time updates of both recipes in turn, in a process like a run's. Raises ResourceError if that
    fails.
    """
    with TemporaryDirectory(prefix="lswt-") as directory:
        paths = []
        for name, recipe in (("baseline", baseline), ("arm", arm)):
            paths.append(Path(directory) / f"{name}.toml")
            paths[-1].write_text(recipe.dump(), encoding="utf-8")
        command = [sys.executable, "-m", TIMER, *map(str, paths)]
        for file in plugins:
            command += ["--plugin", str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    if done.returncode:
        reason = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise ResourceError(f"--match time: updates could not be timed: {reason}")
    times: Times = json.loads(done.stdout.splitlines()[-1])
    return times


def remember_times(keys: Sequence[str], measure: Callable[[], Times]) -> Times:
    """Return the times that were measured for two runs (by their cache keys) before, else measure
    and keep them: another measurement would give other steps, and other runs.
    """
    name = sha256(json.dumps(list(keys)).encode()).hexdigest()[:20]
    path = cache_directory() / "step-times" / f"{name}.json"
    if path.is_file():
        try:
            known: Times = json.loads(path.read_text(encoding="utf-8"))
            return known
        except ValueError as error:
            logger.warning("%s is damaged, updates are timed again: %s", path, error)
    times = measure()
    write_json(path, times)
    return times


def match_steps(name: str, axes: Sequence[str], baseline: Recipe, times: Times) -> Matched:
    """Return the number of steps of an arm (``name``) whose updates take the ``times``. Raises
    UsageError if its swap is about the number of steps, or no step fits.
    """
    if any(covers(axis, STEPS) for axis in axes):
        raise UsageError(
            f"--match time cannot change {STEPS}: the swap is about it\n  fix: --match none"
        )
    logarithms = [math.log(after / before) for before, after in zip(*times, strict=True)]
    test = paired_test(logarithms)
    wanted = baseline.train.total_steps / math.exp(test.delta)
    steps = round(wanted)
    if steps < 1:
        raise UsageError(
            f'--match time: an update of arm "{name}" takes as long as the whole baseline\n'
            "  fix: more train.steps, or --match none"
        )
    return Matched(STEPS, steps, steps / wanted - 1, describe_times(times, test.delta, test.ci))


def describe_times(
    times: Times, delta: float, interval: tuple[float, float] | None
) -> dict[str, Any]:
    """Return a measurement as plain data: "seconds_per_update" by round, and the "ratio" of the
    arm's to the baseline's with its 95 % interval, "ci95".
    """
    return {
        "seconds_per_update": {"baseline": times[0], "arm": times[1]},
        "ratio": math.exp(delta),
        "ci95": None if interval is None else [math.exp(bound) for bound in interval],
    }
