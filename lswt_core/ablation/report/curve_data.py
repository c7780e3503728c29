"""report-curves.csv: the curves of every run as data."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import StringIO
from typing import Any

from lswt_core.ablation.comparison import Comparison
from lswt_core.ablation.runs.outcome import Outcome, Study

CURVES = "report-curves.csv"
# curve: "training" (at: tokens trained on), "held-out" (the same) or "position" (at: preceding
# tokens of the document, the lower edge of a bucket; tokens: how many are in it)
HEADER = ("study", "arm", "seed", "curve", "at", "loss", "tokens")


def format_curves(studies: list[tuple[str, Study]]) -> str:
    """Return the curves of all runs of some studies, by name, as CSV."""
    file = StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEADER)
    for name, study in studies:
        for arm in study.arms:
            for outcome in arm.outcomes:
                for row in list_points(outcome):
                    writer.writerow([name, arm.name, outcome.seed, *row])
    return file.getvalue()


def list_points(outcome: Outcome) -> Iterator[tuple[Any, ...]]:
    """Yield curve, at, loss and tokens of the points of a run."""
    for at, loss in outcome.curve:
        yield "training", at, loss, ""
    for at, loss in outcome.evaluations:
        yield "held-out", at, loss, ""
    for at, loss, tokens in outcome.positions:
        yield "position", at, loss, tokens


def name_studies(comparison: Comparison, place: str = "") -> list[tuple[str, Study]]:
    """Return every study of a comparison with its name: that of the verdict, that at the recipe's
    values if it is another, and those at other lengths of training.
    """
    named = [(f"verdict{place}", comparison.headline)]
    if comparison.tuned is not None:
        named.append((f"recipe's values{place}", comparison.fixed))
    for one in comparison.horizons:
        if one.multiple != 1.0:
            named.append((f"{one.multiple:g} times the steps{place}", one.study))
    return named
