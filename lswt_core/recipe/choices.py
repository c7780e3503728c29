"""Looks up the components that tables name, and those inside of them. Problems are collected, none
is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from lswt_core.errors import PluginError, Problem
from lswt_core.recipe import messages
from lswt_core.recipe.messages import Owner
from lswt_core.recipe.provenance import USE, Branch, Leaf, Origin
from lswt_core.registry import AUTO, NotOffered, Offer, Registry
from lswt_core.registry.kinds import KINDS, Kind

LIST = "python -m lswt_core plugins list"
USE_KEY = frozenset({"use"})


class Choice(NamedTuple):
    """A component that is offered, its options not yet validated."""

    kind: Kind
    name: str
    offer: Offer
    table: Branch
    owner: Owner
    # of the options that are components, those that the recipe sets; None: it sets that to none
    inner: Mapping[str, Inner] = {}

    def with_inner(self) -> Iterator[Choice]:
        """Yield the choice and all inside of it."""
        yield self
        for inner in self.inner.values():
            for one in inner.values() if isinstance(inner, dict) else [inner]:
                if one is not None:
                    yield from one.with_inner()

    def options_table(self) -> Branch:
        """The table, with an empty one for every component inside of it."""
        items = dict(self.table.items)
        for name in items.keys() & self.offer.component_options.keys():
            items[name] = Branch(items[name].key, {}, items[name].origin)
        return replace(self.table, items=items)


Inner: TypeAlias = Choice | dict[str, Choice] | None


class Chooser:
    """Looks up components; ``problems`` and ``plugin_problems`` (plugins that are broken or clash)
    are added to.
    """

    def __init__(
        self, registry: Registry, problems: list[Problem], plugin_problems: list[Problem]
    ) -> None:
        self.registry = registry
        self.problems, self.plugin_problems = problems, plugin_problems

    def choice(
        self,
        kind: Kind,
        path: str,
        usual: str | None,
        table: Branch,
        extra: frozenset[str] = USE_KEY,
    ) -> Choice | None:
        """The component of a table: that of ``use``, else the ``usual`` one. None, with a problem,
        if there is none. ``extra`` are the table's keys besides its options.
        """
        use = table.items.get("use")
        name = use.value if isinstance(use, Leaf) else usual
        origin = use.origin if isinstance(use, Leaf) else table.origin
        if not isinstance(name, str) or isinstance(use, Branch):
            missing = use is None
            what = f'missing key "{path}.use"' if missing else f'wrong value for "{path}.use"'
            why = f"it names the {kind.name}" if missing else "it is not a text in quotes"
            fix = f'write e.g. use = "{usual or USE.get(kind.name, "NAME")}"'
            self.problems.append(Problem(what, origin.where, why, fix, origin.text))
            return None
        try:
            if (kind.name, name, path) == ("attention", AUTO.name, kind.table):
                offer = self.automatic()
            else:
                offer = self.registry.find(kind.name, name)
            words = f'the {kind.name} "{offer.name}" ({offer.distribution} {offer.version})'
            owner = Owner(path, words, self.registry.schema(offer), extra, usual)
        except PluginError as error:
            self.report(error, kind.name, name, origin)
            return None
        return Choice(kind, name, offer, table, owner, self.inner_choices(offer, path, table))

    def inner_choices(self, offer: Offer, path: str, table: Branch) -> dict[str, Inner]:
        """The components that a table sets options to; a problem for each that is none."""
        inner: dict[str, Inner] = {}
        for name, option in offer.component_options.items():
            node, place = table.items.get(name), f"{path}.{name}"
            if isinstance(node, Leaf) and node.value is False and option.optional:
                inner[name] = None
            elif isinstance(node, Leaf):
                own = f"{place}.NAME" if option.named else place
                self.problems.append(messages.not_a_component(node, own))
            elif node is not None and option.named:
                inner[name] = self.named_choices(KINDS[option.kind], place, node)
            elif node is not None:
                inner[name] = self.choice(KINDS[option.kind], place, None, node)
        return inner

    def named_choices(self, kind: Kind, path: str, table: Branch) -> dict[str, Choice]:
        """The components of a table of tables; a table is named like its component unless it has
        ``use``.
        """
        choices: dict[str, Choice] = {}
        for name, node in sorted(table.items.items()):
            place = f"{path}.{name}"
            if isinstance(node, Branch):
                if (choice := self.choice(kind, place, name, node)) is not None:
                    choices[name] = choice
            elif node.value is not False:
                self.problems.append(messages.not_a_component(node, place))
        return choices

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
