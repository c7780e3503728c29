"""Checks values that were tuned at one size at another one, which they were carried to."""

from __future__ import annotations

import math
from typing import NamedTuple

from lswt_core.ablation.runs.runner import Workers
from lswt_core.ablation.runs.store import RunStore
from lswt_core.ablation.study import Ablation
from lswt_core.ablation.tune import Ask, Found
from lswt_core.ablation.tuned import Tuner, Tuning
from lswt_core.ablation.tuning_grid import shift


class Neighbour(NamedTuple):
    """A value beside a carried one, at the size that it was carried to."""

    arm: str
    key: str
    value: float
    carried: float
    # loss at the value - loss at the carried one, on the documents for choosing, of one seed;
    # None: a run failed
    difference: float | None


def check_carried(
    ablation: Ablation, tuning: Tuning, store: RunStore, workers: Workers
) -> list[Neighbour]:
    """Try the values one step of the grid below and above every arm's chosen ones, at the size of a
    built ablation (of the arms as they are without these values), with the first seed of tuning.

    A carried value is confirmed where no difference is negative.
    """
    tuner = Tuner(ablation, store, workers)
    chosen = {arm: tuple((one.key, one.value) for one in tuning.found[arm]) for arm in tuner.arms}
    seed, asked = tuning.seeds[0], list[tuple[Found, float, Ask]]()
    for arm, values in chosen.items():
        for one in tuning.found[arm]:
            for value in (shift(one.value, one.search.factor, steps) for steps in (-1, 1)):
                others = tuple((dict(values) | {one.key: value}).items())
                asked.append((one, value, Ask(arm, others, seed)))
    carried = [Ask(arm, values, seed) for arm, values in chosen.items()]
    runs = [*carried, *(ask for *_, ask in asked)]
    losses = dict(zip(runs, tuner.evaluate(runs), strict=True))
    checked = []
    for one, value, ask in asked:
        difference = losses[ask] - losses[Ask(ask.arm, chosen[ask.arm], seed)]
        shown = difference if math.isfinite(difference) else None
        checked.append(Neighbour(ask.arm, one.key, value, one.value, shown))
    return checked
