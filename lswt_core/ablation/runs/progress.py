"""Progress of an ablation's runs, by arm, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.ablation.runs.store import RunStore
from lswt_core.recipe import Recipe
from lswt_core.reporting.metrics_log import read_last_training_entry
from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_duration

INTERVAL = 30.0  # seconds between two reports
LEAST_WORK = 0.02  # of a run, before the time left is estimated
MOST_ROWS = 12  # of a table of arms
ROUNDING = 1e-9  # of a run: less work than this is none


class Job(NamedTuple):
    """One run: an arm with a seed."""

    arm: str
    seed: int
    key: str  # of the store
    recipe: Recipe
    code: str = ""  # its hash when the study began
    flops: int | None = None  # of its training; None: unknown

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


class Position(NamedTuple):
    """How far a run is."""

    step: int
    loss: float | None  # of the last step that was logged; None: not finite, or no step yet


class Progress:
    """Progress of all runs; work is counted in mean runs."""

    def __init__(self, jobs: Sequence[Job], store: RunStore) -> None:
        self.jobs, self.store = {job.key: job for job in jobs}, store
        self.work = weigh(self.jobs)
        self.began = self.reported = time.monotonic()
        self.finished_work = 0.0  # done here, of runs that have ended
        self.before: dict[str, float] = {}  # by key of a running job: its share at its start

    @property
    def total(self) -> int:
        """The number of runs."""
        return len(self.jobs)

    def start(self, job: Job) -> None:
        """A run starts, or continues."""
        self.before[job.key] = self.share(job.key)

    def finish(self, job: Job) -> None:
        """A run has ended, or was found in the store."""
        if job.key in self.before:
            self.finished_work += self.work[job.key] * (1 - self.before.pop(job.key))

    def drop(self, job: Job) -> None:
        """A run could not start."""
        del self.before[job.key]

    def is_due(self) -> bool:
        """Whether INTERVAL has passed since this last returned True."""
        if time.monotonic() - self.reported < INTERVAL:
            return False
        self.reported = time.monotonic()
        return True

    def position(self, key: str) -> Position:
        """Return how far a run is, from the end of its metrics."""
        entry = read_last_training_entry(self.store.directory(key) / "metrics.jsonl")
        if entry is None:
            return Position(0, None)
        return Position(entry["step"], entry["loss"])

    def share(self, key: str) -> float:
        """Return which share of its steps a run has done."""
        return self.position(key).step / self.jobs[key].recipe.train.total_steps

    def time_left(self, finished: Collection[str], running: Iterable[str]) -> str:
        """Return the time left in words, from the speed so far; empty while it is unknown. Runs are
        given by their keys.
        """
        done, left = self.finished_work, sum(self.work[key] for key in self.jobs.keys() - finished)
        for key in running:
            share, work = self.share(key), self.work[key]
            done += work * (share - self.before[key])
            left -= work * share
        if done < LEAST_WORK or left < ROUNDING:
            return ""
        seconds = (time.monotonic() - self.began) / done * left
        return f"about {format_duration(seconds)} left"

    def text(self, outcomes: Mapping[str, Outcome], running: Sequence[str]) -> str:
        """Return a table of arms: seeds finished, and how far the running one is. Of more than
        MOST_ROWS arms, those with a running one.
        """
        left = self.time_left(outcomes, running) or "time left not known yet"
        rows = []
        for arm in dict.fromkeys(job.arm for job in self.jobs.values()):
            keys = [key for key, job in self.jobs.items() if job.arm == arm]
            finished = sum(key in outcomes for key in keys)
            current = "; ".join(self.describe(key) for key in keys if key in running)
            rows.append([arm, f"{finished} of {len(keys)}", current])
        head = f"progress: {len(outcomes)} of {self.total} runs finished, {left}"
        if len(rows) > MOST_ROWS:
            rows = [row for row in rows if row[-1]]
        table = Table(("arm", "seeds finished", "running"), rows, text_columns=(0, 2))
        return f"{head}\n{table.text(indent='  ')}"

    def describe(self, key: str) -> str:
        """Return how far a running job is, in words."""
        job, (step, loss) = self.jobs[key], self.position(key)
        if step == 0:
            return f"seed {job.seed}: starting"
        shown = "not finite" if loss is None else f"{loss:.4f}"
        return f"seed {job.seed}: step {step:,}/{job.recipe.train.total_steps:,}, loss {shown}"


def weigh(jobs: Mapping[str, Job]) -> dict[str, float]:
    """Return every run's training FLOPs over their mean, by key; all count the same where those of
    one are unknown.
    """
    known = {key: job.flops for key, job in jobs.items() if job.flops}
    if len(known) < len(jobs):
        return dict.fromkeys(jobs, 1.0)
    mean = sum(known.values()) / max(len(known), 1)
    return {key: flops / mean for key, flops in known.items()}


PARTIAL_HEADER = ("arm", "held-out loss", "difference", "finished", "failed", "missing seeds")


def format_partial_table(jobs: Sequence[Job], outcomes: Mapping[str, Outcome]) -> str:
    """Return what a stopped ablation has so far: mean losses, mean paired differences to the
    baseline (the arm of the first job), and the seeds that are missing.

    It has no intervals or verdicts: a test after an arbitrary number of seeds would not hold its
    level.
    """
    arms: dict[str, dict[int, Outcome | None]] = {}
    for job in jobs:
        arms.setdefault(job.arm, {})[job.seed] = outcomes.get(job.key)
    baseline = next(iter(arms.values()))
    rows = [partial_row(name, runs, baseline) for name, runs in arms.items()]
    table = Table(PARTIAL_HEADER, rows, text_columns=(0, 5))
    return f"finished so far (means only, no verdict):\n{table.text(indent='  ')}"


def partial_row(
    name: str, runs: Mapping[int, Outcome | None], baseline: Mapping[int, Outcome | None]
) -> list[str]:
    """Return an arm's row of the partial table."""
    losses, base = finished_losses(runs), finished_losses(baseline)
    differences = [losses[seed] - base[seed] for seed in losses if seed in base]
    is_compared = runs is not baseline and differences
    missing = [str(seed) for seed, outcome in runs.items() if outcome is None]
    ended = [outcome for outcome in runs.values() if outcome is not None]
    return [
        name,
        f"{sum(losses.values()) / len(losses):.4f}" if losses else "-",
        f"{sum(differences) / len(differences):+.4f}" if is_compared else "",
        f"{len(losses)} of {len(runs)}",
        str(len(ended) - len(losses)),
        ", ".join(missing) or "none",
    ]


def finished_losses(runs: Mapping[int, Outcome | None]) -> dict[int, float]:
    """Return held-out losses by seed, of the runs that finished and did not fail."""
    losses = {}
    for seed, outcome in runs.items():
        if outcome is not None and outcome.failure is None and outcome.loss is not None:
            losses[seed] = outcome.loss
    return losses
