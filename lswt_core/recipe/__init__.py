"""Recipes: TOML files that name components and their options, merged, checked, and traceable to the
line. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from lswt_core.errors import PluginError, Problem, RecipeError
from lswt_core.recipe import messages as wording
from lswt_core.recipe import schema as settings
from lswt_core.recipe import toml_writer as write
from lswt_core.recipe.by_layer import collect, expand
from lswt_core.recipe.layer_selectors import GRAMMAR, LAYERED, LAYERS, select
from lswt_core.recipe.loader import read_chain
from lswt_core.recipe.overrides import read_overrides
from lswt_core.recipe.provenance import OVERLAYS, USE, Branch, Builder, Leaf, Origin, lay
from lswt_core.recipe.toml_lines import parse_key
from lswt_core.recipe.validate import Checked, Chosen
from lswt_core.registry import Registry, nearest
from lswt_core.registry.kinds import KIND_OF_TABLE, KINDS

__all__ = ["OVERLAYS", "Chosen", "Origin", "Recipe"]

MOST = 20  # problems shown at once
ORDER = (  # of a resolved recipe's tables
    *(
        "model",
        "embedding",
        "positional",
        "memory",
        "attention",
        "qk_norm",
        "ffn",
        "norm",
        LAYERS,
        "cross_entropy",
        "loss",
    ),
    *(
        "optimizer",
        "schedule",
        "data",
        "tokenizer",
        "train",
        "evaluate",
        "checkpoint",
        "sample",
        "track",
    ),
)


class Layers(NamedTuple):
    """What was written, before it is merged: files (the most basic first) or Python, then the
    command line.
    """

    written: list[Branch]
    overlays: list[Branch]  # each holds the tables of OVERLAYS alone
    overrides: Branch
    fallback: Origin
    problems: list[Problem]


class Recipe:
    """A complete, checked description of a run; built by ``load`` or ``from_dict``."""

    def __init__(self, name: str, layers: Layers, overlay: str | None, registry: Registry) -> None:
        """Merge and check; every problem of every overlay is raised at once."""
        held = {key for layer in layers.overlays for key in layer.items}
        self.name, self.registry = name, registry
        self.overlays = tuple(key for key in OVERLAYS if key in held)
        self.overlay = overlay if overlay in self.overlays else None
        variants = {choice: Merged(layers, choice, registry) for choice in (None, *self.overlays)}
        self._merged, self._plain = variants[self.overlay], variants[None]
        self._chosen = self._merged.base
        raise_problems(
            layers,
            self._chosen,
            [other.base for other in variants.values() if other is not self._merged],
        )
        tables = self._chosen.core
        self.model, self.embedding = (
            cast(settings.Model, tables["model"]),
            cast(settings.Embedding, tables["embedding"]),
        )
        self.train, self.evaluate = (
            cast(settings.Train, tables["train"]),
            cast(settings.Evaluate, tables["evaluate"]),
        )
        self.checkpoint, self.sample = (
            cast(settings.Checkpoint, tables["checkpoint"]),
            cast(settings.Sample, tables["sample"]),
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        *,
        overlay: str | None = None,
        registry: Registry | None = None,
    ) -> Recipe:
        """Read a file. ``overrides`` are "a.b.c=value" words; ``overlay`` ("cpu", "cuda") is
        applied if the recipe has it.
        """
        if overlay not in (None, *OVERLAYS):
            fix = f"use one of: {', '.join(OVERLAYS)}"
            raise RecipeError(
                [
                    Problem(
                        f"unknown overlay {overlay!r}",
                        "command line",
                        "a recipe can have no such overlay",
                        fix,
                    )
                ]
            )
        problems: list[Problem] = []
        chain = read_chain(path)
        written, overlays = [], []
        for rank, file in enumerate(chain):
            main, special = split(file.tables)
            written.append(Builder(file.locate, rank, problems).branch(main))
            overlays.append(Builder(file.locate, rank + len(chain), problems).branch(special))
        given = read_overrides(overrides, 2 * len(chain), problems)
        overlays.append(
            replace(
                given, items={key: node for key, node in given.items.items() if key in OVERLAYS}
            )
        )
        main_given = replace(
            given, items={key: node for key, node in given.items.items() if key not in OVERLAYS}
        )
        layers = Layers(
            written, overlays, main_given, chain[-1].line(1)._replace(text=""), problems
        )
        return cls(Path(path).stem, layers, overlay, registry or Registry())

    @classmethod
    def from_dict(
        cls, tables: Mapping[str, Any], *, where: str = "python", registry: Registry | None = None
    ) -> Recipe:
        """A recipe written in Python, with the tables of a file; it extends nothing, and its
        overlays are checked only. ``where`` is what problems name as its place.
        """
        python, problems = Origin(where, ""), list[Problem]()
        main, special = (
            Builder(lambda _: python, 0, problems).branch(part) for part in split(tables)
        )
        return cls(
            "recipe",
            Layers([main], [special], Branch("", {}, python), python, problems),
            None,
            registry or Registry(),
        )

    def one(self, kind: str) -> Chosen:
        """The component of a kind of which there is one."""
        return self._chosen.chosen[kind][kind]

    def many(self, kind: str) -> dict[str, Chosen]:
        """The components of a kind that stacks, by table name, in the recipe's order."""
        return dict(self._chosen.chosen[kind])

    def every(self, kind: str) -> list[Chosen]:
        """The different components of a kind, those of single layers included."""
        found: list[Chosen] = []
        for checked in (self._chosen, *self._merged.layers):
            found += [chosen for chosen in checked.chosen[kind].values() if chosen not in found]
        return found

    def at_layer(self, layer: int) -> Mapping[str, Mapping[str, Chosen]]:
        """The components of one layer, by kind and table name."""
        layers = self._merged.layers  # empty if all layers are alike
        return layers[layer].chosen if layers else self._chosen.chosen

    def tables_with(self, kind: str, name: str) -> list[str]:
        """The tables, as they are written, whose component of a kind of which there is one has that
        name: "attention", 'layers."every 2".attention'.
        """
        table, tree = KINDS[kind].table, self._chosen.tree
        tables = [table] if self.one(kind).name == name else []
        selectors = tree.items.get(LAYERS)
        for selector, special in selectors.items.items() if isinstance(selectors, Branch) else ():
            written = special.items.get(table) if isinstance(special, Branch) else None
            if isinstance(written, Branch):
                use = written.items.get("use")
                held = use.value if isinstance(use, Leaf) else self.one(kind).name
                tables += [f"{LAYERS}.{write.key(selector)}.{table}"] if held == name else []
        return tables

    def components(self) -> list[Chosen]:
        """The different components of every kind."""
        return [chosen for kind in KINDS for chosen in self.every(kind)]

    def resolved(self) -> dict[str, Any]:
        """The whole recipe with every default written out; loading it gives an equal recipe. A None
        is left out: TOML has none.
        """
        return self._merged.resolved()

    def dump(self) -> str:
        """The resolved recipe as TOML."""
        return write.document(self.resolved())

    def fingerprint(self) -> str:
        """A hash of the resolved recipe."""
        return write.fingerprint(self.resolved())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def changes(self) -> list[tuple[str, Any, Any]]:
        """What the applied overlay changed: key, value without it, value with it (None: not there)."""
        before, after = write.flat(self._plain.resolved()), write.flat(self.resolved())
        return [
            (key, before.get(key), after.get(key))
            for key in {**before, **after}
            if before.get(key) != after.get(key)
        ]

    def explain(self, key: str) -> list[tuple[Any, Origin]]:
        """Every value a key was given, oldest first, and where; the last one is in force."""
        checked, path = self.place(key)
        size = 2 if path[0] in KIND_OF_TABLE and KIND_OF_TABLE[path[0]].many else 1
        table, name = ".".join(path[:size]), ".".join(path[size:])
        node = checked.tree.at(path)
        history = (
            list(node.history)
            if isinstance(node, Leaf) and checked.tree.at(path[:-1]) is not node
            else []
        )
        owner = checked.owners.get(table)
        if not name and history:
            return history  # a component that was removed
        if owner is None or name.partition(".")[0] not in owner.keys:
            raise RecipeError([self.unknown(key, table, name, owner)])
        return self.default(owner, path[size]) + history

    def place(self, key: str) -> tuple[Checked, tuple[str, ...]]:
        """What a key is looked up in, and its path there: layers."0-3".ffn.use is ffn.use as it
        stands in layer 0.
        """
        path = parse_key(key) or (key,)
        if path[0] != LAYERS or len(path) < 3:
            return self._chosen, path
        try:
            layer, *_ = select(path[1], self.model.n_layers)
        except ValueError as error:
            raise RecipeError(
                [Problem(f'cannot explain "{key}"', self.name, str(error), GRAMMAR)]
            ) from error
        return (self._merged.layers[layer] if self._merged.layers else self._chosen), path[2:]

    def default(self, owner: wording.Owner, name: str) -> list[tuple[Any, Origin]]:
        """What a key holds where nothing is written; empty if it must be written."""
        field = owner.model.model_fields.get(name)
        if field is not None:
            default = field.get_default()
        else:
            default = (
                1.0
                if name == "weight"
                else owner.table.partition(".")[2] or USE[KIND_OF_TABLE[owner.table].name]
            )
        return (
            [] if field is not None and field.is_required() else [(default, Origin("default", ""))]
        )

    def unknown(self, key: str, table: str, name: str, owner: wording.Owner | None) -> Problem:
        """A key that cannot be explained."""
        keys = list(write.flat(self.resolved()))
        if owner is not None and not name:
            return Problem(
                f'"{key}" is a table',
                self.name,
                "only single values have a history",
                f"ask for one of: {', '.join(owner.keys)}",
            )
        if owner is not None:
            leaf = Leaf(key, ((None, Origin(self.name, "")),), 0)
            return wording.unknown_key(leaf, owner, self._chosen.homes)
        guess = nearest(key, keys)
        return Problem(
            f'unknown key "{key}"',
            self.name,
            "the recipe has no such table",
            f'did you mean "{guess}"?' if guess else "see dump",
        )


