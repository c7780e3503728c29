"""What the seeds of an ablation could have resolved, and how many a new study needs."""

from __future__ import annotations

from typing import Any

from lswt_core.ablation.report.family import describe_looks
from lswt_core.ablation.report.loss_tables import Report
from lswt_core.ablation.report.verdict import format_seeds


def list_power(report: Report) -> list[str]:
    """Return what intervals are, what the seeds could have resolved, how many a new study would
    need, and what looks were taken.
    """
    compared = [one for one in report["comparisons"] if one["std"] is not None]
    noise = [describe_noise(one) for one in compared]
    return [*describe_confidence(report), *noise, *describe_looks(report)]


def describe_confidence(report: Report) -> list[str]:
    """Return how intervals are computed; nothing where there are none."""
    levels = sorted({1 - one["level"] for one in report["comparisons"] if one["level"]})
    if not levels:
        return []
    shown = " to ".join(dict.fromkeys(f"{level:.2%}" for level in (levels[0], levels[-1])))
    return [
        "Intervals are Student's t of the differences at the same seed, each for one arm alone;"
        " p (looks, Holm) and verdicts are corrected for all arms. They are computed at a"
        f" confidence of {shown}, so that 95 % is left for all looks, those at seeds that may be"
        " added later included."
    ]


def describe_noise(one: dict[str, Any]) -> str:
    """Return the noise between an arm's seeds, and the seeds that a new study would need."""
    shared = ""
    if one["correlation"] is not None:
        shared = f"; the arms share noise with correlation {one['correlation']:.2f}"
    noise = f"differences between seeds vary by {one['std']:.2g} nats"
    margin = f"{one['margin']:g} nats"
    plans = [
        describe_plan(one, "seeds_needed", "resolve a difference like the one seen"),
        describe_plan(one, "margin_seeds", f"resolve a difference of {margin}"),
        describe_plan(one, "equivalence_seeds", f"show that the arm differs by less than {margin}"),
    ]
    wanted = "; ".join(filter(None, plans))
    new = f" With a chance of 80 %, a new study needs {wanted}." if wanted else ""
    return f"{one['arm']}: {noise}{shared}.{new}"


def describe_plan(one: dict[str, Any], key: str, aim: str) -> str:
    """Return how many seeds a new study needs for its aim; empty where that is not asked."""
    if key in one["unknown"]:
        return f"an unknown number of seeds to {aim}"
    if one[key] is None:
        return "" if key == "seeds_needed" else f"more seeds than are in sight to {aim}"
    return f"{format_seeds(one, key)} to {aim}"
