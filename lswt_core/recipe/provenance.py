"""Trees of values that keep their origin (file and line), and how one is merged over another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lswt_core.errors import Problem
from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.recipe.toml_lines import Key
from lswt_core.registry.kinds import KIND_OF_TABLE

USE = {  # the default component of each table
    "head": "tied",
    "block": "pre-norm",
    "mixer": "attention",
    "positional": "rope",
    "attention": "auto",
    "qk_norm": "none",
    "ffn": "swiglu",
    "norm": "layernorm",
    "parametrisation": "standard",
    "cross_entropy": "chunked",
    "optimizer": "adamw",
    "average": "none",
    "schedule": "cosine",
    "data": "stdlib",
    "tokenizer": "bpe",
}
OVERLAYS = ("cpu", "cuda")
LONGEST = 2**63  # TOML integers have 64 bits


class Origin(NamedTuple):
    """Where a value was written: "recipes/small.toml:12", "command line", "default" or "python",
    and the source text.
    """

    where: str
    text: str


@dataclass(frozen=True)
class Leaf:
    """A value and every earlier value it replaced, oldest first; the last one is in force."""

    key: str  # as written, e.g. "cpu.train.steps"
    history: tuple[tuple[Any, Origin], ...]
    rank: int  # of the layer it was written in: higher overrides lower

    @property
    def value(self) -> Any:
        """The value in force."""
        return self.history[-1][0]

    @property
    def origin(self) -> Origin:
        """Where the value in force was written."""
        return self.history[-1][1]


@dataclass(frozen=True)
class Branch:
    """A table."""

    key: str
    items: dict[str, Leaf | Branch]
    origin: Origin
    rank: int = -1

    def at(self, path: tuple[Any, ...]) -> Leaf | Branch:
        """The node at a path, or the last one on the way there."""
        node: Leaf | Branch = self
        for part in path:
            if not isinstance(node, Branch) or part not in node.items:
                break
            node = node.items[part]
        return node

    def find(self, path: tuple[Any, ...]) -> Leaf | Branch | None:
        """The node at a path; None if there is none."""
        parent = self.at(path[:-1])
        return self.at(path) if self.at(path) is not parent else None

    def plain(self, *without: str) -> dict[str, Any]:
        """The values alone, as nested dicts."""
        return {
            name: node.value if isinstance(node, Leaf) else node.plain()
            for name, node in self.items.items()
            if name not in without
        }


class Builder(NamedTuple):
    """Builds the tree of one layer from plain tables; invalid values are added to ``problems``."""

    locate: Callable[[Key], Origin]
    rank: int
    problems: list[Problem]

    def branch(self, table: Mapping[Any, Any], path: Key = ()) -> Branch:
        """The tree of a table at a path."""
        items: dict[str, Leaf | Branch] = {}
        for name, value in table.items():
            here = (*path, str(name))
            origin = self.locate(here)
            if isinstance(value, Mapping):
                items[str(name)] = self.branch(value, here)
            elif flaw := find_flaw(name, value):
                what = f'unusable value for "{".".join(here)}"'
                self.problems.append(Problem(what, origin.where, *flaw, origin.text))
            else:
                items[str(name)] = Leaf(".".join(here), ((value, origin),), self.rank)
        return Branch(".".join(path), items, self.locate(path), self.rank)


def find_flaw(name: Any, value: Any) -> tuple[str, str] | None:
    """Why a recipe cannot hold this key or value, and what to do; None if it can."""
    if not isinstance(name, str):
        return f"the key {name!r} is not a text", "use a text as key"
    if value is None:
        return (
            "TOML has no null, so a recipe could not be written down",
            "leave the key out for its default",
        )
    if isinstance(value, int) and not -LONGEST <= value < LONGEST:
        return "TOML integers end at 64 bits", "give a smaller number"
    if isinstance(value, str) and not encodable(value):
        return "it is not valid Unicode text", "write it in UTF-8"
    if isinstance(value, list):
        if any(isinstance(item, Mapping) for item in value):
            return (
                "recipes have no lists of tables ([[...]])",
                "give every table a name of its own, as in [memory.NAME]",
            )
        return next((flaw for item in value if (flaw := find_flaw(name, item))), None)
    return None


def encodable(text: str) -> bool:
    """Whether a text can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, e.g. from undecodable command-line arguments
        return False
    return True


