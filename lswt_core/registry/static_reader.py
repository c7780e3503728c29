"""Reads a plugin's components and their options from its syntax tree, without importing it (plugins
import torch, which is slow).

Covers the usual form of a plugin. Anything else raises Unreadable, and the plugin is imported.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import typing
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import annotated_types

from lswt_core.registry.discover import Entry
from lswt_core.registry.kinds import KIND_OF_BASE
from lswt_core.registry.offer import REQUIRED, Offer, Option, find_flaw

HOOK = "lswt_components"
HOOKIMPL = "lswt_core.hooks.hookimpl"
BOUNDS = ("Ge", "Gt", "Le", "Lt", "Interval", "MultipleOf", "MinLen", "MaxLen", "Len")
VOCABULARY: dict[str, Any] = {
    **{f"builtins.{kind.__name__}": kind for kind in (bool, int, float, str, list, dict)},
    **{
        f"typing.{name}": getattr(typing, name)
        for name in ("Annotated", "Literal", "Optional", "Union")
    },
    **{f"annotated_types.{name}": getattr(annotated_types, name) for name in BOUNDS},
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Unreadable(Exception):
    """The source alone does not determine it."""


def read_offers(entry: Entry) -> list[Offer]:
    """Describe a plugin's components. Raises Unreadable."""
    home = Source(entry.module, entry.path or locate(entry.module))
    offers = [describe(entry, *home.find_class(node)) for node in home.offered()]
    if find_flaw(offers):
        raise Unreadable
    return offers


