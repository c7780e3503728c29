"""What the held-out text is, and how far differences hold beyond it: over other documents of the
same kind, for these models or for other seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lswt_core.ablation.runs.outcome import Outcome, Study
from lswt_core.ablation.statistics.crossed import crossed_interval
from lswt_core.ablation.statistics.paired_runs import bootstrap_documents

FEWEST_DOCUMENTS = 30  # fewer get a warning
LARGEST_SHARE = 0.05  # of the tokens, in one document; more gets a warning
# of intervals over seeds and documents; with fewer their coverage was not 93-97 % in simulations
FEWEST_CROSSED = (3, 10)


def describe_text(study: Study) -> dict[str, Any]:
    """Return documents, tokens, the share of the largest document {name, share} and warnings of the
    text that the baseline was evaluated on; None where that is unknown.
    """
    runs = [one for one in study.arms[0].finished_runs() if one.documents]
    if not runs:
        return {"documents": None, "tokens": None, "largest": None, "warnings": []}
    documents = runs[0].documents
    total = sum(tokens for *_, tokens in documents)
    name, _, most = max(documents, key=lambda one: one[2])
    largest = {"name": name, "share": most / total}
    warnings = warn_of_text(len(documents), name, most / total)
    return {"documents": len(documents), "tokens": total, "largest": largest, "warnings": warnings}


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
    pairs: Sequence[tuple[Outcome, Outcome]], confidence: float
) -> tuple[float, float] | None:
    """Return the confidence interval of the difference over other seeds and other documents of this
    kind; None where there are too few of either, or different ones.
    """
    losses, (seeds, documents) = losses_by_document(pairs), FEWEST_CROSSED
    if losses is None or len(pairs) < seeds or len(losses[2]) < documents:
        return None
    baseline, arm, tokens = losses
    return crossed_interval(arm - baseline, tokens, confidence)


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
