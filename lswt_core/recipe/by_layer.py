"""Expands [layers.SELECTOR] to a checked recipe for every layer, and collects those again for a
resolved recipe.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lswt_core.errors import Problem
from lswt_core.recipe import messages
from lswt_core.recipe.layer_selectors import GRAMMAR, LAYERED, LAYERS, select, spell
from lswt_core.recipe.provenance import Branch, Leaf, lay
from lswt_core.recipe.schema import Model
from lswt_core.recipe.validate import Checked
from lswt_core.registry.kinds import KIND_OF_TABLE


class LayerTables(NamedTuple):
    """The tables of one selector, and its layers."""

    selector: str
    layers: list[int]
    tables: Branch

    def places(self) -> list[str]:
        """The components that the tables set: "ffn", "memory.xl"."""
        tables = []
        for name, node in self.tables.items.items():
            if isinstance(node, Branch) and KIND_OF_TABLE[name].many:
                tables += [f"{name}.{component}" for component in node.items]
            else:
                tables.append(name)
        return tables


def expand(base: Checked) -> list[Checked]:
    """The checked recipe of every layer; empty if all layers are alike. Problems are added to
    ``base.problems``.
    """
    table, model = base.tree.items.get(LAYERS), base.core.get("model")
    if isinstance(table, Leaf):
        base.problems.append(messages.not_a_table(table, f'write e.g. [{LAYERS}."0-3".ffn]'))
        return []
    if table is None or not isinstance(model, Model):
        return []
    selected = [
        one
        for selector, node in table.items.items()
        if (one := read_selector(base, selector, node, model.n_layers))
    ]
    report_overlaps(base, selected)
    if not selected:
        return []
    checked: dict[tuple[str, ...], Checked] = {(): base}  # by the selectors that apply
    layers = []
    for layer in range(model.n_layers):
        applied = [one for one in selected if layer in one.layers]
        key = tuple(one.selector for one in applied)
        if key not in checked:
            checked[key] = with_tables(base, [one.tables for one in applied])
        layers.append(checked[key])
    return layers


def read_selector(
    base: Checked, selector: str, node: Leaf | Branch, n_layers: int
) -> LayerTables | None:
    """The tables of one selector; None, with a problem, if it cannot be used."""
    if isinstance(node, Leaf):
        base.problems.append(messages.not_a_table(node, f'write e.g. [{LAYERS}."{selector}".ffn]'))
        return None
    try:
        layers = select(selector, n_layers)
    except ValueError as error:
        what, origin = f'cannot use the layers "{selector}"', node.origin
        base.problems.append(Problem(what, origin.where, str(error), GRAMMAR, origin.text))
        return None
    for name, inner in node.items.items():
        if name not in LAYERED:
            what, origin = f'unknown table "{inner.key}"', inner.origin
            why = "it is the same for all layers; only components of a block can differ"
            fix = f"use one of: {', '.join(LAYERED)}"
            base.problems.append(Problem(what, origin.where, why, fix, origin.text))
    known = {name: inner for name, inner in node.items.items() if name in LAYERED}
    return LayerTables(selector, layers, Branch(node.key, known, node.origin, node.rank))


def report_overlaps(base: Checked, selected: list[LayerTables]) -> None:
    """Report selectors that set the same component of a layer: the result would depend on their
    order.
    """
    claimed: dict[tuple[str, int], str] = {}
    for one in selected:
        for place in one.places():
            twice = [
                layer
                for layer in one.layers
                if claimed.setdefault((place, layer), one.selector) != one.selector
            ]
            if twice:
                other, origin = claimed[place, twice[0]], one.tables.origin
                what = f'"{one.selector}" and "{other}" contradict'
                why = f'"{other}" already says what [{place}] is in layer {spell(twice)}'
                fix = "name every layer in one selector only, or change the other one's tables"
                base.problems.append(Problem(what, origin.where, why, fix, origin.text))


def with_tables(base: Checked, tables: list[Branch]) -> Checked:
    """Check the recipe with some tables merged over it; new problems are added to the base's."""
    problems: list[Problem] = []
    items = {name: node for name, node in base.tree.items.items() if name != LAYERS}
    tree = replace(base.tree, items=items)
    for table in tables:
        tree = lay(tree, table, problems)
    checked = Checked(tree, base.registry, base.fallback)
    base.problems += problems
    base.problems += [one for one in checked.problems if one not in base.problems]
    base.plugin_problems += [
        one for one in checked.plugin_problems if one not in base.plugin_problems
    ]
    return checked


def collect(base: Mapping[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The table [layers] of a resolved recipe: what differs from ``base``, by selectors that share
    no layer.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    changed = [differences(base, tables) for tables in layers]
    for number, tables in enumerate(changed):
        groups[repr(tables)].append(number)
    return {spell(group): changed[group[0]] for group in groups.values() if changed[group[0]]}


def differences(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a layer that are not the base's."""
    changed = {
        name: with_removals(base.get(name, {}), table)
        for name, table in own.items()
        if name != "memory" and table != base.get(name)
    }
    before, after = base.get("memory", {}), own.get("memory", {})
    memory = {
        name: with_removals(before.get(name, {}), after[name]) if name in after else False
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    }
    if memory:
        changed["memory"] = memory
    return changed


def with_removals(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A component's table with ``name = false`` for every component inside of the base's table that
    it does not have: it is to be merged over the base's.
    """
    if base.get("use") != own.get("use"):
        return dict(own)
    table = dict(own)
    for name, before in base.items():
        if isinstance(before, Mapping) and isinstance(own.get(name), Mapping):
            table[name] = with_removals(before, own[name])
        elif isinstance(before, Mapping) and "use" in before:
            table.setdefault(name, False)
    return table
