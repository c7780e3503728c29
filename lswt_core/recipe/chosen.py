"""A component of a recipe, with the components inside of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lswt_core.registry import Offer


class Chosen(NamedTuple):
    """A component of a recipe, with its validated options and all defaults. An option that is a
    component is a Chosen; one of several components by name is a dict of them, sorted by name.
    """

    kind: str
    table: str  # "ffn", "memory.xl", "data.sources.code"
    name: str  # as written, perhaps qualified
    offer: Offer
    options: dict[str, Any]
    weight: float = 1.0  # of a loss
    token_directory: str | None = None  # of [data]: token files of its text

    def parts(self, option: str) -> dict[str, Chosen]:
        """The components of an option by name; "" is the name of a single one."""
        value = self.options[option]
        if isinstance(value, Chosen):
            return {"": value}
        return value or {}

    def with_inner(self) -> Iterator[Chosen]:
        """Yield the component and every one inside of it."""
        yield self
        for option in self.offer.component_options:
            for part in self.parts(option).values():
                yield from part.with_inner()

    def plain_options(self) -> dict[str, Any]:
        """The options as a recipe's table holds them: components as tables, false for none."""
        plain = dict(self.options)
        for name, option in self.offer.component_options.items():
            tables = {part: one.as_table() for part, one in self.parts(name).items()}
            if plain[name] is None:
                plain[name] = False
            else:
                plain[name] = tables if option.named else tables[""]
        return plain

    def as_table(self) -> dict[str, Any]:
        """The component as a table."""
        return {"use": self.name, **self.plain_options()}