def join(old: Leaf | Branch | None, new: Leaf | Branch, use: str | None = None) -> Leaf | Branch:
    """Merge ``new`` over ``old``; for ``use`` see ``join_tables``."""
    if isinstance(old, Leaf) and isinstance(new, Leaf):
        return replace(new, history=old.history + new.history)
    if isinstance(old, Branch) and isinstance(new, Branch):
        return join_tables(old, new, use)
    return new


def join_tables(old: Branch, new: Branch, use: str | None = None) -> Branch:
    """Merge a table over another. ``use`` is the default component of ``old``; None: the tables
    hold no component.

    A table that names another component replaces the old one whole, so that no component gets the
    options of another. The same holds for tables inside of a component's: a table that has no
    ``use`` is named like its component.
    """
    replaced = use is not None and names_another(old, new, use)
    kept = {} if replaced else old.items
    items = dict(kept)
    for name, node in new.items.items():
        before = (old.items if name == "use" else kept).get(name)
        items[name] = join(before, node, None if use is None else name)
    return replace(new, items=items)


def names_another(old: Branch, new: Branch, default: str) -> bool:
    """Whether a table names another component than the one it is merged over."""
    if not isinstance(chosen := new.items.get("use"), Leaf):
        return False
    before = old.items.get("use")
    one, other = default, str(chosen.value)
    if isinstance(before, Leaf):
        one = str(before.value)
    if ":" in one and ":" in other:
        return one != other
    return one.rpartition(":")[2] != other.rpartition(":")[2]


def lay(base: Branch, layer: Branch, problems: list[Problem] | None) -> Branch:
    """Merge a layer over a recipe, table by table. The removal of an absent component is added to
    ``problems``; None allows it.
    """
    items = dict(base.items)
    for table, new in layer.items.items():
        kind, old = KIND_OF_TABLE.get(table), items.get(table)
        if kind is not None and kind.many and isinstance(new, Branch):
            items[table] = lay_many(old if isinstance(old, Branch) else None, new, problems)
        elif table == LAYERS and isinstance(old, Branch) and isinstance(new, Branch):
            items[table] = lay_selectors(old, new)
        else:
            items[table] = join(old, new, USE.get(table))
    return replace(base, items=items)


def lay_selectors(old: Branch, new: Branch) -> Branch:
    """Merge a table [layers] over another, selector by selector. Removals are kept: what they
    remove may stand in the tables for all layers.
    """
    items = dict(old.items)
    for selector, node in new.items.items():
        before = items.get(selector)
        if isinstance(before, Branch) and isinstance(node, Branch):
            items[selector] = lay(before, node, None)
        else:
            items[selector] = node
    return replace(new, items=items)


def lay_many(old: Branch | None, new: Branch, problems: list[Problem] | None) -> Branch:
    """Merge a table of named components over another; ``name = false`` removes one, which must be
    present unless ``problems`` is None.
    """
    items = dict(old.items) if old else {}
    for name, node in new.items.items():
        removes = isinstance(node, Leaf) and node.value is False
        if removes and name not in items and problems is not None:
            present = ", ".join(items) or "none"
            why = f'there is no "{name}" to remove; present: {present}'
            what, origin = f'cannot remove "{node.key}"', node.origin
            problems.append(Problem(what, origin.where, why, "remove this line", origin.text))
        else:
            items[name] = join(items.get(name), node, name)
    return replace(new, items=items)
