"""How many seeds a new study of the same arm would need: to resolve the observed difference, one as
large as the margin, or to show equivalence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lswt_core.ablation.statistics.looks import RESERVE, nominal_level
from lswt_core.ablation.statistics.paired_runs import (
    equivalence_seeds,
    power,
    seeds_needed,
    std_upper_limit,
)

# Keys of a comparison. Each "..._at_most" is for the upper confidence limit (95 %) of the noise.
PLANS = (
    "power",  # of these seeds, to resolve a difference as large as the margin
    "seeds_needed",  # of a new study with one declared look, to resolve the observed difference
    "seeds_needed_at_most",  # and for the end of its interval that is nearer to 0
    "margin_seeds",  # to resolve a difference as large as the margin
    "margin_seeds_at_most",
    "equivalence_seeds",  # to find an arm equivalent that does not differ
    "equivalence_seeds_at_most",
)


def add_plans(
    comparisons: Sequence[dict[str, Any]], compute: Callable[..., Any], confidence: float
) -> None:
    """Add PLANS to every comparison whose p values are adjusted; None where a number does not
    apply, or not even ``statistics.paired_runs.MAX_SEEDS`` would do.

    A new study spends 1 - RESERVE of alpha at its declared look, and Holm's correction is as here.
    The observed difference needs a number only where its interval does not contain 0: else nobody
    knows whether there is one.
    """
    for one in comparisons:
        one |= dict.fromkeys(PLANS)
        if one["std"] is not None and one["alpha"] is not None:
            add_plan(one, partial(compute, one["unknown"]), confidence)


def add_plan(one: dict[str, Any], ask: Callable[..., Any], confidence: float) -> None:
    """Add PLANS to a comparison."""
    noise = {"": one["std"], "_at_most": None}
    if one["std"] > 0:
        noise["_at_most"] = ask("std_upper", std_upper_limit, one["std"], one["seeds"], confidence)
    margin, level = one["margin"], (1 - RESERVE) * one["alpha"]
    nearest = {"": one["delta"], "_at_most": nearest_to_zero(one["ci95"])}
    for suffix, std in noise.items():
        one[f"margin_seeds{suffix}"] = ask("margin_seeds", seeds_needed, margin, std, level)
        if nearest["_at_most"]:
            one[f"seeds_needed{suffix}"] = ask(
                "seeds_needed", seeds_needed, nearest[suffix], std, level
            )
        if one["alpha_equivalent"] is not None:
            share = (1 - RESERVE) * one["alpha_equivalent"]
            one[f"equivalence_seeds{suffix}"] = ask(
                "equivalence_seeds", equivalence_seeds, margin, std, share
            )
    one["power"] = ask("power", power_at_margin, one)


def nearest_to_zero(interval: tuple[float, float] | None) -> float:
    """Return the end of an interval that is nearer to 0; 0 if it contains 0, or there is none."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return 0.0
    return min(interval, key=abs)


def power_at_margin(one: dict[str, Any]) -> float:
    """Return the power of these seeds, at this look, at a difference as large as the margin."""
    declared, pairs = tuple(one["looks"]["declared"]), one["seeds"]
    level = nominal_level(one["alpha"], declared, pairs)
    if level == 0.0:
        return 0.0
    return 1.0 if one["std"] == 0.0 else power(one["margin"], one["std"], pairs, level)
