"""Coordinate check: the size of a recipe's activations against the width of its model, before
training and after a few updates (Yang et al. 2022, arXiv 2203.03466, appendix D.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lswt_core.benchmark.ours import Ours, work_of
from lswt_core.model.activation_growth import Growth, Measurement, activation_sizes
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.tables import Table


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
    measured = [Measurement(width, 0, *one) for one in sizes_now(model, probe[0])]
    for step, (inputs, labels) in enumerate(batches, start=1):
        model.train(inputs, labels)
        measured += [Measurement(width, step, *one) for one in sizes_now(model, probe[0])]
    return measured


def sizes_now(model: Ours, ids: Tensor) -> list[tuple[str, float]]:
    """The sizes of a model's activations at its present weights, in the recipe's precision."""
    with model.work.precision.autocast(model.work.device):
        return activation_sizes(model.loss.decoder, ids)


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
