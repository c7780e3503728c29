"""How the size of activations grows with the width of a model (Yang et al. 2022, arXiv 2203.03466,
appendix D.1). Where a parametrisation is right, sizes do not depend on the width at any step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lswt_core.model.decoder import Decoder

LOGITS = "logits"
# Activations grow no faster than width to this power in a right parametrisation: sizes are noisy at
# small widths.
TOLERATED_GROWTH = 0.2


class Measurement(NamedTuple):
    """The size of one activation of one model: the mean of its absolute values."""

    width: int
    step: int  # updates before it
    place: str  # "input", "block 0", ..., "output", "logits"
    size: float


class Growth(NamedTuple):
    """How an activation grows with the width: size ~ width ** exponent, by least squares."""

    step: int
    place: str
    exponent: float

    @property
    def is_stable(self) -> bool:
        """Whether the activation does not blow up with the width."""
        return self.exponent <= TOLERATED_GROWTH


@torch.no_grad()
def activation_sizes(decoder: Decoder, ids: Tensor) -> list[tuple[str, float]]:
    """The size of hidden states at every place of the residual stream, and of the logits."""
    states = list[Tensor]()
    embedded = decoder.vocabulary.embed(ids)
    last, _ = decoder.trunk(embedded, ids=ids, visit=states.append)
    states.append(decoder.vocabulary.logits(last))
    blocks = [f"block {number}" for number in range(len(decoder.blocks))]
    places = ["input", *blocks, "output", LOGITS]
    return [
        (place, float(state.float().abs().mean()))
        for place, state in zip(places, states, strict=True)
    ]


def fit_growth(measured: Iterable[Measurement]) -> list[Growth]:
    """The growth of every activation at every step, from several widths."""
    points: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for one in measured:
        size = max(one.size, torch.finfo(torch.float32).tiny)
        point = (math.log(one.width), math.log(size))
        points.setdefault((one.step, one.place), []).append(point)
    return [Growth(step, place, slope(pairs)) for (step, place), pairs in points.items()]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the least-squares line through some points."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
