"""What an arm costs in time and memory against the baseline: ratios of paired runs with confidence
intervals, and whether they say anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lswt_core.ablation.runs.outcome import ArmResult, Outcome
from lswt_core.ablation.statistics.paired_runs import paired_test

# measured quantities of a run, and whether other runs on the same machine change them
MEASURED = {"tokens_per_second": True, "seconds": True, "peak_bytes": False}
OF_PROCESS = (
    "of the run's process, Python, libraries and what the allocator keeps included: not that of the"
    " model alone"
)


def compare_costs(baseline: ArmResult, arm: ArmResult, confidence: float) -> dict[str, Any]:
    """Return, for each measured quantity, how an arm compares with the baseline: see
    ``compare_measurements``.
    """
    pairs = arm.finished_pairs(baseline)
    return {
        name: compare_measurements(pairs, name, confidence, is_disturbed)
        for name, is_disturbed in MEASURED.items()
    }


def compare_measurements(
    pairs: Sequence[tuple[Outcome, Outcome]], name: str, confidence: float, is_disturbed: bool
) -> dict[str, Any] | None:
    """Return the arm's measurements over the baseline's at the same seeds; None if there are none.

    "ratio" is the geometric mean, "ci95" its interval (paired t, of logarithms), "shared" whether
    runs shared the machine (None: not recorded), "resolved" whether the ratio is more than noise.
    """
    values = [(getattr(one, name), getattr(other, name)) for one, other in pairs]
    logarithms = [math.log(after / before) for before, after in values if before and after]
    if not logarithms:
        return None
    test, shared = paired_test(logarithms, confidence), share_machine(pairs)
    interval = None
    if test.ci is not None:
        interval = [math.exp(bound) for bound in test.ci]
    disturbed = is_disturbed and bool(shared)
    spans_one = interval is None or interval[0] <= 1 <= interval[1]
    return {
        "ratio": math.exp(test.delta),
        "ci95": interval,
        "seeds": len(logarithms),
        "shared": shared,
        "resolved": not (disturbed or spans_one),
    }


def share_machine(pairs: Sequence[tuple[Outcome, Outcome]]) -> bool | None:
    """Return whether some of the runs were made beside others; None if not all are known."""
    counts = [outcome.runs_at_once for pair in pairs for outcome in pair]
    if any(count is not None and count > 1 for count in counts):
        return True
    return None if None in counts else False


def describe_cost(cost: dict[str, Any] | None) -> str:
    """Return a relative difference with its interval; "noise" where it is none."""
    if cost is None:
        return ""
    if cost["resolved"]:
        low, high = cost["ci95"]
        return f"{cost['ratio'] - 1:+.1%} ({low - 1:+.1%} .. {high - 1:+.1%})"
    if cost["ci95"] == [1.0, 1.0]:
        return "equal"
    return "noise"


def list_caveats(comparisons: Sequence[dict[str, Any]], device: str) -> list[str]:
    """Return what measured costs are, and why speeds may be shown as noise although their intervals
    are on one side of 1. ``device`` is that of the runs.
    """
    lines = []
    measured = [one["costs"] for one in comparisons]
    if any(costs["peak_bytes"] for costs in measured):
        what = "allocated on the accelerator" if device.startswith("cuda") else OF_PROCESS
        lines.append(
            f"Memory: the peak {what}. Amounts are medians over runs; their differences are"
            " geometric means over paired seeds, with an interval of 95 % each by itself: of"
            " twenty that are no different, one is shown as more than noise."
        )
    shared = [one["arm"] for one in comparisons if is_shared(one["costs"]["tokens_per_second"])]
    if shared:
        lines.append(
            f"{', '.join(shared)}: runs of the arm or of the baseline shared the machine with"
            " others, so that tokens/s and time say nothing; --jobs 1 measures them."
        )
    return lines


def is_shared(cost: dict[str, Any] | None) -> bool:
    """Whether a cost was measured while runs shared the machine."""
    return cost is not None and bool(cost["shared"])
