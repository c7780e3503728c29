"""Tuning: grids, searches, and the split of held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from lswt_core.ablation.document_split import judged_on, loss_on, split_documents
from lswt_core.ablation.runs.outcome import ArmResult, Outcome, Study
from lswt_core.ablation.tune import (
    MAX_EXTENSIONS,
    ArmSearch,
    Ask,
    Search,
    least_runs,
    measure_sensitivity,
    run_searches,
)
from lswt_core.ablation.tuning_grid import TunedOption, parse_tune
from lswt_core.errors import UsageError

Losses = Callable[[float, int], float]  # of value and seed


def valley(best: float, noise: float = 0.0) -> Losses:
    """A loss that is lowest at ``best``, on a logarithmic scale."""

    def loss(value: float, seed: int) -> float:
        own = np.random.default_rng([seed, int(value * 1e9)]).normal()
        return 3.0 + math.log(value / best) ** 2 / 10 + noise * own

    return loss


def finish(search: Search, loss: Losses) -> dict[int, int]:
    """Run a search to its end; returns its runs by seed."""
    runs: dict[int, int] = {}
    while wanted := search.wanted():
        for trial in wanted:
            search.record(trial, loss(*trial))
            runs[trial.seed] = runs.get(trial.seed, 0) + 1
    return runs


# ---------- grids


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("optimizer.lr=5", (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
        ("optimizer.lr=3x10", (1e-4, 1e-3, 1e-2)),
        ("optimizer.lr=4", (2.5e-4, 5e-4, 1e-3, 2e-3)),
        ("optimizer.lr=1e-4..1e-2/3", (1e-4, 1e-3, 1e-2)),
    ],
)
def test_a_grid_is_logarithmic_and_has_the_recipes_value(text: str, grid: Sequence[float]) -> None:
    option = parse_tune(text)
    assert option.key == "optimizer.lr"
    assert option.grid(1e-3) == pytest.approx(grid, rel=1e-3)
    if option.low is None:
        assert 1e-3 in option.grid(1e-3)


@pytest.mark.parametrize(
    "text",
    [
        "optimizer.lr",
        "=5",
        "optimizer.lr=two",
        "optimizer.lr=2",
        "optimizer.lr=5x1",
        "optimizer.lr=5x0.5",
        "optimizer.lr=0..1/5",
        "optimizer.lr=1e-2..1e-4/5",
        "optimizer.lr=1e-4../5",
        "optimizer.lr=1e-4..1e-2",
        "optimizer.lr=1e-4..1e-2/5x2",
        "optimizer.lr=1e-4..inf/5",
    ],
)
def test_a_grid_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--tune"):
        parse_tune(text)


# ---------- one search


def test_the_better_half_gets_further_seeds_and_all_points_the_first() -> None:
    search = Search((1, 2, 4, 8, 16), 2.0, (7, 8, 9), lambda _: True)
    assert finish(search, valley(4)) == {7: 5, 8: 3, 9: 2}
    assert search.best() == 4 and search.is_bracketed and not search.added
    assert sum({7: 5, 8: 3, 9: 2}.values()) == least_runs(5, 3) == 10


@pytest.mark.parametrize(("best", "added"), [(40.0, 2), (0.3, 3)])
def test_a_grid_goes_on_where_its_best_point_is_at_its_edge(best: float, added: int) -> None:
    search = Search((1, 2, 4, 8, 16), 2.0, (0,))
    finish(search, valley(best))
    assert len(search.added) == added and search.is_bracketed
    assert abs(math.log2(search.best() / best)) <= 0.5


def test_an_optimum_that_is_never_passed_is_not_bracketed() -> None:
    search = Search((1, 2, 4), 2.0, (0,))
    finish(search, lambda value, _: -value)
    assert len(search.added) == MAX_EXTENSIONS and not search.is_bracketed
    assert search.best() == 4 * 2**MAX_EXTENSIONS
    refused = Search((1, 2, 4), 2.0, (0,), accepts=lambda value: value < 5)
    finish(refused, lambda value, _: -value)
    assert refused.refused == 8 and refused.best() == 4 and not refused.is_bracketed


def test_a_failed_run_is_worse_than_any_loss() -> None:
    search = Search((1, 2, 4, 8, 16), 2.0, (0, 1))
    finish(search, lambda value, seed: math.inf if (value, seed) == (4, 1) else valley(4)(value, 0))
    assert search.losses_of(4) == {0: 3.0, 1: math.inf}
    assert search.best() in (2, 8)


def test_where_every_run_fails_the_recipes_value_stays() -> None:
    option = TunedOption("lr", 3, 2.0)
    search = ArmSearch("x", [option], {"lr": 1.0}, (0, 1))
    run_searches([search], lambda asked: [math.inf] * len(asked))
    assert search.chosen() == (("lr", 1.0),) and not search.found[0].search.is_bracketed


@pytest.mark.parametrize("best", [4.0, 5.0, 5.6, 3.0])
def test_an_optimum_between_two_points_is_found(best: float) -> None:
    search = Search((1, 2, 4, 8, 16), 2.0, (0, 1))
    finish(search, valley(best))
    assert search.chosen() == pytest.approx(best, rel=1e-3)


def test_without_two_neighbours_that_finished_the_best_point_is_chosen() -> None:
    search = Search((1, 2, 4, 8, 16), 2.0, (0,))
    finish(search, lambda value, seed: math.inf if value > 4 else valley(5)(value, seed))
    assert search.chosen() == search.best() == 4 and search.is_bracketed


def choose(draw: np.random.Generator, best: float, gap: float, seeds: int) -> tuple[float, float]:
    """The mean loss of the point and of the value that are chosen for an arm whose loss is ``gap``
    times the squared number of steps from ``best``, with noise of standard deviation 1.
    """
    search = Search((1, 2, 4, 8, 16), 2.0, range(seeds))

    def mean(value: float) -> float:
        return gap * math.log2(value / best) ** 2

    finish(search, lambda value, _: mean(value) + draw.normal())
    return mean(search.best()), mean(search.chosen())


def test_the_vertex_is_nearer_to_the_optimum_than_the_best_point() -> None:
    draw = np.random.default_rng(0)
    for best in (4.0, 5.0):
        losses = np.array([choose(draw, best, 1.0, 3) for _ in range(200)])
        assert losses[:, 1].mean() < 0.75 * losses[:, 0].mean()


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "most"), [(1, 0.10), (3, 0.08)])
def test_tuning_makes_few_false_verdicts_between_equal_arms(seeds: int, most: float) -> None:
    """Two arms of the same curve, tuned by chance to different values: the paired t test of five
    seeds at the 5 % level, whose own limit is 6.5 % of 1500.
    """
    draw, critical = np.random.default_rng(seeds), 2.7764
    for gap in (0.25, 0.5, 1.0, 2.0):
        for best in (4.0, 4 * math.sqrt(2)):
            false = 0
            for _ in range(1500):
                one, other = (choose(draw, best, gap, seeds)[1] for _ in range(2))
                pairs = one - other + draw.normal(0, math.sqrt(2), 5)
                t = abs(pairs.mean()) / pairs.std(ddof=1) * math.sqrt(5)
                false += t > critical
            assert false / 1500 < most, (gap, best, false / 1500)


# ---------- all arms


def test_every_arm_makes_as_many_runs_and_finds_its_own_best() -> None:
    best = {"baseline": 1e-3, "adamw": 3e-3}
    own = {"baseline": 1e-3, "adamw": 3e-4}
    option = TunedOption("optimizer.lr", 5, 2.0)
    searches = [ArmSearch(arm, [option], {"optimizer.lr": own[arm]}, (1, 2, 3)) for arm in best]
    made: list[Ask] = []

    def evaluate(asked: list[Ask]) -> list[float]:
        made.extend(asked)
        return [valley(best[ask.arm])(ask.values[-1][1], ask.seed) for ask in asked]

    run_searches(searches, evaluate)
    chosen = {search.arm: dict(search.chosen())["optimizer.lr"] for search in searches}
    assert chosen == pytest.approx(best, rel=1e-3)
    assert searches[1].found[0].search.added == [2.4e-3, 4.8e-3]
    runs = [sum(ask.arm == arm for ask in made) for arm in best]
    assert runs[0] == least_runs(5, 3) and runs[1] > runs[0]
    assert len(made) == len(set(made)), "no run is asked for twice"


def test_several_options_are_tuned_one_after_the_other() -> None:
    options = [TunedOption("lr", 3, 2.0), TunedOption("decay", 3, 2.0)]
    search = ArmSearch("x", options, {"lr": 1.0, "decay": 1.0}, (0,))
    made: list[Ask] = []

    def evaluate(asked: list[Ask]) -> list[float]:
        made.extend(asked)
        goal: Mapping[str, float] = {"lr": 2.0, "decay": 0.5}
        values = [{"decay": 1.0} | dict(ask.values) for ask in asked]
        return [sum(math.log(one[key] / goal[key]) ** 2 for key in goal) for one in values]

    run_searches([search], evaluate)
    assert search.chosen() == (("lr", 2.0), ("decay", 0.5))
    assert [ask.values[0] for ask in made if len(ask.values) == 2] == [("lr", 2.0)] * 4
    assert len(made) == 8, "not the product: 3 + 1 of each"


def test_sensitivity_is_the_mean_loss_above_the_best() -> None:
    grid, losses = (1.0, 2.0, 4.0), {1.0: 3.5, 2.0: 3.0, 4.0: math.inf, 8.0: 2.9}
    assert measure_sensitivity(losses, grid, initial_loss=5.0) == pytest.approx(
        (0.6 + 0.1 + 2.1) / 3
    )


# ---------- text


NAMES = [f"{i}.txt" for i in range(12)]


def outcome(seed: int = 0, names: Sequence[str] = NAMES) -> Outcome:
    documents = [(name, 10.0 * (number + 1 + seed), 10) for number, name in enumerate(names)]
    return Outcome(seed, loss=1.0, documents=documents)


def test_documents_for_choosing_and_for_judging_have_nothing_in_common() -> None:
    split = split_documents(NAMES)
    assert (len(split.choosing), len(split.judging)) == (4, 8)
    assert not split.choosing & split.judging and split.choosing | split.judging == set(NAMES)
    assert split == split_documents(reversed(NAMES)), "by their names, not by their order"


def test_too_few_documents_to_split_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="5 documents") as caught:
        split_documents(NAMES[:5])
    assert caught.value.exit_code == 2 and "raise evaluate.tokens" in str(caught.value)


def test_the_verdict_is_judged_on_other_documents_than_those_of_the_choice() -> None:
    split = split_documents(NAMES)
    arm = ArmResult("x", "", [], 1, 1, 1, 1, {}, [], [outcome(0), Outcome.failed(1, "killed")])
    study = Study("s", [arm, replace(arm, name="y")], {}, [], {}, "", "")
    judged = judged_on(study, split.judging).arms[0].outcomes
    assert {name for name, *_ in judged[0].documents} == split.judging
    losses = {name: total / tokens for name, total, tokens in outcome().documents}
    assert judged[0].loss == pytest.approx(np.mean([losses[name] for name in split.judging]))
    assert loss_on(outcome(), split.choosing) == pytest.approx(
        np.mean([losses[name] for name in split.choosing])
    )
    assert judged[1].failure == "killed" and judged[1].loss is None
