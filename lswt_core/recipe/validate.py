"""Validates a merged recipe against the core's tables and the options of its components. All
problems are collected, none is raised.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, MinLen
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lswt_core.errors import Problem
from lswt_core.recipe import messages
from lswt_core.recipe.choices import USE_KEY, Choice, Chooser, Inner
from lswt_core.recipe.chosen import Chosen
from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.recipe.messages import Owner
from lswt_core.recipe.provenance import USE, Branch, Leaf, Origin
from lswt_core.recipe.schema import CORE_TABLES, Table
from lswt_core.registry import AUTO, Registry
from lswt_core.registry.kinds import KIND_OF_TABLE, KINDS, Kind

Model = TypeVar("Model", bound=BaseModel)


class Weight(Table):
    """The core's own key of [loss.X]."""

    weight: Annotated[float, Ge(0)] = 1.0


class TokenFiles(Table):
    """The core's own key of [data]: a directory that ``tokenize`` wrote."""

    token_directory: Annotated[str, MinLen(1)] | None = None


OWN_KEYS: dict[str, type[Table]] = {"loss": Weight, "data": TokenFiles}  # by kind


class Checked:
    """A merged recipe: its valid tables and components, and its problems."""

    def __init__(self, tree: Branch, registry: Registry, fallback: Origin) -> None:
        """``fallback`` is the origin of tables that are missing."""
        self.tree, self.registry, self.fallback = tree, registry, fallback
        self.problems: list[Problem] = []
        # plugins that are broken or clash
        self.plugin_problems: list[Problem] = []
        self.core: dict[str, Table] = {}
        self.chooser = Chooser(registry, self.problems, self.plugin_problems)
        self.chosen: dict[str, dict[str, Chosen]] = {kind: {} for kind in KINDS}
        self.owners = {name: Owner(name, f"[{name}]", model) for name, model in CORE_TABLES.items()}
        found = [choice for kind in KINDS.values() for choice in self.choices(kind)]
        choices = [choice for choice in found if choice is not None]
        self.owners |= {
            inner.owner.table: inner.owner for choice in choices for inner in choice.with_inner()
        }
        self.homes = self.find_homes()
        self.check_core()
        for choice in choices:
            self.check_component(choice)

    def owner_of(self, path: tuple[str, ...]) -> tuple[Owner | None, int]:
        """The owner of the innermost table that a path lies in, None if the recipe has no such
        table, and the length of the table's path.
        """
        for size in range(len(path), 0, -1):
            if (owner := self.owners.get(".".join(path[:size]))) is not None:
                break
        else:
            kind = KIND_OF_TABLE.get(path[0])
            return None, 2 if kind is not None and kind.many else 1
        while len(path) > size and (inner := owner.inner(path[size])) is not None:
            owner, size = inner, size + 1
        return owner, size

    def find_homes(self) -> dict[str, list[str]]:
        """For each key, the tables that have it."""
        homes: defaultdict[str, list[str]] = defaultdict(list)
        for owner in self.owners.values():
            for name in {*owner.keys} - {"use"}:
                homes[name].append(owner.table)
        return dict(homes)

    def check_core(self) -> None:
        """Validate the core's tables, and report unknown ones."""
        tables = [*CORE_TABLES, *KIND_OF_TABLE, LAYERS]
        for name, node in self.tree.items.items():
            if name not in tables:
                self.problems.append(messages.unknown_table(node, tables, self.homes))
        for name, model in CORE_TABLES.items():
            table = self.table(self.tree, name, f"write [{name}] and its keys below it")
            if table is None:
                continue
            checked = self.validate(model, table, self.owners[name])
            if checked is not None:
                self.core[name] = checked

    def table(self, parent: Branch, name: str, fix: str) -> Branch | None:
        """A table; empty if it is missing, None (with a problem) if it is a value."""
        node = parent.items.get(name, Branch(name, {}, self.fallback))
        if isinstance(node, Leaf):
            self.problems.append(messages.not_a_table(node, fix))
            return None
        return node

    def choices(self, kind: Kind) -> Iterator[Choice | None]:
        """The components of a kind that the recipe names; None for one that is not offered."""
        found = self.tree.items.get(kind.table)
        if kind.many:
            fix = f"write [{kind.table}.NAME] and its keys below it"
        elif isinstance(found, Leaf) and isinstance(found.value, str):  # written like a swap
            fix = f'write {kind.table}.use = "{found.value}"'
        else:
            fix = f"write [{kind.table}] and its keys below it"
        table = self.table(self.tree, kind.table, fix)
        if table is None:
            return
        if not kind.many:
            yield self.chooser.choice(kind, kind.table, USE[kind.name], table, extra_keys(kind))
            return
        for component, node in table.items.items():
            if isinstance(node, Branch):
                path = f"{kind.table}.{component}"
                yield self.chooser.choice(kind, path, component, node, extra_keys(kind))
            elif node.value is not False:
                fix = f"write [{node.key}], or {node.key} = false to remove it"
                self.problems.append(messages.not_a_table(node, fix))

    def validate(
        self, model: type[Model], table: Branch, owner: Owner, *without: str
    ) -> Model | None:
        """Validate a table; None, with problems, if it is not valid."""
        try:
            return model.model_validate(table.plain(*without))
        except ValidationError as error:
            reported = set()
            for detail in error.errors(include_url=False):
                inner, own, rest = innermost_table(table, owner, detail["loc"])
                place = (own.table, *rest[:1])  # the members of a union fail one by one
                if place not in reported:
                    reported.add(place)
                    if detail["type"] == "extra_forbidden":
                        node = inner.at(rest[:1])
                        self.problems.append(messages.unknown_key(node, own, self.homes))
                    else:
                        located = ErrorDetails({**detail, "loc": rest})
                        self.problems.append(messages.wrong_value(located, inner, own))
        return None

    def check_component(self, choice: Choice) -> None:
        """Validate the options of one component."""
        kind, table, owner = choice.kind.name, choice.table, choice.owner
        model = OWN_KEYS.get(kind, Table)
        own = {name: node for name, node in table.items.items() if name in choice.kind.keys}
        only = Branch(table.key, own, table.origin, table.rank)
        keys = self.validate(model, only, Owner(owner.table, owner.words, model))
        chosen = self.checked_choice(choice)
        if chosen is None or keys is None:
            return
        preferred = table.items.get("prefer")
        if (kind, choice.name) == ("attention", AUTO.name) and isinstance(preferred, Leaf):
            for backend in chosen.options["prefer"]:
                self.chooser.check_backend(backend, preferred.origin)
        name = owner.table.removeprefix(f"{choice.kind.table}.") if choice.kind.many else kind
        self.chosen[kind][name] = chosen._replace(**keys.model_dump())

    def checked_choice(self, choice: Choice) -> Chosen | None:
        """A component with the options of it and of all inside of it; None, with problems, if some
        are not valid.
        """
        owner = choice.owner
        inner = {name: self.checked_inner(one) for name, one in choice.inner.items()}
        model = self.validate(owner.model, choice.options_table(), owner, *owner.extra)
        if model is None:
            return None
        options = {name: getattr(model, name) for name in type(model).model_fields} | inner
        return Chosen(choice.kind.name, owner.table, choice.name, choice.offer, options)

    def checked_inner(self, inner: Inner) -> Any:
        """The components of an option."""
        if isinstance(inner, dict):
            return {name: self.checked_choice(one) for name, one in inner.items()}
        return None if inner is None else self.checked_choice(inner)


def extra_keys(kind: Kind) -> frozenset[str]:
    """The keys of a component's table that are the core's."""
    return USE_KEY.union(kind.keys)


Location = tuple[int | str, ...]


def innermost_table(
    table: Branch, owner: Owner, location: Location
) -> tuple[Branch, Owner, Location]:
    """The innermost table that a location lies in, its owner, and the location inside of it."""
    while len(location) > 1 and (inner := owner.inner(location[0])) is not None:
        node = table.at(location[:1])
        if not isinstance(node, Branch):
            break
        table, owner, location = node, inner, location[1:]
    return table, owner, location
