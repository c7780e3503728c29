"""Merges the layers of a recipe (files, overlay, command line), checks the result, and resolves it
to plain tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lswt_core.errors import PluginError, Problem, RecipeError
from lswt_core.recipe import messages
from lswt_core.recipe.by_layer import collect, expand
from lswt_core.recipe.chosen import Chosen
from lswt_core.recipe.layer_selectors import LAYERED, LAYERS
from lswt_core.recipe.provenance import OVERLAYS, Branch, Leaf, Origin, lay
from lswt_core.recipe.validate import Checked
from lswt_core.registry import Registry
from lswt_core.registry.kinds import KIND_OF_TABLE, KINDS

MAX_SHOWN = 20  # problems shown at once
ORDER = (  # of a resolved recipe's tables
    "model",
    "embedding",
    "head",
    "block",
    "mixer",
    "positional",
    "memory",
    "attention",
    "qk_norm",
    "ffn",
    "norm",
    LAYERS,
    "parametrisation",
    "groups",
    "cross_entropy",
    "loss",
    "optimizer",
    "average",
    "schedule",
    "data",
    "tokenizer",
    "train",
    "evaluate",
    "checkpoint",
    "sample",
    "track",
)


class Layers(NamedTuple):
    """The layers of a recipe before they are merged: files (the most basic first) or Python, then
    the command line.
    """

    written: list[Branch]
    overlays: list[Branch]  # each holds the tables of OVERLAYS alone
    overrides: Branch
    fallback: Origin
    problems: list[Problem]

    def overlay_names(self) -> tuple[str, ...]:
        """The overlays that some layer has."""
        held = {name for layer in self.overlays for name in layer.items}
        return tuple(name for name in OVERLAYS if name in held)


class Merged:
    """A recipe merged with one overlay, or none, and checked: for all layers of the model, and for
    every single one where they differ.
    """

    def __init__(self, layers: Layers, overlay: str | None, registry: Registry) -> None:
        problems: list[Problem] = []
        self.base = Checked(merge(layers, overlay, problems), registry, layers.fallback)
        self.base.problems[:0] = problems
        self.layers = expand(self.base)

    def resolved(self) -> dict[str, Any]:
        """The plain tables, in order."""
        tables = resolve(self.base)
        if self.layers:
            by_layer = [only_layered(resolve(layer)) for layer in self.layers]
            tables[LAYERS] = collect(tables, by_layer)
        ordered = {name: tables[name] for name in ORDER if name in tables}
        if not ordered.get(LAYERS):
            ordered.pop(LAYERS, None)
        return ordered


def only_layered(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables that may differ between layers."""
    return {name: table for name, table in tables.items() if name in LAYERED}


def merge(layers: Layers, overlay: str | None, problems: list[Problem]) -> Branch:
    """The tree of a recipe with one overlay, or none."""
    tree = Branch("", {}, layers.fallback)
    for layer in layers.written:
        tree = lay(tree, layer, problems)
    for layer in layers.overlays:
        node = layer.items.get(overlay) if overlay else None
        if isinstance(node, Leaf):
            fix = f"write e.g. [{overlay}.train] and its keys below it"
            problems.append(messages.not_a_table(node, fix))
        elif node is not None:
            tree = lay(tree, node, problems)
    return lay(tree, layers.overrides, problems)


def raise_problems(layers: Layers, chosen: Checked, others: Sequence[Checked]) -> None:
    """Raise every problem once. Overrides are meant for the chosen overlay, so they need not fit
    the others. Raises RecipeError, or PluginError if plugins alone are to blame.
    """
    problems, broken = [*layers.problems, *chosen.problems], list(chosen.plugin_problems)
    for other in others:
        problems += [problem for problem in other.problems if problem.where != "command line"]
        broken += other.plugin_problems
    everything = list(dict.fromkeys([*problems, *broken]))
    if len(everything) > MAX_SHOWN:
        more = Problem(
            f"... and {len(everything) - MAX_SHOWN} more",
            layers.fallback.where,
            f"only {MAX_SHOWN} are shown at once",
            "fix these first",
        )
        everything = [*everything[:MAX_SHOWN], more]
    if problems:
        raise RecipeError(everything)
    if broken:
        raise PluginError("\n\n".join(map(str, everything)))


def resolve(checked: Checked) -> dict[str, Any]:
    """The plain tables of a checked recipe, without [layers]."""
    tables: dict[str, Any] = {}
    for name in ORDER:
        kind = KIND_OF_TABLE.get(name)
        if name in checked.core:
            tables[name] = without_none(checked.core[name].model_dump())
        elif kind is not None:
            chosen = checked.chosen[kind.name]
            components = {key: component_table(one) for key, one in chosen.items()}
            if not kind.many:
                tables[name] = next(iter(components.values()), {})
            elif components:
                tables[name] = components
    return tables


def component_table(chosen: Chosen) -> dict[str, Any]:
    """A component as its table in a resolved recipe."""
    table: dict[str, Any] = {"use": chosen.name}
    if chosen.kind == KINDS["loss"].name:
        table["weight"] = chosen.weight
    if chosen.token_directory is not None:
        table["token_directory"] = chosen.token_directory
    return table | without_none(chosen.plain_options())


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that TOML can hold, those of inner tables as well."""
    return {
        name: without_none(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }
