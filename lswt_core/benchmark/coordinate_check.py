"""Coordinate check: the size of activations against the width of a model, before training and
after a few updates (Yang et al. 2022, arXiv 2203.03466, appendix D.1). Where a parametrisation is
right, sizes do not depend on the width at any step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lswt_core.benchmark.ours import Ours, work_of
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.tables import Table

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


def measure_width(
    recipe: Recipe, registry: Registry, device: torch.device, steps: int
) -> list[Measurement]:
    """Train the recipe's model for ``steps`` updates at its peak learning rate on random walks, and
    measure its activations on one batch before the first and after every update.
    """
    work = work_of(recipe, registry, device)
    model = Ours(work, recipe, registry, str(recipe.model.d_model))
    probe, *batches = islice(work.batches(), steps + 1)
    width = recipe.model.d_model
    measured = [Measurement(width, 0, *one) for one in activation_sizes(model, probe[0])]
    for step, (inputs, labels) in enumerate(batches, start=1):
        model.train(inputs, labels)
        measured += [Measurement(width, step, *one) for one in activation_sizes(model, probe[0])]
    return measured


@torch.no_grad()
def activation_sizes(model: Ours, ids: Tensor) -> list[tuple[str, float]]:
    """The size of hidden states at every place of the residual stream, and of the logits."""
    decoder, states = model.loss.decoder, list[Tensor]()
    with model.work.precision.autocast(model.work.device):
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


def format_sizes(measured: Sequence[Measurement], growths: Sequence[Growth]) -> str:
    """A table of the last step: an activation a row, a width a column, and its growth."""
    last = max(one.step for one in measured)
    widths = sorted({one.width for one in measured})
    sizes = {(one.place, one.width): one.size for one in measured if one.step == last}
    exponents = {one.place: one.exponent for one in growths if one.step == last}
    rows = [
        (
            place,
            *(f"{sizes[place, width]:.4g}" for width in widths),
            f"width ^ {exponent:+.2f}",
        )
        for place, exponent in exponents.items()
    ]
    header = ("activation", *(f"d_model {width}" for width in widths), "growth")
    return Table(header, rows, text_columns=(0,)).text()


def draw_sizes(measured: Sequence[Measurement]) -> Any:
    """A figure with a panel for each place: size against width, one line a step."""
    from lswt_core.reporting.curves import new_figure, set_title

    places = list(dict.fromkeys(one.place for one in measured))
    shown = [places[0], *places[1:-2][-1:], *places[-2:]]  # the input, the last block, the output
    figure = new_figure(3.2)
    steps = sorted({one.step for one in measured})
    widths = sorted({one.width for one in measured})
    first = None
    for number, place in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), number + 1, sharey=first)
        first = first or axes
        for step in steps:
            line = sorted((m.width, m.size) for m in measured if (m.place, m.step) == (place, step))
            shade = 0.75 - 0.75 * step / max(steps[-1], 1)
            axes.loglog(*zip(*line, strict=True), marker="o", markersize=3, color=str(shade))
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        axes.set_title(place, loc="left", fontsize=10)
        axes.set_xlabel("d_model")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.axes[0].set_ylabel("mean absolute value")
    set_title(figure, f"activations against width, {steps[0]} (light) to {steps[-1]} updates")
    return figure
