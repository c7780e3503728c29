"""Seeds crossed with documents: the interval of a difference over other seeds *and* other documents
of the same kind.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]


class ErrorParts(NamedTuple):
    """The squared standard error of a mean over seeds and documents, from three sources."""

    seeds: float  # the choice of seeds: their own effect, and that with each document
    documents: float  # the choice of documents: their own effect, and that with each seed
    both: float  # of seed and document together, which is in both of the others
    seed_degrees: float
    document_degrees: float

    def total(self) -> tuple[float, float]:
        """Return the squared standard error and its degrees of freedom (Satterthwaite 1946). Where
        seeds differ by no more than their documents explain, they have no effect of their own.
        """
        if self.seeds <= self.both:
            return self.documents, self.document_degrees
        total = self.seeds + self.documents - self.both
        spread = (
            self.seeds**2 / self.seed_degrees
            + self.documents**2 / self.document_degrees
            + self.both**2 / (self.seed_degrees * self.document_degrees)
        )
        return total, total**2 / spread


def crossed_interval(
    differences: Floats, tokens: Floats, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the confidence interval of the mean difference per token over other seeds and other
    documents, in the two-way random effects model (Owen 2007 has its bootstrap).

    ``differences`` of summed losses [seeds, documents], at least two of each: tokens * (delta +
    effect of seed + effect of document + effect of both); tokens [documents].
    """
    delta = float(differences.sum() / (len(differences) * tokens.sum()))
    square, degrees = error_parts(differences, tokens).total()
    critical = -float(special.stdtrit(degrees, (1 - confidence) / 2))
    half = critical * math.sqrt(square)
    return delta - half, delta + half


def error_parts(differences: Floats, tokens: Floats) -> ErrorParts:
    """Return the parts of the squared standard error.

    The mean per token is a ratio, and residuals are its linearisation. Those of a document are
    divided by 1 - its share of the tokens, as the jackknife does, because a large document pulls
    the mean towards itself. Unequal documents count as fewer (Kish 1965).
    """
    seeds, shares = len(differences), tokens / tokens.sum()
    delta = differences.sum() / (seeds * tokens.sum())
    residuals = (differences - delta * tokens) / tokens.sum()  # [seeds, documents]
    by_seed, by_document = residuals.sum(1), residuals.mean(0)
    both = residuals - by_document - np.outer(by_seed, shares)
    left = 1 - shares
    return ErrorParts(
        seeds=float((by_seed**2).sum()) / (seeds * (seeds - 1)),
        documents=float(((by_document / left) ** 2).sum()),
        both=float(((both / left) ** 2).sum()) / (seeds * (seeds - 1)),
        seed_degrees=seeds - 1,
        document_degrees=1 / float((shares**2).sum()) - 1,
    )
