"""Checks a merged recipe against the core's tables and the components' options; finds everything
that is wrong at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, TypeVar

from annotated_types import Ge
from pydantic import BaseModel, ValidationError

from lswt_core.errors import PluginError, Problem
from lswt_core.recipe import messages as wording
from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.recipe.messages import Owner
from lswt_core.recipe.provenance import USE, Branch, Leaf, Origin
from lswt_core.recipe.schema import CORE_TABLES, Table
from lswt_core.registry import AUTO, NotOffered, Offer, Registry
from lswt_core.registry.kinds import KIND_OF_TABLE, KINDS, Kind

Model = TypeVar("Model", bound=BaseModel)
LIST = "python -m lswt_core plugins list"


class Weight(Table):
    """The core's own key of [loss.X]."""

    weight: Annotated[float, Ge(0)] = 1.0


class Chosen(NamedTuple):
    """A component of a recipe: its table, its name as written there, who offers it, and its options
    with all defaults.
    """

    kind: str
    table: str  # "ffn", "memory.xl"
    name: str
    offer: Offer
    options: dict[str, Any]
    weight: float = 1.0  # of a loss


class Choice(NamedTuple):
    """A component that was found, its options not yet checked."""

    kind: Kind
    name: str
    offer: Offer
    table: Branch
    owner: Owner


