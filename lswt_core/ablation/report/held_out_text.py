"""What the held-out text is, and how far differences hold beyond it: over other documents of the
same kind, for these models or for other seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lswt_core.ablation.report.facts import common
from lswt_core.ablation.report.loss_tables import format_difference
from lswt_core.ablation.runs.outcome import Outcome, Study
from lswt_core.ablation.statistics.crossed import crossed_interval
from lswt_core.ablation.statistics.paired_runs import bootstrap_documents

FEWEST_DOCUMENTS = 30  # fewer get a warning
LARGEST_SHARE = 0.05  # of the tokens, in one document; more gets a warning
# of intervals over seeds and documents; with fewer their coverage was not 93-97 % in simulations
FEWEST_CROSSED = (3, 10)
SHOWN = 8  # documents by name


def describe_text(study: Study) -> dict[str, Any]:
    """Return what the baseline was evaluated on; None where that is unknown.

    "documents", "tokens", "largest" {name, share}, "most" (the SHOWN largest documents {name,
    tokens, share}), "effective" (1 / sum of squared shares: so many documents of equal size are as
    concentrated), "half" (documents that hold half of the tokens), "fingerprint" (of the data
    source), "sha256" (of the evaluated tokens) and "warnings".
    """
    runs = [one for one in study.arms[0].finished_runs() if one.documents]
    unknown = dict.fromkeys(("documents", "tokens", "largest", "effective", "half"))
    facts = {
        "fingerprint": common({one.text for one in runs}),
        "sha256": common({one.evaluated_text for one in runs}),
    }
    if not runs:
        return {**unknown, **facts, "most": [], "warnings": []}
    documents = [(name, tokens) for name, _, tokens in runs[0].documents]
    documents.sort(key=lambda one: -one[1])
    total = sum(tokens for _, tokens in documents)
    shares = np.array([tokens / total for _, tokens in documents])
    most = [
        {"name": name, "tokens": tokens, "share": tokens / total}
        for name, tokens in documents[:SHOWN]
    ]
    return {
        "documents": len(documents),
        "tokens": total,
        "largest": {key: most[0][key] for key in ("name", "share")},
        "most": most,
        "effective": float(1 / np.square(shares).sum()),
        "half": int(np.searchsorted(shares.cumsum(), 0.5)) + 1,
        **facts,
        "warnings": warn_of_text(len(documents), documents[0][0], shares[0]),
    }


def warn_of_text(documents: int, largest: str, share: float) -> list[str]:
    """Return what is wrong with a held-out text."""
    warnings = []
    if documents < FEWEST_DOCUMENTS:
        warnings.append(
            f"The held-out text has {documents} documents, fewer than {FEWEST_DOCUMENTS}: nobody"
            " knows how much another text would differ."
        )
    if share > LARGEST_SHARE:
        warnings.append(
            f"One document, {largest}, has {share:.0%} of the evaluated tokens: results are in part"
            " about it alone."
        )
    return warnings


def documents_interval(
    pairs: Sequence[tuple[Outcome, Outcome]], confidence: float
) -> tuple[float, float] | None:
    """Return the confidence interval of the difference over other held-out documents, for these
    very models; None where there is one document, or the runs were evaluated on different ones.
    """
    losses = losses_by_document(pairs)
    if losses is None or len(losses[2]) < 2:
        return None
    return bootstrap_documents(*losses, confidence)


def kind_of_text_interval(
    pairs: Sequence[tuple[Outcome, Outcome]],
    confidence: float,
    on_this_text: tuple[float, float] | None,
) -> tuple[float, float] | None:
    """Return the confidence interval of the difference over other seeds and other documents of this
    kind; None where there are too few of either, or different ones.

    ``on_this_text``: the interval over other seeds, which it contains. That documents seem to make
    a difference more certain is noise in the estimate of their variance.
    """
    losses, (seeds, documents) = losses_by_document(pairs), FEWEST_CROSSED
    if losses is None or len(pairs) < seeds or len(losses[2]) < documents:
        return None
    if on_this_text is None:
        return None
    baseline, arm, tokens = losses
    low, high = crossed_interval(arm - baseline, tokens, confidence)
    return min(low, on_this_text[0]), max(high, on_this_text[1])


def losses_by_document(
    pairs: Sequence[tuple[Outcome, Outcome]],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the summed losses [seeds, documents] of the baseline and of the arm, and the tokens
    [documents]; None where the runs were evaluated on different documents, or on none.
    """
    outcomes = [one for pair in pairs for one in pair]
    documents = [[(name, tokens) for name, _, tokens in one.documents] for one in outcomes]
    if not documents[0] or any(other != documents[0] for other in documents):
        return None
    # [2 pairs, documents]
    sums = np.array([[total for _, total, _ in one.documents] for one in outcomes])
    tokens = np.array([tokens for _, tokens in documents[0]], dtype=np.float64)
    return sums[::2], sums[1::2], tokens


def list_document_intervals(report: dict[str, Any]) -> list[str]:
    """Return the uncertainty from the choice of held-out documents."""
    lines = []
    if any(one["kind_of_text_ci95"] for one in report["comparisons"]):
        lines.append(
            "Intervals are over other seeds. Those on other documents of this kind are over other"
            " seeds and other documents, and no narrower; where they are no wider, documents add no"
            " uncertainty that could be seen."
        )
    for one in report["comparisons"]:
        if one["documents_ci95"] is not None:
            low, high = map(format_difference, one["documents_ci95"])
            lines.append(
                f"{one['arm']}: over other held-out documents of this kind, for these very models,"
                f" {low} to {high} (95 % interval)."
            )
    return lines
