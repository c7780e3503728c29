"""Sizes of hidden states: massive activations, kurtosis and isotropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.decode.load_run import LoadedModel

# Sun et al. 2024 (arXiv 2402.17762): above 100, and above 1,000 times the median magnitude
LARGE, TIMES_MEDIAN = 100.0, 1_000.0


class Activations(NamedTuple):
    """Hidden states of a text, after every block."""

    largest: float  # magnitude, over all layers
    largest_over_median: float  # of the layer where this is largest
    massive: int  # activations that are massive in the sense of Sun et al.
    kurtosis: float  # over channels, averaged over tokens and layers; 3: normal
    isotropy: float  # of the final states: 1 - mean cosine of different tokens of a row


@torch.no_grad()
def measure_activations(model: LoadedModel, ids: Tensor) -> Activations:
    """Return the sizes of the hidden states of texts ids [B, T], read from an empty memory."""
    layers: list[Tensor] = []
    decoder = model.decoder
    with model.precision.autocast(ids.device):
        embedded = decoder.vocabulary.embed(ids)
        final, _ = decoder.trunk(embedded, ids=ids, visit=lambda x: layers.append(x.float()))
    sizes = [layer.abs() for layer in layers[1:-1]]  # between the input norm and the output norm
    medians = [float(size.median()) for size in sizes]
    massive = 0
    for size, median in zip(sizes, medians, strict=True):
        massive += int(((size > LARGE) & (size > TIMES_MEDIAN * median)).sum())
    ratios = [float(size.max()) / max(m, 1e-30) for size, m in zip(sizes, medians, strict=True)]
    return Activations(
        max(float(size.max()) for size in sizes),
        max(ratios),
        massive,
        sum(float(kurtosis(layer).mean()) for layer in layers[1:-1]) / len(sizes),
        1 - mean_cosine(final.float()),
    )


def kurtosis(x: Tensor) -> Tensor:
    """Return the kurtosis of states [..., M] over their channels; 3 for normal ones."""
    centred = x - x.mean(-1, keepdim=True)
    return centred.pow(4).mean(-1) / centred.square().mean(-1).square().clamp_min(1e-30)


def mean_cosine(states: Tensor) -> float:
    """Return the mean cosine similarity of the states [B, T, M] of different tokens of a row; 1
    minus it is the isotropy of SimCTG (Su et al. 2022, arXiv 2202.06417).
    """
    unit = nn.functional.normalize(states, dim=-1)
    size = unit.shape[1]
    pairs = unit.sum(1).square().sum(-1) - size  # [B] sum over ordered pairs of different tokens
    return float(pairs.mean() / max(size * (size - 1), 1))