class Checked:
    """A merged recipe, as far as it is valid, and its problems."""

    def __init__(self, tree: Branch, registry: Registry, fallback: Origin) -> None:
        """``fallback`` is where to point when a table is missing."""
        self.tree, self.registry, self.fallback = tree, registry, fallback
        self.problems: list[Problem] = []
        # of plugins that are broken or clash, rather than of the recipe
        self.plugin_problems: list[Problem] = []
        self.core: dict[str, Table] = {}
        self.chosen: dict[str, dict[str, Chosen]] = {kind: {} for kind in KINDS}
        self.owners = {name: Owner(name, f"[{name}]", model) for name, model in CORE_TABLES.items()}
        choices = [choice for kind in KINDS.values() for choice in self.choices(kind)]
        self.owners |= {choice.owner.table: choice.owner for choice in choices}
        self.homes = self.find_homes()
        self.check_core()
        for choice in choices:
            self.check_component(choice)

    def find_homes(self) -> dict[str, list[str]]:
        """The tables in which each key is valid."""
        homes: defaultdict[str, list[str]] = defaultdict(list)
        for owner in self.owners.values():
            for name in {*owner.keys} - {"use"}:
                homes[name].append(owner.table)
        return dict(homes)

    def check_core(self) -> None:
        """The core's own tables, and whatever is no table at all."""
        tables = [*CORE_TABLES, *KIND_OF_TABLE, LAYERS]
        for name, node in self.tree.items.items():
            if name not in tables:
                self.problems.append(wording.unknown_table(node, tables, self.homes))
        for name, model in CORE_TABLES.items():
            table = self.table(self.tree, name, f"write [{name}] and its keys below it")
            if (
                table is not None
                and (checked := self.validate(model, table, self.owners[name])) is not None
            ):
                self.core[name] = checked

    def table(self, parent: Branch, name: str, fix: str) -> Branch | None:
        """A table, empty if it is missing, None if something else stands in its place."""
        node = parent.items.get(name, Branch(name, {}, self.fallback))
        if isinstance(node, Leaf):
            self.problems.append(wording.not_a_table(node, fix))
            return None
        return node

    def choices(self, kind: Kind) -> Iterator[Choice]:
        """The components of a kind that the recipe names, as far as they are offered."""
        name, found = (
            f"{kind.table}.NAME" if kind.many else kind.table,
            self.tree.items.get(kind.table),
        )
        fix = f"write [{name}] and its keys below it"
        # as a swap is written
        if isinstance(found, Leaf) and isinstance(found.value, str) and not kind.many:
            fix = f'write {kind.table}.use = "{found.value}"'
        table = self.table(self.tree, kind.table, fix)
        if table is None:
            return
        for component in table.items if kind.many else [None]:
            node = table if component is None else table.items[component]
            if isinstance(node, Branch):
                choice = self.choice(
                    kind,
                    kind.table if component is None else f"{kind.table}.{component}",
                    component,
                    node,
                )
                if choice is not None:
                    yield choice
            elif node.value is not False:
                self.problems.append(
                    wording.not_a_table(
                        node, f"write [{node.key}], or {node.key} = false to remove it"
                    )
                )

    def choice(self, kind: Kind, path: str, component: str | None, table: Branch) -> Choice | None:
        """The component a table names; without ``use``, by its own name or the kind's default."""
        use = table.items.get("use")
        usual = USE[kind.name] if component is None else component
        name = use.value if isinstance(use, Leaf) else usual
        origin = use.origin if isinstance(use, Leaf) else table.origin
        if not isinstance(name, str) or isinstance(use, Branch):
            fix = f'write e.g. use = "{usual}"'
            self.problems.append(
                Problem(
                    f'wrong value for "{path}.use"',
                    origin.where,
                    "it is not a text in quotes",
                    fix,
                    origin.text,
                )
            )
            return None
        extra = frozenset({"use", "weight"} if kind.name == "loss" else {"use"})
        try:
            offer = (
                self.automatic()
                if (kind.name, name) == ("attention", "auto")
                else self.registry.find(kind.name, name)
            )
            words = f'the {kind.name} "{offer.name}" ({offer.distribution} {offer.version})'
            return Choice(
                kind, name, offer, table, Owner(path, words, self.registry.schema(offer), extra)
            )
        except PluginError as error:
            self.report(error, kind.name, name, origin)
            return None

    def report(self, error: PluginError, kind: str, name: str, origin: Origin) -> None:
        """A component that cannot be had."""
        if not isinstance(error, NotOffered):
            problem = Problem(
                f'cannot use the {kind} "{name}"',
                origin.where,
                str(error),
                f"see {LIST}",
                origin.text,
            )
            self.plugin_problems.append(problem)
            return
        guess = f'did you mean "{error.nearest}"? Else ' if error.nearest else ""
        fix = f"{guess}install the package that offers it, or choose another (see {LIST})"
        problem = Problem(
            f'unknown {kind} "{name}"',
            origin.where,
            f"no plugin offers it; {error.details()}",
            fix,
            origin.text,
        )
        plain = name.rpartition(":")[2]
        suspects = [
            broken
            for broken in error.broken
            if plain == broken.entry or plain.startswith(f"{broken.entry}-")
        ]
        (self.plugin_problems if suspects else self.problems).append(problem)

    def validate(
        self, model: type[Model], table: Branch, owner: Owner, *without: str
    ) -> Model | None:
        """The checked values of a table, or None."""
        try:
            return model.model_validate(table.plain(*without))
        except ValidationError as error:
            reported = set()
            for detail in error.errors(include_url=False):
                node = table.at(detail["loc"][:1])
                place = detail["loc"][:1]  # the members of a union fail one by one
                if place not in reported:
                    reported.add(place)
                    unknown = detail["type"] == "extra_forbidden"
                    self.problems.append(
                        wording.unknown_key(node, owner, self.homes)
                        if unknown
                        else wording.wrong(detail, table, owner)
                    )
        return None

    def check_component(self, choice: Choice) -> None:
        """The options of one component."""
        kind, table, owner = choice.kind.name, choice.table, choice.owner
        weight: Weight | None = Weight()
        if kind == "loss":
            only = Branch(
                table.key,
                {name: node for name, node in table.items.items() if name == "weight"},
                table.origin,
                table.rank,
            )
            weight = self.validate(Weight, only, Owner(owner.table, owner.words, Weight))
        model = self.validate(owner.model, table, owner, *owner.extra)
        if model is None or weight is None:
            return
        options = {name: getattr(model, name) for name in type(model).model_fields}
        if (kind, choice.name) == ("attention", AUTO.name) and isinstance(
            given := table.items.get("prefer"), Leaf
        ):
            for backend in options["prefer"]:
                self.check_backend(backend, given.origin)
        name = owner.table.removeprefix(f"{choice.kind.table}.") if choice.kind.many else kind
        self.chosen[kind][name] = Chosen(
            kind, owner.table, choice.name, choice.offer, options, weight.weight
        )

    def automatic(self) -> Offer:
        """The "auto" backend; by default it prefers those of its list that are offered."""
        (prefer,) = AUTO.options
        return AUTO._replace(
            options=(
                prefer._replace(default=[name for name in prefer.default if self.offered(name)]),
            )
        )

    def offered(self, backend: str) -> bool:
        """Is there an attention backend of that name?"""
        try:
            return bool(self.registry.find("attention", backend))
        except NotOffered:
            return False

    def check_backend(self, backend: str, origin: Origin) -> None:
        """An attention backend that the recipe names must be offered."""
        try:
            self.registry.find("attention", backend)
        except PluginError as error:
            self.report(error, "attention", backend, origin)
