"""The report of a comparison as plain data: the study at the recipe's values, and beside it how
values were tuned, the study at these, and the differences at other lengths of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from lswt_core.ablation.comparison import Comparison
from lswt_core.ablation.horizons import AtHorizon
from lswt_core.ablation.report.compare import make_report
from lswt_core.ablation.report.facts import list_arm_runs
from lswt_core.ablation.report.verdict import ALPHA
from lswt_core.ablation.report.worth import worth_of_compute
from lswt_core.ablation.statistics.paired_runs import adjust_holm, sample_std
from lswt_core.ablation.tune import Found, measure_sensitivity
from lswt_core.ablation.tuned import Tuning, TuningRun

Data = dict[str, Any]
# parts of a report that belong to the study at the recipe's values, or to the tuned one
PARTS = ("arms", "comparisons", "certificate")
PROCEDURE = (
    "The same grid rule, number of points and number of seeds for every arm, the baseline included,"
    " at the full length of training. Successive halving over seeds: every point with the first"
    " seed, the better half with each further one; a run that diverged is worse than any loss. A"
    " grid whose best point is at its edge is extended there. The chosen value is the vertex of the"
    " parabola through the best point and its neighbours, on a logarithmic scale. Several options"
    " are tuned one after the other, each at the best values of those before it. Seeds and held-out"
    " documents of tuning are not those of the verdict."
)


def make_comparison_report(comparison: Comparison) -> Data:
    """Return the whole report: that of ``compare.make_report`` for every arm at its recipe's
    values, and these keys, None where they were not asked for:

    "tuning": procedure; options {key, points, factor, low}; seeds; documents {choosing, judging};
    arms {arm, runs, chosen}, with chosen of each option {key, own (the recipe's value), value,
    best_point, grid, added, refused, bracketed, why (not bracketed), curve [{value, seeds, losses,
    failed, mean, std}], sensitivity (nats)}; runs {arm, values, seed, loss, failure, key (of the
    store)}.
    "tuned": arms, comparisons and certificate of every arm at its chosen values, with the keys of
    the report's. "horizons": at [{multiple, steps, tokens, comparisons (with ``p_horizons``,
    adjusted by Holm over all arms and horizons), baseline (its mean loss), runs {arm, seed, loss,
    failure, key}}], crossings {arm, from, to (multiples), deltas}, worth {arm, value, ci95} of the
    difference at the recipe's length (``worth.worth_of_compute``).
    """
    report = make_report(comparison.fixed) | dict.fromkeys(("tuning", "tuned", "horizons"))
    if comparison.tuning is not None and comparison.tuned is not None:
        tuned = make_report(comparison.tuned)
        report["tuning"] = describe_tuning(comparison.tuning)
        report["tuned"] = {part: tuned[part] for part in PARTS}
    if comparison.horizons:
        report["horizons"] = describe_horizons(comparison.horizons)
    return report


def headline_report(report: Data) -> Data:
    """Return the report as it is shown: its arms and comparisons are those of the headline, and
    "fixed" has those at the recipe's values; None: they are the headline.
    """
    if report["tuned"] is None:
        return report | {"fixed": None}
    return report | report["tuned"] | {"fixed": {part: report[part] for part in PARTS}}


# ---------- tuning


def describe_tuning(tuning: Tuning) -> Data:
    """Return how values were chosen."""
    arms = []
    for arm, found in tuning.found.items():
        own = [run for run in tuning.runs if run.ask.arm == arm]
        chosen = [describe_found(one, own) for one in found]
        arms.append({"arm": arm, "runs": len(own), "chosen": chosen})
    return {
        "procedure": PROCEDURE,
        "options": [option._asdict() for option in tuning.options],
        "seeds": list(tuning.seeds),
        "documents": {name: sorted(names) for name, names in tuning.documents._asdict().items()},
        "arms": arms,
        "runs": [describe_run(run) for run in tuning.runs],
    }


def describe_run(run: TuningRun) -> Data:
    """Return a run that was made to choose a value."""
    ask, result = run.ask, {"loss": run.loss, "failure": run.failure, "key": run.key}
    return {"arm": ask.arm, "values": dict(ask.values), "seed": ask.seed, **result}


def describe_found(found: Found, runs: Sequence[TuningRun]) -> Data:
    """Return what the search of an option came to."""
    search, first = found.search, found.search.seeds[0]
    losses = {trial.value: loss for trial, loss in search.losses.items() if trial.seed == first}
    initial = [run.initial_loss for run in runs if run.initial_loss is not None]
    finite = any(loss < math.inf for loss in losses.values())
    sensitivity = None
    if initial and finite:
        sensitivity = measure_sensitivity(losses, found.grid, max(initial))
    return {
        "key": found.key,
        "own": found.own,
        "value": found.value,
        "best_point": search.best(),
        "grid": list(found.grid),
        "added": list(search.added),
        "refused": search.refused,
        "bracketed": search.is_bracketed,
        "why": explain_edge(found),
        "curve": [describe_point(value, search.losses_of(value)) for value in search.points],
        "sensitivity": sensitivity,
    }


def explain_edge(found: Found) -> str:
    """Return why there are no points on both sides of the chosen one; empty if there are."""
    search = found.search
    if search.is_bracketed:
        return ""
    if search.has_failed:
        return "the runs of the best points all failed"
    if search.refused is not None:
        return f"the recipe refuses {search.refused:g}"
    return f"the grid was extended {len(search.added)} times"


def describe_point(value: float, losses: dict[int, float]) -> Data:
    """Return a point of a sensitivity curve: losses by seed, and their spread over seeds."""
    finished = [loss for loss in losses.values() if loss < math.inf]
    return {
        "value": value,
        "seeds": list(losses),
        "losses": [loss if loss < math.inf else None for loss in losses.values()],
        "failed": len(losses) - len(finished),
        "mean": fmean(finished) if finished else None,
        "std": sample_std(finished) if len(finished) > 1 else None,
    }


# ---------- horizons


def describe_horizons(horizons: Sequence[AtHorizon]) -> Data:
    """Return the differences at every length of training, where their sign changes, and what they
    are worth.
    """
    reports = [make_report(one.study) for one in horizons]
    at = [describe_length(one, report) for one, report in zip(horizons, reports, strict=True)]
    compared = [entry for one in at for entry in one["comparisons"]]
    adjusted = adjust_holm([entry["p"] for entry in compared])
    for entry, p in zip(compared, adjusted, strict=True):
        entry["p_horizons"] = p
    lengths = [(one["multiple"], one["baseline"]) for one in at if one["baseline"] is not None]
    own = next(one for one, at in zip(reports, horizons, strict=True) if at.multiple == 1.0)
    return {
        "at": at,
        "crossings": list(find_crossings(at)),
        "worth": list(list_worth(own, lengths)),
    }


def describe_length(one: AtHorizon, report: Data) -> Data:
    """Return the entry of a length of training."""
    return {
        "multiple": one.multiple,
        "steps": one.steps,
        "tokens": report["settings"]["tokens"],
        "comparisons": report["comparisons"],
        "baseline": report["arms"][0]["final_loss"]["mean"],
        "runs": list_arm_runs(report["arms"]),
    }


def list_worth(report: Data, lengths: Sequence[tuple[float, float]]) -> Iterator[Data]:
    """Yield what every arm's difference at the recipe's length is worth in compute; ``lengths``:
    the baseline's losses by multiple of the recipe's steps.
    """
    baseline, *arms = report["arms"]
    for one, arm in zip(report["comparisons"], arms, strict=True):
        if one["delta"] is None or not (arm["training_flops"] and baseline["training_flops"]):
            continue
        cost, ends = arm["training_flops"] / baseline["training_flops"], None
        if one["ci95"] is not None:  # a higher loss is worth less
            ends = [worth_of_compute(end, cost, lengths) for end in reversed(one["ci95"])]
        value = worth_of_compute(one["delta"], cost, lengths)
        yield {"arm": one["arm"], "value": value, "ci95": ends}


def find_crossings(at: Sequence[Data]) -> Iterator[Data]:
    """Yield every pair of successive lengths at which an arm's difference is resolved and of
    another sign; lengths at which it is not resolved are passed over.
    """
    for index, arm in enumerate(one["arm"] for one in at[0]["comparisons"]):
        before = None
        for one in at:
            entry = one["comparisons"][index]
            if entry["p_horizons"] is None or entry["p_horizons"] > ALPHA or not entry["delta"]:
                continue
            now = {"multiple": one["multiple"], "delta": entry["delta"]}
            if before is not None and before["delta"] * now["delta"] < 0:
                deltas = [before["delta"], now["delta"]]
                yield {
                    "arm": arm,
                    "from": before["multiple"],
                    "to": now["multiple"],
                    "deltas": deltas,
                }
            before = now
