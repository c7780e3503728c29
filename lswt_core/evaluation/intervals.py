"""Confidence intervals over documents: tokens of one document are alike, documents are drawn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 2_000
CHUNK_NUMBERS = 4_000_000  # in memory at a time
LEAST_DOCUMENTS = 5  # with fewer a bootstrap says nothing


class Mean(NamedTuple):
    """A mean over tokens."""

    value: float
    # 95 % interval over other documents of the same kind; None with too few documents
    interval: tuple[float, float] | None
    tokens: int


def mean_over_tokens(values: np.ndarray, documents: np.ndarray) -> Mean:
    """Return the mean of values [tokens] and its interval by the bootstrap over documents [tokens]
    (percentiles of the ratio of sums).
    """
    sums = np.bincount(documents, weights=values)
    counts = np.bincount(documents).astype(np.float64)
    sums, counts = sums[counts > 0], counts[counts > 0]
    value = float(sums.sum() / counts.sum())
    if len(counts) < LEAST_DOCUMENTS:
        return Mean(value, None, len(values))
    return Mean(value, bootstrap_ratio(sums, counts), len(values))


def bootstrap_ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of sum(sums) / sum(counts) over resampled documents."""
    draw, even = np.random.default_rng(0), np.full(len(counts), 1 / len(counts))
    means = []
    for _ in range(0, RESAMPLES, chunk := max(1, min(RESAMPLES, CHUNK_NUMBERS // len(counts)))):
        times = draw.multinomial(len(counts), even, size=chunk)  # [chunk, documents]
        means.append((times @ sums) / (times @ counts))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
