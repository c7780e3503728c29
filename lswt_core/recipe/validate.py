"""Validates a merged recipe against the core's tables and the options of its components. All
problems are collected, none is raised.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, TypeVar

from annotated_types import Ge
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

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
    """A component of a recipe, with its validated options and all defaults."""

    kind: str
    table: str  # "ffn", "memory.xl"
    name: str  # as written, perhaps qualified
    offer: Offer
    options: dict[str, Any]
    weight: float = 1.0  # of a loss


class Choice(NamedTuple):
    """A component that is offered, its options not yet validated."""

    kind: Kind
    name: str
    offer: Offer
    table: Branch
    owner: Owner


class Checked:
    """A merged recipe: its valid tables and components, and its problems."""

    def __init__(self, tree: Branch, registry: Registry, fallback: Origin) -> None:
        """``fallback`` is the origin of tables that are missing."""
        self.tree, self.registry, self.fallback = tree, registry, fallback
        self.problems: list[Problem] = []
        # plugins that are broken or clash
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
                self.problems.append(wording.unknown_table(node, tables, self.homes))
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
            self.problems.append(wording.not_a_table(node, fix))
            return None
        return node

    def choices(self, kind: Kind) -> Iterator[Choice]:
        """The components of a kind that the recipe names and that are offered."""
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
            yield from self.choice(kind, kind.table, None, table)
            return
        for component, node in table.items.items():
            if isinstance(node, Branch):
                yield from self.choice(kind, f"{kind.table}.{component}", component, node)
            elif node.value is not False:
                fix = f"write [{node.key}], or {node.key} = false to remove it"
                self.problems.append(wording.not_a_table(node, fix))

    def choice(
        self, kind: Kind, path: str, component: str | None, table: Branch
    ) -> Iterator[Choice]:
        """The component of a table: that of ``use``, else of the table's name or the kind's
        default. Yields nothing, and adds a problem, if there is none.
        """
        use = table.items.get("use")
        usual = USE[kind.name] if component is None else component
        name = use.value if isinstance(use, Leaf) else usual
        origin = use.origin if isinstance(use, Leaf) else table.origin
        if not isinstance(name, str) or isinstance(use, Branch):
            what, why = f'wrong value for "{path}.use"', "it is not a text in quotes"
            fix = f'write e.g. use = "{usual}"'
            self.problems.append(Problem(what, origin.where, why, fix, origin.text))
            return
        extra = frozenset({"use", "weight"} if kind.name == "loss" else {"use"})
        try:
            if (kind.name, name) == ("attention", AUTO.name):
                offer = self.automatic()
            else:
                offer = self.registry.find(kind.name, name)
            words = f'the {kind.name} "{offer.name}" ({offer.distribution} {offer.version})'
            owner = Owner(path, words, self.registry.schema(offer), extra)
        except PluginError as error:
            self.report(error, kind.name, name, origin)
            return
        yield Choice(kind, name, offer, table, owner)

    def report(self, error: PluginError, kind: str, name: str, origin: Origin) -> None:
        """Add the problem of a component that no plugin offers, or whose plugin is broken."""
        if not isinstance(error, NotOffered):
            what, fix = f'cannot use the {kind} "{name}"', f"see {LIST}"
            self.plugin_problems.append(Problem(what, origin.where, str(error), fix, origin.text))
            return
        guess = f'did you mean "{error.nearest}"? Else ' if error.nearest else ""
        why = f"no plugin offers it; {error.details()}"
        fix = f"{guess}install the package that offers it, or choose another (see {LIST})"
        problem = Problem(f'unknown {kind} "{name}"', origin.where, why, fix, origin.text)
        plain = name.rpartition(":")[2]
        broken = [one.entry for one in error.broken]
        if any(plain == entry or plain.startswith(f"{entry}-") for entry in broken):
            self.plugin_problems.append(problem)
        else:
            self.problems.append(problem)

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
                        self.problems.append(wording.unknown_key(node, own, self.homes))
                    else:
                        located = ErrorDetails({**detail, "loc": rest})
                        self.problems.append(wording.wrong_value(located, inner, own))
        return None

    def check_component(self, choice: Choice) -> None:
        """Validate the options of one component."""
        kind, table, owner = choice.kind.name, choice.table, choice.owner
        weight: Weight | None = Weight()
        if kind == "loss":
            own = {name: node for name, node in table.items.items() if name == "weight"}
            only = Branch(table.key, own, table.origin, table.rank)
            weight = self.validate(Weight, only, Owner(owner.table, owner.words, Weight))
        model = self.validate(owner.model, table, owner, *owner.extra)
        if model is None or weight is None:
            return
        options = {name: getattr(model, name) for name in type(model).model_fields}
        preferred = table.items.get("prefer")
        if (kind, choice.name) == ("attention", AUTO.name) and isinstance(preferred, Leaf):
            for backend in options["prefer"]:
                self.check_backend(backend, preferred.origin)
        name = owner.table.removeprefix(f"{choice.kind.table}.") if choice.kind.many else kind
        self.chosen[kind][name] = Chosen(
            kind, owner.table, choice.name, choice.offer, options, weight.weight
        )

    def automatic(self) -> Offer:
        """The "auto" backend; by default it prefers those of its list that are offered."""
        (prefer,) = AUTO.options
        offered = [name for name in prefer.default if self.offered(name)]
        return AUTO._replace(options=(prefer._replace(default=offered),))

    def offered(self, backend: str) -> bool:
        """Whether some plugin offers an attention backend of that name."""
        try:
            return bool(self.registry.find("attention", backend))
        except NotOffered:
            return False

    def check_backend(self, backend: str, origin: Origin) -> None:
        """Report an attention backend of ``prefer`` that is not offered."""
        try:
            self.registry.find("attention", backend)
        except PluginError as error:
            self.report(error, "attention", backend, origin)


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
