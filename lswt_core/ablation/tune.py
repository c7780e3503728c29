"""Tuning of real-valued options: the search for each arm's own best value. Knows no
models and makes no runs.

Every arm has a grid of the same size and the same rule, so that a comparison of arms at their best
values gives none of them more effort. A search is successive halving over seeds, at the full length
of training: a shorter one would prefer higher learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from lswt_core.ablation.tuning_grid import TunedOption, shift

MAX_EXTENSIONS = 6  # points that are added to a grid whose optimum is at its edge

Values = tuple[tuple[str, float], ...]  # recipe keys and their values


class Trial(NamedTuple):
    """A point of a grid, tried with a seed."""

    value: float
    seed: int


class Search:
    """Successive halving over seeds, on one grid.

    All points are tried with the first seed, the better half also with the second, and so on; a
    failed run is worse than any loss. While the best point is at an edge of the grid, a point is
    added there, MAX_EXTENSIONS in all.
    """

    def __init__(
        self,
        grid: Sequence[float],
        factor: float,
        seeds: Sequence[int],
        accepts: Callable[[float], bool] = lambda _: True,
    ) -> None:
        """``accepts``: whether a value that is added is valid."""
        self.factor, self.seeds, self.accepts = factor, seeds, accepts
        self.points = sorted(grid)
        self.survivors = list(self.points)
        self.losses: dict[Trial, float] = {}  # inf: the run failed
        self.rounds = 1  # seeds that survivors are tried with
        self.added: list[float] = []
        self.refused: float | None = None  # a point beyond the edge that is not valid

    def wanted(self) -> list[Trial]:
        """Return the trials whose losses are needed next; none: the search has ended."""
        while True:
            seeds = self.seeds[: self.rounds]
            trials = [Trial(value, seed) for value in self.survivors for seed in seeds]
            missing = [trial for trial in trials if trial not in self.losses]
            if missing or not (self.extend() or self.halve()):
                return missing

    def record(self, trial: Trial, loss: float) -> None:
        """Take the loss of a trial; inf: its run failed."""
        self.losses[trial] = loss

    def extend(self) -> bool:
        """Add a point beyond the edge that the best point is at, if it is at one."""
        best = self.best()
        if best not in (self.points[0], self.points[-1]) or len(self.added) == MAX_EXTENSIONS:
            return False
        point = shift(best, self.factor, 1 if best == self.points[-1] else -1)
        if not self.accepts(point):
            self.refused = point
            return False
        self.added.append(point)
        self.points = sorted([*self.points, point])
        self.survivors.append(point)
        return True

    def halve(self) -> bool:
        """Keep the better half of the survivors for the next seed, if there is one."""
        if self.rounds == len(self.seeds):
            return False
        kept = count_kept(len(self.survivors))
        self.survivors = sorted(self.survivors, key=self.rank)[:kept]
        self.rounds += 1
        return True

    def best(self) -> float:
        """Return the best survivor."""
        return min(self.survivors, key=self.rank)

    def rank(self, value: float) -> tuple[int, float, float]:
        """Return what points are ordered by: failed runs, mean loss of the others, value."""
        losses = self.losses_of(value)
        finished = [loss for loss in losses.values() if loss < math.inf]
        return len(losses) - len(finished), fmean(finished) if finished else math.inf, value

    def losses_of(self, value: float) -> dict[int, float]:
        """Return a point's losses by seed."""
        return {trial.seed: loss for trial, loss in self.losses.items() if trial.value == value}

    def chosen(self) -> float:
        """Return the value that is chosen: the vertex of the parabola through the best point and
        its neighbours, on a logarithmic scale and at the seeds that they share; the best point
        itself if it has no neighbours that finished.

        The best point alone would favour arms whose optimum happens to be on the grid, and jumps
        by a whole step with the noise of a few seeds.
        """
        best = self.best()
        place = self.points.index(best)
        if not self.is_bracketed:
            return best
        lower, upper = (self.difference(self.points[place + side]) for side in (-1, 1))
        if not 0 < lower + upper < math.inf:
            return best
        steps = (lower - upper) / (lower + upper) / 2
        return shift(best, self.factor, min(max(steps, -0.5), 0.5))

    def difference(self, value: float) -> float:
        """Return the mean of a point's losses less the best point's at the same seeds."""
        best = self.losses_of(self.best())
        return fmean(loss - best[seed] for seed, loss in self.losses_of(value).items())

    @property
    def has_failed(self) -> bool:
        """Whether no point can be chosen: even the best one's runs all failed."""
        return self.rank(self.best())[1] == math.inf

    @property
    def is_bracketed(self) -> bool:
        """Whether there are worse points on both sides of the best one."""
        return self.points[0] < self.best() < self.points[-1] and not self.has_failed


