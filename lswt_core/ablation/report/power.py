"""What the seeds of an ablation could have resolved, and how many a new study needs."""

from __future__ import annotations

from typing import Any

from lswt_core.ablation.report.family import describe_looks
from lswt_core.ablation.report.loss_tables import Report


def list_power(report: Report) -> list[str]:
    """Return what the seeds could have resolved, how many a new study would need, and what looks
    were taken.
    """
    compared = [one for one in report["comparisons"] if one["std"] is not None]
    return [describe_noise(one) for one in compared] + describe_looks(report)


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
    most = one[f"{key}_at_most"]
    bound = "no known limit" if most is None else f"{most:,} at the most"
    return f"{one[key]:,} seeds ({bound}) to {aim}"
