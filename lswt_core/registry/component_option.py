"""Options that are components themselves: a recipe writes them as tables with ``use``.

The annotation says what the constructor gets. ``DataSource``: a component. ``Callable[[Dims],
FeedForward]``: a function that builds one for given sizes. ``Mapping[str, DataSource]``: several,
by names of the recipe's choice. ``FeedForward | None = None``: one or none.
"""

from __future__ import annotations

import ast
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lswt_core.registry.kinds import KIND_OF_INTERFACE, KINDS, Kind
from lswt_core.registry.source_file import SourceFile, Unreadable

INTERFACES = "lswt_core.interfaces"
CALLABLES = ("collections.abc.Callable", "typing.Callable")
MAPPINGS = ("collections.abc.Mapping", "typing.Mapping", "builtins.dict")
# what the core gives a component before its options, where that is not ``Dims``
FIRST_ARGUMENTS = {"optimizer": "groups", "schedule": "horizon", "tracker": "run"}


@dataclass(frozen=True)
class ComponentOption:
    """The annotation of an option that is a component of some kind."""

    kind: str
    builder: bool = False  # the constructor gets a function that builds the component
    named: bool = False  # there are several, by name
    optional: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is one component."""
        return self == ComponentOption(self.kind)

    def __str__(self) -> str:
        """The annotation as it is written in source code."""
        text = KINDS[self.kind].interface
        if self.builder:
            text = f"Callable[..., {text}]"
        if self.named:
            text = f"Mapping[str, {text}]"
        return f"{text} | None" if self.optional else text

    def words(self) -> str:
        """What a recipe writes, in words."""
        if self.named:
            return f'tables by name, each with use = "..." for a {self.kind} component'
        return f'a table with use = "..." for a {self.kind} component'


def find_flaw(option: ComponentOption, owner: Kind, default: Any, required: Any) -> str | None:
    """Why a component of kind ``owner`` cannot have such an option, or None."""
    inner = KINDS[option.kind]
    if default is not required and not (default is None and option.optional):
        return f"it must have no default, or be annotated {inner.interface} | None and default None"
    if not option.builder and not has_arguments_of(owner, inner):
        return (
            f"it is annotated {inner.interface}, but a {owner.name} component does not get what one"
            f" is built with; annotate it Callable[..., {inner.interface}]"
        )
    return None


def has_arguments_of(owner: Kind, inner: Kind) -> bool:
    """Whether a component gets all positional arguments that one of another kind is built with."""
    if inner.given == 0 or inner.name == owner.name:
        return True
    first = [FIRST_ARGUMENTS.get(kind.name, "dims") for kind in (owner, inner)]
    return inner.given == 1 and owner.given >= 1 and first[0] == first[1]


# ---------- read from source


def read_annotation(source: SourceFile, node: ast.expr) -> ComponentOption | None:
    """The annotation that an expression writes; None if it is that of a plain value."""
    match node:
        case ast.BinOp(left=one, op=ast.BitOr(), right=ast.Constant(value=None)):
            return made_optional(read_annotation(source, one))
        case ast.BinOp(left=ast.Constant(value=None), op=ast.BitOr(), right=one):
            return made_optional(read_annotation(source, one))
        case ast.Subscript(value=generic, slice=part):
            return read_generic(source, origin_of(source, generic), part)
        case ast.Name(id=name) if name in source.values:
            return read_annotation(source, source.values[name])
        case ast.Name() | ast.Attribute():
            return of_name(origin_of(source, node))
    return None


def read_generic(source: SourceFile, generic: str, part: ast.expr) -> ComponentOption | None:
    """The annotation of e.g. Mapping[str, DataSource], from the parts of the expression."""
    if generic == "typing.Optional":
        return made_optional(read_annotation(source, part))
    match part:
        case ast.Tuple(elts=[key, value]) if generic in MAPPINGS:
            is_text = origin_of(source, key) == "builtins.str"
            return made_named(read_annotation(source, value)) if is_text else None
        case ast.Tuple(elts=[_, value]) if generic in CALLABLES:
            return made_builder(read_annotation(source, value))
    return None


def origin_of(source: SourceFile, node: ast.expr) -> str:
    """The full dotted name that an expression refers to; empty if the source does not tell."""
    try:
        return source.origin(node)
    except Unreadable:
        return ""


# ---------- read from a class


def from_hint(annotation: Any) -> ComponentOption | None:
    """The annotation of an imported constructor; None if it is that of a plain value."""
    generic, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if generic in (typing.Union, types.UnionType):
        others = [part for part in parts if part is not type(None)]
        return made_optional(from_hint(others[0])) if len(others) == 1 else None
    if generic in (dict, Mapping) and parts[0] is str:
        return made_named(from_hint(parts[1]))
    if generic is Callable:
        return made_builder(from_hint(parts[1]))
    if isinstance(annotation, type):
        return of_name(f"{annotation.__module__}.{annotation.__qualname__}")
    return None


# ---------- both


def of_name(dotted: str) -> ComponentOption | None:
    """The annotation that an interface's dotted name is."""
    module, _, name = dotted.rpartition(".")
    if module == INTERFACES and name in KIND_OF_INTERFACE:
        return ComponentOption(KIND_OF_INTERFACE[name])
    return None


def made_optional(option: ComponentOption | None) -> ComponentOption | None:
    """One that may be missing."""
    return option and replace(option, optional=True)


def made_named(option: ComponentOption | None) -> ComponentOption | None:
    """Several by name."""
    if option is None or option.named or option.optional:
        return None
    return replace(option, named=True)


def made_builder(option: ComponentOption | None) -> ComponentOption | None:
    """One that its owner builds."""
    return replace(option, builder=True) if option is not None and option.is_plain else None
