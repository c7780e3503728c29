"""Expands [layers.SELECTOR] into what holds for every single layer, and puts that together again
for a resolved recipe.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from lswt_core.errors import Problem
from lswt_core.recipe import messages as wording
from lswt_core.recipe.layer_selectors import GRAMMAR, LAYERED, LAYERS, select, spell
from lswt_core.recipe.provenance import Branch, Leaf, lay
from lswt_core.recipe.schema import Model
from lswt_core.recipe.validate import Checked
from lswt_core.registry.kinds import KIND_OF_TABLE


class Special(NamedTuple):
    """The tables of one selector, and the layers it names."""

    selector: str
    layers: list[int]
    tables: Branch

    def places(self) -> list[str]:
        """The components it speaks of: "ffn", "memory.xl"."""
        found = []
        for name, node in self.tables.items.items():
            inner = node.items if isinstance(node, Branch) and KIND_OF_TABLE[name].many else None
            found += [name] if inner is None else [f"{name}.{component}" for component in inner]
        return found


def expand(base: Checked) -> list[Checked]:
    """The recipe as it stands for every layer; none if all are alike. What is wrong goes to
    ``base.problems``.
    """
    table, model = base.tree.items.get(LAYERS), base.core.get("model")
    if isinstance(table, Leaf):
        base.problems.append(wording.not_a_table(table, f'write e.g. [{LAYERS}."0-3".ffn]'))
        return []
    if table is None or not isinstance(model, Model):
        return []
    specials = [
        one
        for selector, node in table.items.items()
        if (one := special(base, selector, node, model.n_layers))
    ]
    refuse_overlaps(base, specials)
    made: dict[tuple[str, ...], Checked] = {(): base}
    for layer in range(model.n_layers):
        key = selectors_at(specials, layer)
        if key not in made:
            made[key] = with_tables(base, [one.tables for one in specials if one.selector in key])
    return (
        [made[selectors_at(specials, layer)] for layer in range(model.n_layers)] if specials else []
    )


def selectors_at(specials: list[Special], layer: int) -> tuple[str, ...]:
    """The selectors that name a layer."""
    return tuple(one.selector for one in specials if layer in one.layers)


def special(base: Checked, selector: str, node: Leaf | Branch, n_layers: int) -> Special | None:
    """One selector's tables, if they can be used."""
    if isinstance(node, Leaf):
        base.problems.append(wording.not_a_table(node, f'write e.g. [{LAYERS}."{selector}".ffn]'))
        return None
    try:
        layers = select(selector, n_layers)
    except ValueError as error:
        base.problems.append(
            Problem(
                f'cannot use the layers "{selector}"',
                node.origin.where,
                str(error),
                GRAMMAR,
                node.origin.text,
            )
        )
        return None
    for name, inner in node.items.items():
        if name not in LAYERED:
            why = "it is the same for all layers; only components of a block can differ"
            fix = f"use one of: {', '.join(LAYERED)}"
            base.problems.append(
                Problem(
                    f'unknown table "{inner.key}"', inner.origin.where, why, fix, inner.origin.text
                )
            )
    known = {name: inner for name, inner in node.items.items() if name in LAYERED}
    return Special(selector, layers, Branch(node.key, known, node.origin, node.rank))


def refuse_overlaps(base: Checked, specials: list[Special]) -> None:
    """Two selectors may not speak of the same component of a layer: which one holds would depend on
    their order.
    """
    claimed: dict[tuple[str, int], str] = {}
    for one in specials:
        for place in one.places():
            twice = [
                layer
                for layer in one.layers
                if claimed.setdefault((place, layer), one.selector) != one.selector
            ]
            if twice:
                other = claimed[place, twice[0]]
                why = f'"{other}" already says what [{place}] is in layer {spell(twice)}'
                fix = (
                    "let every layer be named by one selector only, or change the other one's"
                    " tables"
                )
                where = one.tables.origin
                base.problems.append(
                    Problem(
                        f'"{one.selector}" and "{other}" contradict',
                        where.where,
                        why,
                        fix,
                        where.text,
                    )
                )


def with_tables(base: Checked, tables: list[Branch]) -> Checked:
    """The recipe with some tables laid over it; its new problems are the base's too."""
    problems: list[Problem] = []
    tree = Branch(
        base.tree.key,
        {k: v for k, v in base.tree.items.items() if k != LAYERS},
        base.tree.origin,
        base.tree.rank,
    )
    for table in tables:
        tree = lay(tree, table, problems)
    checked = Checked(tree, base.registry, base.fallback)
    base.problems += [
        *problems,
        *(problem for problem in checked.problems if problem not in base.problems),
    ]
    base.plugin_problems += [
        problem for problem in checked.plugin_problems if problem not in base.plugin_problems
    ]
    return checked


def collect(base: Mapping[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The table [layers] of a resolved recipe: what differs from ``base``, under selectors that
    share no layer.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    different = [differences(base, held) for held in layers]
    for number, tables in enumerate(different):
        groups[repr(tables)].append(number)
    return {
        spell(numbers): different[numbers[0]]
        for numbers in groups.values()
        if different[numbers[0]]
    }


def differences(base: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a layer that are not the base's."""
    found = {
        name: table for name, table in held.items() if name != "memory" and table != base.get(name)
    }
    before, after = base.get("memory", {}), held.get("memory", {})
    memory = {
        name: after.get(name, False)
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    }
    return found | ({"memory": memory} if memory else {})
