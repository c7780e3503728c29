"""Recipes: TOML files that name components and their options, merged, checked, and traceable to the
line. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lswt_core.errors import Problem, RecipeError
from lswt_core.recipe import messages, schema, toml_writer
from lswt_core.recipe.chosen import Chosen
from lswt_core.recipe.layer_selectors import GRAMMAR, LAYERS, select
from lswt_core.recipe.loader import File, read_chain
from lswt_core.recipe.merged import Layers, Merged, raise_problems
from lswt_core.recipe.overrides import PLACE, read_overrides
from lswt_core.recipe.provenance import OVERLAYS, Branch, Builder, Leaf, Origin
from lswt_core.recipe.toml_lines import parse_key
from lswt_core.recipe.validate import Checked
from lswt_core.registry import AUTO, Registry, nearest
from lswt_core.registry.kinds import KINDS

__all__ = ["OVERLAYS", "Chosen", "Origin", "Recipe"]


class Recipe:
    """A complete, checked description of a run; built by ``load`` or ``from_dict``."""

    def __init__(self, name: str, source: str, layers: Layers, registry: Registry) -> None:
        """Merge and check, without and with every overlay; ``source`` is the file as shown."""
        self.name, self.source, self.registry = name, source, registry
        self.overlays = layers.overlay_names()
        self._layers = layers
        self._variants = {
            overlay: Merged(layers, overlay, registry) for overlay in (None, *self.overlays)
        }

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        *,
        overlay: str | None = None,
        registry: Registry | None = None,
    ) -> Recipe:
        """Read a recipe by path or name ("small", "lswt:small", "PACKAGE:NAME").

        ``overrides`` are "a.b.c=value" words; ``overlay`` ("cpu", "cuda") is applied if the recipe
        has it. Raises RecipeError with every problem of every overlay at once.
        """
        if overlay not in (None, *OVERLAYS):
            why, fix = "a recipe can have no such overlay", f"use one of: {', '.join(OVERLAYS)}"
            raise RecipeError([Problem(f"unknown overlay {overlay!r}", PLACE, why, fix)])
        chain = read_chain(path)
        recipe = cls(
            Path(chain[-1].shown).stem,
            chain[-1].shown,
            layers_of(chain, overrides),
            registry or Registry(),
        )
        return recipe._select(overlay)

    @classmethod
    def from_dict(
        cls, tables: Mapping[str, Any], *, where: str = "python", registry: Registry | None = None
    ) -> Recipe:
        """A recipe written in Python, with the tables of a file; it extends nothing, and its
        overlays are checked only. ``where`` is what problems name as its place.
        """
        python, problems = Origin(where, ""), list[Problem]()
        builder = Builder(lambda _: python, 0, problems)
        main, overlays = map(builder.branch, split(tables))
        layers = Layers([main], [overlays], Branch("", {}, python), python, problems)
        return cls("recipe", where, layers, registry or Registry())._select(None)

    def with_overlay(self, overlay: str | None) -> Recipe:
        """The recipe with another overlay applied; without any if it has none of that name. Nothing
        is read again. Raises RecipeError for overrides that do not fit that overlay.
        """
        return copy(self)._select(overlay)

    def _select(self, overlay: str | None) -> Recipe:
        """Apply an overlay, and raise what is wrong."""
        self.overlay = overlay if overlay in self.overlays else None
        self._merged, self._plain = self._variants[self.overlay], self._variants[None]
        self._chosen = self._merged.base
        others = [one.base for one in self._variants.values() if one is not self._merged]
        raise_problems(self._layers, self._chosen, others)
        tables = self._chosen.core
        self.model = cast(schema.Model, tables["model"])
        self.embedding = cast(schema.Embedding, tables["embedding"])
        self.groups = cast(schema.Groups, tables["groups"])
        self.train = cast(schema.Train, tables["train"])
        self.evaluate = cast(schema.Evaluate, tables["evaluate"])
        self.checkpoint = cast(schema.Checkpoint, tables["checkpoint"])
        self.sample = cast(schema.Sample, tables["sample"])
        return self

    def one(self, kind: str) -> Chosen:
        """The component of a kind that does not stack."""
        return self._chosen.chosen[kind][kind]

    def many(self, kind: str) -> dict[str, Chosen]:
        """The components of a kind that stacks, by table name, in the recipe's order."""
        return dict(self._chosen.chosen[kind])

    def every(self, kind: str) -> list[Chosen]:
        """The different components of a kind, those of single layers included."""
        components: list[Chosen] = []
        for checked in (self._chosen, *self._merged.layers):
            for chosen in checked.chosen[kind].values():
                if chosen not in components:
                    components.append(chosen)
        return components

    def at_layer(self, layer: int) -> Mapping[str, Mapping[str, Chosen]]:
        """The components of one layer, by kind and table name."""
        layers = self._merged.layers  # empty if all layers are alike
        return layers[layer].chosen if layers else self._chosen.chosen

    def tables_with(self, kind: str, name: str) -> list[str]:
        """The tables that choose a component of that name, of a kind that does not stack:
        "attention", 'layers."every 2".attention'.
        """
        table, default = KINDS[kind].table, self.one(kind).name
        tables = [table] if default == name else []
        selectors = self._chosen.tree.items.get(LAYERS)
        if not isinstance(selectors, Branch):
            return tables
        for selector, node in selectors.items.items():
            own = node.items.get(table) if isinstance(node, Branch) else None
            if isinstance(own, Branch):
                use = own.items.get("use")
                chosen = use.value if isinstance(use, Leaf) else default
                if chosen == name:
                    tables.append(f"{LAYERS}.{toml_writer.key(selector)}.{table}")
        return tables

    def components(self) -> list[Chosen]:
        """The different components of every kind, those inside of others included."""
        return [one for kind in KINDS for chosen in self.every(kind) for one in chosen.with_inner()]

    def third_party(self) -> list[Chosen]:
        """The different components that are not of the core's own distribution, backends that an
        automatic choice of attention may take included.
        """
        components = [chosen for chosen in self.components() if not chosen.offer.is_own]
        for chosen in self.every("attention"):
            for name in chosen.options["prefer"] if chosen.offer.name == AUTO.name else ():
                offer = self.registry.find("attention", name)
                if not offer.is_own:
                    components.append(Chosen("attention", chosen.table, name, offer, {}))
        return components

    def resolved(self) -> dict[str, Any]:
        """The plain tables with every default; loading them gives an equal recipe. None is left
        out, which TOML does not have.
        """
        return self._merged.resolved()

    def dump(self) -> str:
        """The resolved recipe as TOML."""
        return toml_writer.document(self.resolved())

    def fingerprint(self) -> str:
        """A hash of the resolved recipe."""
        return toml_writer.fingerprint(self.resolved())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def changes(self) -> list[tuple[str, Any, Any]]:
        """What the applied overlay changed: key, value without it, with it (None: absent)."""
        before, after = toml_writer.flat(self._plain.resolved()), toml_writer.flat(self.resolved())
        return [
            (key, before.get(key), after.get(key))
            for key in {**before, **after}
            if before.get(key) != after.get(key)
        ]

    def explain(self, key: str) -> list[tuple[Any, Origin]]:
        """Every value that a key was given and its origin, oldest first; the last is in force.
        Raises RecipeError for an unknown key.
        """
        checked, path = self._locate(key)
        owner, size = checked.owner_of(path)
        name, node = ".".join(path[size:]), checked.tree.find(path)
        history = list(node.history) if isinstance(node, Leaf) else []
        if owner is None and not name and history:
            return history  # a component that was removed
        if owner is None or name == "" or path[size] not in owner.keys:
            raise RecipeError([self._unknown_key(key, name, owner)])
        if not owner.is_component(path[size]):
            return default_of(owner, path[size]) + history
        if isinstance(node, Branch):
            raise RecipeError([self._table_of_components(key, node)])
        if len(path) > size + 1 and not history:
            raise RecipeError([self._unknown_key(key, name, None)])
        return history or default_of(owner, path[size])

    def origins(self) -> Iterator[tuple[str, Any, str, str]]:
        """Yield every value of the recipe: key, value, where it was written ("default": nowhere),
        and the table or component that it belongs to, e.g. 'the memory "xl-cache" (lswt-core 0.1)'.
        """
        for key, value in toml_writer.flat(self.resolved()).items():
            checked, path = self._locate(key)
            owner, _ = checked.owner_of(path)
            history = self.explain(key)
            where = history[-1][1].where if history else self.name
            yield key, value, where, "" if owner is None else owner.words

    def _locate(self, key: str) -> tuple[Checked, tuple[str, ...]]:
        """The checked recipe that a key is looked up in, and its path there: layers."0-3".ffn.use
        is ffn.use of layer 0.
        """
        path = parse_key(key) or (key,)
        if path[0] != LAYERS or len(path) < 3:
            return self._chosen, path
        try:
            layer, *_ = select(path[1], self.model.n_layers)
        except ValueError as error:
            problem = Problem(f'cannot explain "{key}"', self.name, str(error), GRAMMAR)
            raise RecipeError([problem]) from error
        return (self._merged.layers[layer] if self._merged.layers else self._chosen), path[2:]

    def _table_of_components(self, key: str, table: Branch) -> Problem:
        """The problem of a key that holds components."""
        fix = f"ask for a key of one of: {', '.join(table.items)}"
        return Problem(f'"{key}" is a table', self.name, "only values have a history", fix)

    def _unknown_key(self, key: str, name: str, owner: messages.Owner | None) -> Problem:
        """The problem of a key that has no history."""
        if owner is not None and not name:
            fix = f"ask for one of: {', '.join(owner.keys)}"
            return Problem(f'"{key}" is a table', self.name, "only values have a history", fix)
        if owner is not None:
            leaf = Leaf(key, ((None, Origin(self.name, "")),), 0)
            return messages.unknown_key(leaf, owner, self._chosen.homes)
        guess = nearest(key, toml_writer.flat(self.resolved()))
        fix = f'did you mean "{guess}"?' if guess else "see: python -m lswt_core resolve"
        return Problem(f'unknown key "{key}"', self.name, "the recipe has no such table", fix)