def locate(module: str) -> Path:
    """The file of a module, whose packages are not imported. Raises Unreadable."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError) as error:
        raise Unreadable from error
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        raise Unreadable
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    candidates = [Path(spec.origin)] if spec.origin and not rest else []
    for place in places if rest else ():
        base = place.joinpath(*rest)
        candidates += [base / "__init__.py", base.with_name(f"{base.name}.py")]
    for path in candidates:
        if path.suffix == ".py" and path.is_file():
            return path
    raise Unreadable


def describe(entry: Entry, source: Source, node: ast.ClassDef) -> Offer:
    """Describe the component that a class defines."""
    kind, options = source.kind(node), source.options(node)
    constants = {name: source.constant(node, name) for name in ("name", "citation")}
    return Offer(
        kind=kind,
        name=constants["name"],
        distribution=entry.distribution,
        version=entry.version,
        module=entry.module,
        source=str(source.path),
        doc=ast.get_docstring(node) or "",
        citation=inspect.cleandoc(constants["citation"]),
        options=options,
    )


@cache
def parse_source(text: bytes) -> ast.Module:
    """Parse a source text. The tree is never changed, so that registries share it."""
    return ast.parse(text)


class Source:
    """One parsed file: its top-level imports, definitions and constants by name."""

    def __init__(self, module: str, path: Path) -> None:
        self.module, self.path = module, path
        try:
            body = parse_source(path.read_bytes()).body
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            raise Unreadable from error
        self.imports: dict[str, str] = {}
        self.definitions: dict[str, ast.ClassDef | Function] = {}
        self.values: dict[str, ast.expr] = {}
        bound: Counter[str] = Counter()
        for statement in body:
            bound.update(self.bind(statement))
        for name, times in bound.items():
            if times > 1:  # which binding holds, only running it tells
                for names in (self.imports, self.definitions, self.values):
                    names.pop(name, None)

    def bind(self, statement: ast.stmt) -> list[str]:
        """Record what a top-level statement binds; returns the names."""
        match statement:
            case ast.Import() | ast.ImportFrom():
                imported = dict(self.imported_names(statement))
                self.imports |= imported
                return list(imported)
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                self.definitions[statement.name] = statement
                return [statement.name]
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                self.values[name] = value
                return [name]
        return []

    def imported_names(self, statement: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
        """The names that an import binds, and the full dotted name of each."""
        for alias in statement.names:
            top = alias.name.partition(".")[0]
            if isinstance(statement, ast.ImportFrom):
                yield alias.asname or alias.name, f"{self.absolute(statement)}.{alias.name}"
            elif alias.asname:
                yield alias.asname, alias.name
            else:
                yield top, top

    def absolute(self, statement: ast.ImportFrom) -> str:
        """The module of a ``from ... import``, relative ones resolved."""
        if not statement.level:
            return statement.module or ""
        package = self.module.split(".")
        if self.path.name != "__init__.py":
            package = package[:-1]
        parts = package[: len(package) - statement.level + 1]
        if statement.module:
            parts.append(statement.module)
        return ".".join(parts)

    def origin(self, node: ast.expr) -> str:
        """The full dotted name that an expression refers to."""
        match node:
            case ast.Attribute(value=value, attr=attribute):
                return f"{self.origin(value)}.{attribute}"
            case ast.Name(id=name) if name in self.imports:
                return self.imports[name]
            case ast.Name(id=name) if name in self.definitions or name in self.values:
                return f"{self.module}.{name}"
            case ast.Name(id=name) if f"builtins.{name}" in VOCABULARY:
                return f"builtins.{name}"
        raise Unreadable

    def offered(self) -> list[ast.expr]:
        """The expressions of the classes in the list that the hook returns."""
        hooks = [
            node
            for node in self.definitions.values()
            if isinstance(node, Function) and self.is_hook(node)
        ]
        match hooks:
            case [
                ast.FunctionDef(
                    name=name,
                    args=arguments,
                    body=[*first, ast.Return(value=ast.List(elts=elements))],
                )
            ]:
                plain = all(
                    isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                    for node in first
                )
                if name == HOOK and plain and not ast.unparse(arguments):
                    return elements
        raise Unreadable

    def is_hook(self, node: Function) -> bool:
        """Whether a function is decorated with ``hookimpl``."""
        plain = [mark for mark in node.decorator_list if not isinstance(mark, ast.Call)]
        return any(self.origin(mark) == HOOKIMPL for mark in plain)

    def find_class(self, node: ast.expr) -> tuple[Source, ast.ClassDef]:
        """The definition of a class, here or in the module it is imported from, and its file."""
        module, _, name = self.origin(node).rpartition(".")
        home = self if module == self.module else Source(module, locate(module))
        definition = home.definitions.get(name)
        if not isinstance(definition, ast.ClassDef):
            raise Unreadable
        return home, definition

    def kind(self, node: ast.ClassDef) -> str:
        """The kind of a class, by the interface among its bases."""
        origins = [self.origin(base) for base in node.bases]
        bases = [origin for origin in origins if origin in KIND_OF_BASE]
        inherits = len(origins) > 1 and not any(
            isinstance(item, Function) and item.name == "__init__" for item in node.body
        )
        if len(bases) != 1 or node.decorator_list or node.keywords or inherits:
            raise Unreadable
        return KIND_OF_BASE[bases[0]]

    def constant(self, node: ast.ClassDef, name: str) -> str:
        """The value of a string attribute of a class; the citation may be absent."""
        values = [self.literal(value) for value in assigned(node, name)]
        if not values and name == "citation":
            return ""
        if len(values) != 1 or not isinstance(values[0], str):
            raise Unreadable
        return values[0]

    def options(self, node: ast.ClassDef) -> tuple[Option, ...]:
        """The keyword-only parameters of a class's constructor."""
        constructors = [
            item for item in node.body if isinstance(item, Function) and item.name == "__init__"
        ]
        if not constructors:
            return ()
        (constructor, *others), arguments = constructors, constructors[0].args
        if others or constructor.decorator_list:
            raise Unreadable
        return tuple(
            self.option(*pair)
            for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        )

    def option(self, parameter: ast.arg, default: ast.expr | None) -> Option:
        """One parameter, its annotation and its default."""
        if parameter.annotation is None:
            raise Unreadable
        return Option(
            parameter.arg,
            self.annotation(parameter.annotation),
            REQUIRED if default is None else self.literal(default),
        )

    def annotation(self, node: ast.expr) -> Any:
        """Evaluate an annotation of builtin types, unions, Literal, Annotated and bounds."""
        match node:
            case ast.Constant(value=None):
                return None
            case ast.Name(id=name) if name in self.values:
                return self.annotation(self.values[name])
            case ast.Name() | ast.Attribute() if self.origin(node) in VOCABULARY:
                return VOCABULARY[self.origin(node)]
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.annotation(left) | self.annotation(right)
            case ast.Subscript():
                return self.subscript(node)
            case ast.Call():
                return self.bound(node)
        raise Unreadable

    def subscript(self, node: ast.Subscript) -> Any:
        """Evaluate e.g. list[int], Literal["a", "b"] or Annotated[int, Ge(1)]."""
        generic = self.annotation(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        read_part = self.literal if generic is Literal else self.annotation
        items = tuple(read_part(part) for part in parts)
        return generic[items if len(items) > 1 else items[0]]

    def bound(self, node: ast.Call) -> Any:
        """Evaluate a bound of annotated_types, e.g. Ge(1)."""
        if not self.origin(node.func).startswith("annotated_types."):
            raise Unreadable
        arguments = [self.literal(argument) for argument in node.args]
        keywords = {str(one.arg): self.literal(one.value) for one in node.keywords}
        return self.annotation(node.func)(*arguments, **keywords)

    def literal(self, node: ast.expr) -> Any:
        """The value of a literal, or of a top-level name for one."""
        value = node
        if isinstance(node, ast.Name):
            value = self.values.get(node.id, node)
        try:
            return ast.literal_eval(value)
        except (ValueError, TypeError) as error:
            raise Unreadable from error


def assigned(node: ast.ClassDef, name: str) -> list[ast.expr]:
    """The expressions that a class body assigns to a name. Raises Unreadable if it branches."""
    values: list[ast.expr] = []
    for statement in node.body:
        match statement:
            case ast.Assign(targets=targets, value=value):
                names = [part for target in targets for part in ast.walk(target)]
                if any(isinstance(part, ast.Name) and part.id == name for part in names):
                    values.append(value)
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value):
                if target == name:
                    values.append(value)
            case ast.If() | ast.Try() | ast.For() | ast.While() | ast.With() | ast.Match():
                raise Unreadable
    return values
