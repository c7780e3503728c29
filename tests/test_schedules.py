"""Schedules against the family's own numbers, written-out formulas and the limits of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from lswt_schedules import Constant, Cosine, WarmupStableDecay

from lswt_core.interfaces import Horizon, Schedule
from lswt_core.model.components import build_schedule
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

GOLDEN = Path(__file__).parent / "golden" / "lswt_train" / "schedule.json"


def golden_rows() -> list[tuple[str, dict, float, float]]:
    runs = json.loads(GOLDEN.read_text())
    return [
        (name, run["config"], step, ratio)
        for name, run in runs.items()
        for step, ratio, _ in run["rows"]
        if step > 0
    ]


@pytest.mark.parametrize(("name", "config", "step", "ratio"), golden_rows())
def test_cosine_equals_the_family(name: str, config: dict, step: int, ratio: float) -> None:
    tokens_per_step, tokens = (
        config["batch_size"] * config["length_sequence"],
        config["lr_cooldown_tokens"],
    )
    # 30e9 / 983,040 tokens is no integer
    horizon = Horizon(-(-tokens // tokens_per_step), tokens_per_step, tokens)
    schedule = Cosine(
        horizon, warmup_steps=config["lr_warmup_steps"], floor=config["lr_cooldown_ratio"]
    )
    assert schedule.factor(step) == pytest.approx(ratio, rel=1e-12)


def test_a_recipes_length_in_tokens_reaches_the_schedule() -> None:
    registry, recipes = Registry(), GOLDEN.parents[3] / "recipes"
    assert build_schedule(Recipe.load(recipes / "tiny.toml"), registry).horizon == Horizon(
        30_518, 983_040, 30_000_000_000
    )
    assert build_schedule(Recipe.load(recipes / "quickstart.toml"), registry).horizon == Horizon(
        450, 1024
    )


@pytest.mark.parametrize("tokens_per_step", [1, 12, 983_040])
def test_cosine_equals_its_formula_in_tokens(tokens_per_step: int) -> None:
    warmup, steps, floor = 7, 50, 0.25
    schedule = Cosine(Horizon(steps, tokens_per_step), warmup_steps=warmup, floor=floor)
    for step in range(1, 60):
        tokens, start, total = (
            step * tokens_per_step,
            warmup * tokens_per_step,
            steps * tokens_per_step,
        )
        share = min(max((tokens - start) / (total - start), 0), 1)
        cooled = (math.cos(math.pi * share) / 2 + 1 / 2) * (1 - floor) + floor
        assert schedule.factor(step) == pytest.approx(min(step / warmup, 1, cooled), rel=1e-14)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("1-sqrt", [0.5, 1, 1, 1, 1, 1, 0.6, 0.434315, 0.307180, 0.2, 0.2]),
    ],
)
def test_wsd_warms_up_stays_and_decays_to_its_floor(shape: str, expected: list[float]) -> None:
    schedule = WarmupStableDecay(
        Horizon(10, 64), warmup_steps=2, decay_share=0.4, shape=shape, floor=0.2
    )
    assert [schedule.factor(step) for step in range(1, 12)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("warmup", "expected"), [(0, [1, 1, 1, 1]), (3, [1 / 3, 2 / 3, 1, 1])])
def test_constant_stays_at_the_peak(warmup: int, expected: list[float]) -> None:
    schedule = Constant(Horizon(4, 8), warmup_steps=warmup)
    assert [schedule.factor(step) for step in range(1, 5)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", [Cosine, WarmupStableDecay, Constant])
def test_without_warm_up_the_first_update_is_near_the_peak(schedule: type[Schedule]) -> None:
    assert schedule(Horizon(1000, 8), warmup_steps=0).factor(1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("schedule", [Cosine, Constant])
@pytest.mark.parametrize("steps", [1, 99, 100])
def test_a_run_that_ends_within_its_warm_up_only_warms_up(
    schedule: type[Schedule], steps: int
) -> None:
    short = schedule(Horizon(steps, 8), warmup_steps=100)
    assert [short.factor(step) for step in range(1, steps + 1)] == [
        step / 100 for step in range(1, steps + 1)
    ]


def test_a_decay_that_begins_inside_the_warm_up_is_the_lower_of_both() -> None:
    short = WarmupStableDecay(Horizon(10, 8), warmup_steps=8, decay_share=0.5)
    assert [short.factor(step) for step in range(1, 11)] == pytest.approx(
        [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.6, 0.4, 0.2, 0.0]
    )
