"""What an ablation cannot tell, in one place."""

from __future__ import annotations

from typing import Any

from lswt_core.ablation.report.facts import find_source
from lswt_core.ablation.report.family import describe_family
from lswt_core.ablation.report.held_out_text import FEWEST_CROSSED
from lswt_core.ablation.report.ladder_text import describe_carried, describe_rates
from lswt_core.ablation.report.loss_tables import Report
from lswt_core.ablation.report.tuning_text import (
    describe_tuned_values,
    describe_untuned,
    list_edges,
)
from lswt_core.ablation.report.verdict import BETTER, EQUIVALENT, SMALL, UNRESOLVED, WORSE

FEW_SEEDS = 5  # fewer get a remark
OPTIMAL = 20  # tokens per parameter (Hoffmann et al. 2022); less than half gets a remark
NOISY = 4.0  # times the baseline's standard deviation over seeds; more gets a remark


def list_limits(report: Report) -> list[str]:
    """Return what the verdicts of a report do not hold for, the gravest first."""
    return [
        *limit_values(report),
        *limit_scope(report),
        *limit_documents(report),
        *report["text"]["warnings"],
        *limit_seeds(report),
        *limit_runs(report),
        *describe_family(report),
        *(f"{note}." for note in report["settings"].get("notes", ())),
    ]


def limit_values(report: Report) -> list[str]:
    """Return how far hyper-parameters suit every arm."""
    if report.get("tuning") is not None:
        carried = describe_carried(report["ladder"]) if "ladder" in report else []
        return [*list_edges(report), *describe_tuned_values(report), *carried]
    return describe_rates(report) if "ladder" in report else describe_untuned()


def limit_scope(report: Report) -> list[str]:
    """Return the size, the length of training and the text that were not left."""
    baseline, alone = report["arms"][0], []
    if "ladder" not in report:
        size = f"{baseline['parameters']:,} parameters"
        alone.append(f"one size of model ({size}; --ladder asks at several)")
    if report.get("horizons") is None:
        at = "at the largest size, " if "ladder" in report else ""
        alone.append(f"one length of training ({at}{describe_length(baseline)}; --horizons)")
    source = find_source(report)
    text = f"one text{f' ({source})' if source else ''}"
    sentence = f"It holds for {' and '.join(alone)}, and " if alone else "It holds for "
    return [f"{sentence}{text}: how another kind of text would do is not known."]


def describe_length(baseline: dict[str, Any]) -> str:
    """Return how long models are trained for their size."""
    ratio = baseline["tokens"] / baseline["parameters"]
    usual = f" where about {OPTIMAL} are compute-optimal" if ratio < OPTIMAL / 2 else ""
    return f"{ratio:.2g} tokens per parameter{usual}"


def limit_runs(report: Report) -> list[str]:
    """Return how many runs warned of something."""
    runs = [run for arm in report["arms"] for run in arm["runs"]]
    heeded = sum(bool(run["warnings"]) for run in runs)
    return [f"{heeded} of {len(runs)} runs gave warnings (see Runs)."] if heeded else []


def limit_documents(report: Report) -> list[str]:
    """Return which verdicts other documents of this kind might change."""
    sentences, unknown = [], []
    for one in report["comparisons"]:
        interval, verdict = one["kind_of_text_ci95"], one["verdict"]
        if verdict not in (BETTER, WORSE, *SMALL, EQUIVALENT):
            continue
        if interval is None:
            unknown.append(one["arm"])
        elif verdict == EQUIVALENT and max(map(abs, interval)) > one["margin"]:
            sentences.append(
                f"{one['arm']}: equivalent on this text; on other documents of this kind it may"
                " differ by more than the margin."
            )
        elif verdict != EQUIVALENT and interval[0] <= 0 <= interval[1]:
            sentences.append(
                f"{one['arm']}: {verdict} on this text; on other documents of this kind the"
                " difference may be none, or of the other sign."
            )
    if unknown:
        sentences.append(
            f"Whether it holds on other documents is not known: {', '.join(unknown)} (less than"
            f" {FEWEST_CROSSED[0]} seeds or {FEWEST_CROSSED[1]} documents)."
        )
    return sentences


def limit_seeds(report: Report) -> list[str]:
    """Return what is not known for want of seeds."""
    seeds, sentences = len(report["settings"]["seeds"]), []
    if seeds < FEW_SEEDS:
        sentences.append(
            f"{seeds} seed{'s' if seeds != 1 else ''}: how much losses vary between seeds is itself"
            " hardly known."
        )
    sentences += list_noisy(report["arms"])
    unresolved = [one["arm"] for one in report["comparisons"] if one["verdict"] == UNRESOLVED]
    if unresolved:
        sentences.append(f"Not resolved: {', '.join(unresolved)}. That is no evidence of equality.")
    return sentences


def list_noisy(arms: list[dict[str, Any]]) -> list[str]:
    """Return which arms vary much more between seeds than the baseline does, or much less."""
    baseline, sentences = arms[0]["final_loss"]["std"], []
    for arm in arms[1:]:
        std = arm["final_loss"]["std"]
        if not baseline or not std or max(std / baseline, baseline / std) < NOISY:
            continue
        sentences.append(
            f"{arm['name']}: its losses vary {std / baseline:.2g} times as much between seeds as"
            " the baseline's, and one run may decide: see Every seed."
        )
    return sentences
