"""What an ablation cannot tell, in one place."""

from __future__ import annotations

from lswt_core.ablation.report.family import describe_family
from lswt_core.ablation.report.ladder_text import describe_carried, describe_rates
from lswt_core.ablation.report.loss_tables import Report
from lswt_core.ablation.report.tuning_text import (
    describe_tuned_values,
    describe_untuned,
    list_edges,
)
from lswt_core.ablation.report.verdict import UNRESOLVED

FEW_SEEDS = 5  # fewer get a remark


def list_limits(report: Report) -> list[str]:
    """Return what the verdicts of a report do not hold for, the gravest first."""
    return [
        *limit_values(report),
        *limit_scope(report),
        *report["text"]["warnings"],
        *limit_seeds(report),
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
    alone = []
    if "ladder" not in report:
        alone.append("one size of model (--ladder asks at several)")
    if report.get("horizons") is None:
        alone.append("one length of training (--horizons)")
    sentence = f"It holds for {' and '.join(alone)}, and " if alone else "It holds for "
    return [f"{sentence}one text: how another kind of text would do is not known."]


def limit_seeds(report: Report) -> list[str]:
    """Return what is not known for want of seeds."""
    seeds, sentences = len(report["settings"]["seeds"]), []
    if seeds < FEW_SEEDS:
        sentences.append(
            f"{seeds} seed{'s' if seeds != 1 else ''}: how much losses vary between seeds is itself"
            " hardly known."
        )
    unresolved = [one["arm"] for one in report["comparisons"] if one["verdict"] == UNRESOLVED]
    if unresolved:
        sentences.append(f"Not resolved: {', '.join(unresolved)}. That is no evidence of equality.")
    return sentences