def least_runs(points: int, seeds: int) -> int:
    """Return how many runs a search makes if its grid is not extended."""
    runs = 0
    for _ in range(seeds):
        runs += points
        points = count_kept(points)
    return runs


def count_kept(points: int) -> int:
    """Return how many points are tried with the next seed: the better half, but two at least."""
    return max(2, -(-points // 2))


def measure_sensitivity(
    losses: Mapping[float, float], grid: Sequence[float], initial_loss: float
) -> float:
    """Return the mean over a grid of min(loss, initial loss) - best loss, in nats: the learning
    rate sensitivity of Wortsman et al. 2023 (arXiv 2309.14322, section 2.2) on these points.

    ``losses``, by value, are of one seed; inf: failed, which counts as the initial loss. The best
    is that of all ``losses``, the added points included.
    """
    capped = {value: min(loss, initial_loss) for value, loss in losses.items()}
    return fmean(capped[value] for value in grid) - min(capped.values())


class Ask(NamedTuple):
    """A run that a search needs: an arm at some values, with a seed."""

    arm: str
    values: Values
    seed: int


class Found(NamedTuple):
    """What the search of one option of one arm came to."""

    key: str
    own: float  # the recipe's value
    value: float  # the chosen one; ``own`` if every point failed
    fixed: Values  # of the options that were tuned before it
    grid: tuple[float, ...]  # before it was extended
    search: Search


class ArmSearch:
    """The searches of an arm, option by option: each at the best values of those before it, and
    with the recipe's values of those after it. That is not the full product of all grids.
    """

    def __init__(
        self,
        arm: str,
        options: Sequence[TunedOption],
        own: Mapping[str, float],
        seeds: Sequence[int],
        accepts: Callable[[Values], bool] = lambda _: True,
    ) -> None:
        """``own``: the recipe's values by key; ``accepts``: whether values are valid."""
        self.arm, self.own, self.seeds, self.accepts = arm, own, seeds, accepts
        self.left = list(options)
        self.found: list[Found] = []
        self.open_next()

    def open_next(self) -> None:
        """Begin the search of the next option."""
        option, before = self.left.pop(0), self.chosen()
        grid = option.grid(self.own[option.key])

        def accepts(value: float) -> bool:
            return self.accepts((*before, (option.key, value)))

        search = Search(grid, option.factor, self.seeds, accepts)
        own = self.own[option.key]
        self.current = Found(option.key, own, own, before, grid, search)

    def chosen(self) -> Values:
        """Return the best values of the options that were tuned."""
        return tuple((one.key, one.value) for one in self.found)

    def wanted(self) -> list[Ask]:
        """Return the runs that are needed next; none: every option is tuned."""
        while True:
            trials = self.current.search.wanted()
            if trials or self.has_ended:
                return [self.ask(trial) for trial in trials]
            search = self.current.search
            value = self.current.own if search.has_failed else search.chosen()
            self.found.append(self.current._replace(value=value))
            if self.left:
                self.open_next()

    @property
    def has_ended(self) -> bool:
        """Whether every option is tuned."""
        return bool(self.found) and self.found[-1].search is self.current.search

    def ask(self, trial: Trial) -> Ask:
        """Return the run of a trial."""
        values = (*self.current.fixed, (self.current.key, trial.value))
        return Ask(self.arm, values, trial.seed)

    def record(self, ask: Ask, loss: float) -> None:
        """Take the loss of a run that was wanted; inf: it failed."""
        self.current.search.record(Trial(ask.values[-1][1], ask.seed), loss)


def run_searches(
    searches: Sequence[ArmSearch], evaluate: Callable[[list[Ask]], Sequence[float]]
) -> None:
    """Run the searches of all arms side by side. ``evaluate`` returns the losses of some runs."""
    while wanted := [(search, ask) for search in searches for ask in search.wanted()]:
        losses = evaluate([ask for _, ask in wanted])
        for (search, ask), loss in zip(wanted, losses, strict=True):
            search.record(ask, loss)
