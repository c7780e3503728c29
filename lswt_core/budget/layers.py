"""Measures deep models by shallow ones: what layers of one make need is the same for each, so two
tell what all need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lswt_core.model.spec import DecoderSpec
from lswt_core.recipe import Recipe
from lswt_core.recipe.layer_selectors import LAYERED, tables_at
from lswt_core.recipe.toml_writer import fingerprint

Amounts = dict[str, int]


def by_layers(
    recipe: Recipe, blueprint: DecoderSpec, measure: Callable[[DecoderSpec], Amounts]
) -> Amounts:
    """What ``measure`` finds of the whole model, from models with one layer of every make, and with
    two of one of them.

    Exact where a measure is a sum over layers and everything else, and where layers of equal tables
    are equal.
    """
    makes = layers_by_make(recipe)
    if blueprint.dims.n_layers <= 2 * len(makes):
        return measure(blueprint)
    base = measure(shallow(blueprint, [layers[0] for layers in makes]))
    total = dict(base)
    for make, layers in enumerate(makes):
        if len(layers) > 1:
            chosen = [
                number
                for other, numbers in enumerate(makes)
                for number in numbers[: 1 + (other == make)]
            ]
            more = measure(shallow(blueprint, sorted(chosen)))
            both = base.keys() & more.keys()  # what could be measured
            total = {
                name: total[name] + (more[name] - base[name]) * (len(layers) - 1)
                for name in total
                if name in both
            }
    return total


def layers_by_make(recipe: Recipe) -> list[list[int]]:
    """The layers, those of equal tables together."""
    tables = recipe.resolved()
    makes: dict[str, list[int]] = {}
    for layer in range(recipe.model.n_layers):
        held = tables_at(tables, layer)
        makes.setdefault(
            fingerprint({name: held[name] for name in LAYERED if name in held}), []
        ).append(layer)
    return list(makes.values())


def shallow(blueprint: DecoderSpec, layers: Sequence[int]) -> DecoderSpec:
    """A model of some of the layers."""
    return blueprint._replace(layers=tuple(blueprint.layers[layer] for layer in layers))
