"""Reads a plugin's offers from its source text, without importing it: plugins import torch, and
reading must not.

Reads what plugins usually look like; anything else raises Unreadable, and the caller imports the
plugin instead.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import typing
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, Literal

import annotated_types

from lswt_core.registry.discover import Entry
from lswt_core.registry.kinds import KIND_OF_INTERFACE
from lswt_core.registry.offer import REQUIRED, Offer, Option, complaint

HOOK = "lswt_components"
HOOKIMPL = "lswt_core.hooks.hookimpl"
INTERFACES = "lswt_core.interfaces."
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
    """The text alone does not tell."""


def read(entry: Entry) -> list[Offer]:
    """The offers of a plugin."""
    home = Source(entry.module, entry.path or locate(entry.module))
    offers = [describe(entry, *home.find_class(node)) for node in home.offered()]
    if complaint(offers):
        raise Unreadable
    return offers


def locate(module: str) -> Path:
    """The file of a module; its parent packages are not imported."""
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
    """The offer a class definition makes."""
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
def parse(text: bytes) -> ast.Module:
    """The syntax of a source text. It is read only, so that registries share it."""
    return ast.parse(text)


class Source:
    """One parsed file: what its top-level names stand for."""

    def __init__(self, module: str, path: Path) -> None:
        self.module, self.path = module, path
        try:
            body = parse(path.read_bytes()).body
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            raise Unreadable from error
        self.imports: dict[str, str] = {}
        self.definitions: dict[str, ast.ClassDef | Function] = {}
        self.values: dict[str, ast.expr] = {}
        bound: Counter[str] = Counter()
        for statement in body:
            bound.update(self.bind(statement))
        # which one holds is for Python to say
        for name in [name for name, times in bound.items() if times > 1]:
            for names in (self.imports, self.definitions, self.values):
                names.pop(name, None)

    def bind(self, statement: ast.stmt) -> list[str]:
        """Note what a top-level statement binds; returns the names."""
        match statement:
            case ast.Import():
                new = {
                    a.asname or a.name.partition(".")[0]: a.name
                    if a.asname
                    else a.name.partition(".")[0]
                    for a in statement.names
                }
                self.imports |= new
            case ast.ImportFrom():
                new = {
                    a.asname or a.name: f"{self.absolute(statement)}.{a.name}"
                    for a in statement.names
                }
                self.imports |= new
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                new = {statement.name: ""}
                self.definitions[statement.name] = statement
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                new = {name: ""}
                self.values[name] = value
            case _:
                new = {}
        return list(new)

    def absolute(self, statement: ast.ImportFrom) -> str:
        """The module a ``from ... import`` names."""
        if not statement.level:
            return statement.module or ""
        parts = (
            self.module.split(".")
            if self.path.name == "__init__.py"
            else self.module.split(".")[:-1]
        )
        parts = parts[: len(parts) - statement.level + 1]
        return ".".join([*parts, *filter(None, [statement.module])])

    def origin(self, node: ast.expr) -> str:
        """The full dotted name of what an expression names."""
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
        """The expressions in the list that the hook returns."""
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
        """Is a function marked as an implementation of a hook?"""
        return any(
            not isinstance(mark, ast.Call) and self.origin(mark) == HOOKIMPL
            for mark in node.decorator_list
        )

    def find_class(self, node: ast.expr) -> tuple[Source, ast.ClassDef]:
        """The definition of a class, here or in the module it is imported from, and the file it
        stands in.
        """
        module, _, name = self.origin(node).rpartition(".")
        home = self if module == self.module else Source(module, locate(module))
        definition = home.definitions.get(name)
        if not isinstance(definition, ast.ClassDef):
            raise Unreadable
        return home, definition

    def kind(self, node: ast.ClassDef) -> str:
        """The kind a class belongs to: the interface among its bases."""
        origins = [self.origin(base) for base in node.bases]
        interfaces = [
            origin.removeprefix(INTERFACES) for origin in origins if origin.startswith(INTERFACES)
        ]
        inherits = len(origins) > 1 and not any(
            isinstance(item, Function) and item.name == "__init__" for item in node.body
        )
        if (
            len(interfaces) != 1
            or interfaces[0] not in KIND_OF_INTERFACE
            or node.decorator_list
            or node.keywords
            or inherits
        ):
            raise Unreadable
        return KIND_OF_INTERFACE[interfaces[0]]

    def constant(self, node: ast.ClassDef, name: str) -> str:
        """A text in the body of a class; the citation may be absent."""
        found: list[ast.expr | None] = []
        for item in node.body:
            match item:
                case ast.Assign(targets=targets, value=value):
                    found += [
                        value
                        for target in targets
                        for part in ast.walk(target)
                        if isinstance(part, ast.Name) and part.id == name
                    ]
                case ast.AnnAssign(target=ast.Name(id=target_name), value=value) if (
                    target_name == name
                ):
                    found.append(value)
                case ast.If() | ast.Try() | ast.For() | ast.While() | ast.With() | ast.Match():
                    raise Unreadable
        values = [self.literal(value) for value in found if value is not None] or (
            [""] if name == "citation" else []
        )
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
        """What an annotation means, of builtin types, unions, Literal, Annotated and bounds."""
        match node:
            case ast.Constant(value=None):
                return None
            case ast.Name(id=name) if name in self.values:
                return self.annotation(self.values[name])
            case ast.Name() | ast.Attribute() if self.origin(node) in VOCABULARY:
                return VOCABULARY[self.origin(node)]
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.annotation(left) | self.annotation(right)
            case ast.Subscript(value=value, slice=inside):
                head = self.annotation(value)
                parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
                read_part = self.literal if head is Literal else self.annotation
                items = tuple(read_part(part) for part in parts)
                return head[items if len(items) > 1 else items[0]]
            case ast.Call(func=function, args=arguments, keywords=keywords) if self.origin(
                function
            ).startswith("annotated_types."):
                return self.annotation(function)(
                    *map(self.literal, arguments),
                    **{str(k.arg): self.literal(k.value) for k in keywords},
                )
        raise Unreadable

    def literal(self, node: ast.expr) -> Any:
        """The value of a literal, or of a top-level name for one."""
        try:
            return ast.literal_eval(
                self.values.get(node.id, node) if isinstance(node, ast.Name) else node
            )
        except (ValueError, TypeError) as error:
            raise Unreadable from error