def default_of(owner: messages.Owner, name: str) -> list[tuple[Any, Origin]]:
    """The default of a key and its origin; empty if the key is required."""
    field = owner.model.model_fields.get(name)
    if field is not None and field.is_required():
        return []
    if field is not None:
        default = field.get_default()
    elif name == "use" and owner.usual is None:
        return []
    else:  # keys of the core
        default = {"use": owner.usual, "weight": 1.0, "token_directory": None}[name]
    return [(default, Origin("default", ""))]


def layers_of(chain: Sequence[File], overrides: Sequence[str]) -> Layers:
    """The layers of a chain of files and the command line."""
    problems: list[Problem] = []
    written, overlays = [], []
    for rank, file in enumerate(chain):
        main, special = split(file.tables)
        written.append(Builder(file.locate, rank, problems).branch(main))
        overlays.append(Builder(file.locate, rank + len(chain), problems).branch(special))
    given = read_overrides(overrides, 2 * len(chain), problems)
    main_items, overlay_items = split(given.items)
    overlays.append(replace(given, items=overlay_items))
    fallback = chain[-1].line(1)._replace(text="")
    return Layers(written, overlays, replace(given, items=main_items), fallback, problems)


def split(tables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of a recipe, and its overlays."""
    main = {name: table for name, table in tables.items() if name not in OVERLAYS}
    return main, {name: table for name, table in tables.items() if name in OVERLAYS}
