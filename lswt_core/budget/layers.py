"""Measure deep models by shallow ones: equal layers need the same, so a model with one and a model
with two of them give what any number needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lswt_core.interfaces import Layer
from lswt_core.model.spec import DecoderSpec
from lswt_core.recipe import Recipe
from lswt_core.recipe.layer_selectors import LAYERED, tables_at
from lswt_core.recipe.toml_writer import fingerprint

Amounts = dict[str, int]


def extrapolate_layers(
    recipe: Recipe, blueprint: DecoderSpec, measure: Callable[[DecoderSpec], Amounts]
) -> Amounts:
    """Return what ``measure`` gives for the whole model, from models with one layer of each kind
    and with two of one kind.

    Exact if every amount is a sum over layers plus a constant, and if layers of equal recipe tables
    that read and write the same are equal. Amounts that cannot be measured are absent.
    """
    groups = group_equal_layers(recipe, blueprint)
    if blueprint.dims.n_layers <= 2 * len(groups):
        return measure(blueprint)
    base = measure(select_layers(blueprint, [group[0] for group in groups]))
    total = dict(base)
    for group in groups:
        if len(group) == 1:
            continue
        layers = sorted([*(other[0] for other in groups), group[1]])
        more = measure(select_layers(blueprint, layers))
        total = {
            name: amount + (more[name] - base[name]) * (len(group) - 1)
            for name, amount in total.items()
            if name in more
        }
    return total


def group_equal_layers(recipe: Recipe, blueprint: DecoderSpec) -> list[list[int]]:
    """Return the layer indices, grouped by equal recipe tables and by what layers hand to each
    other, in which the first may differ.
    """
    tables = recipe.resolved()
    with torch.device("meta"):
        blocks = blueprint.build().blocks
    groups: dict[tuple[str, frozenset[str], frozenset[str]], list[int]] = {}
    for number, block in enumerate(blocks):
        own = tables_at(tables, number)
        key = fingerprint({name: own[name] for name in LAYERED if name in own})
        parts = [part for part in block.modules() if isinstance(part, Layer)]
        reads = frozenset().union(*(part.reads for part in parts))
        writes = frozenset().union(*(part.writes for part in parts))
        groups.setdefault((key, reads, writes), []).append(number)
    return list(groups.values())


def select_layers(blueprint: DecoderSpec, layers: Sequence[int]) -> DecoderSpec:
    """Return the blueprint with some of its layers only."""
    return blueprint._replace(layers=tuple(blueprint.layers[layer] for layer in layers))