def split(tables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of a recipe, and its overlays."""
    return {k: v for k, v in tables.items() if k not in OVERLAYS}, {
        k: v for k, v in tables.items() if k in OVERLAYS
    }


class Merged:
    """The recipe as it stands with one overlay, or none, checked: for all layers, and for every
    single one where they differ.
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
            held = [
                {name: table for name, table in resolve(layer).items() if name in LAYERED}
                for layer in self.layers
            ]
            tables[LAYERS] = collect(tables, held)
        return {
            name: tables[name]
            for name in ORDER
            if name in tables and (tables[name] or name != LAYERS)
        }


def merge(layers: Layers, overlay: str | None, problems: list[Problem]) -> Branch:
    """The recipe with one overlay, or none."""
    tree = Branch("", {}, layers.fallback)
    for layer in layers.written:
        tree = lay(tree, layer, problems)
    for layer in layers.overlays:
        node = layer.items.get(overlay) if overlay else None
        if isinstance(node, Leaf):
            problems.append(
                wording.not_a_table(node, f"write e.g. [{overlay}.train] and its keys below it")
            )
        elif node is not None:
            tree = lay(tree, node, problems)
    return lay(tree, layers.overrides, problems)


def raise_problems(layers: Layers, chosen: Checked, others: Sequence[Checked]) -> None:
    """Raise what is wrong, once each. Overrides are meant for the chosen overlay, so they may not
    fit the others.
    """
    problems, broken = [*layers.problems, *chosen.problems], list(chosen.plugin_problems)
    for other in others:
        problems += [problem for problem in other.problems if problem.where != "command line"]
        broken += other.plugin_problems
    everything = list(dict.fromkeys([*problems, *broken]))
    if len(everything) > MOST:
        rest = len(everything) - MOST
        more = Problem(
            f"... and {rest} more",
            layers.fallback.where,
            f"only {MOST} are shown at once",
            "mend these first",
        )
        everything = [*everything[:MOST], more]
    if problems:
        raise RecipeError(everything)
    if broken:
        raise PluginError("\n\n".join(map(str, everything)))


def resolve(checked: Checked) -> dict[str, Any]:
    """The plain tables of a checked recipe, in order."""
    tables: dict[str, Any] = {}
    for name in ORDER:
        if name in checked.core:
            tables[name] = present(checked.core[name].model_dump())
        elif kind := KIND_OF_TABLE.get(name):
            components = {
                key: component_table(chosen) for key, chosen in checked.chosen[kind.name].items()
            }
            tables |= (
                ({name: components} if components else {})
                if kind.many
                else {name: next(iter(components.values()), {})}
            )
    return tables


def component_table(chosen: Chosen) -> dict[str, Any]:
    """A component as its table in a resolved recipe."""
    weight = {"weight": chosen.weight} if chosen.kind == KINDS["loss"].name else {}
    return {"use": chosen.name, **weight, **present(chosen.options)}


def present(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None."""
    return {name: value for name, value in values.items() if value is not None}
