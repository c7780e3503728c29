"""One source file, read from its syntax tree: what its top-level names stand for, and the values
of literals and annotations.
"""

from __future__ import annotations

import ast
import importlib.util
import typing
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import annotated_types

BOUNDS = ("Ge", "Gt", "Le", "Lt", "Interval", "MultipleOf", "MinLen", "MaxLen", "Len")
VOCABULARY: dict[str, Any] = {
    **{f"builtins.{kind.__name__}": kind for kind in (bool, int, float, str, list, dict)},
    **{
        f"typing.{name}": getattr(typing, name)
        for name in ("Annotated", "Any", "Literal", "Optional", "Union")
    },
    **{f"annotated_types.{name}": getattr(annotated_types, name) for name in BOUNDS},
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Unreadable(Exception):
    """The source alone does not determine it."""


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


@cache
def parse_source(text: bytes) -> ast.Module:
    """Parse a source text. The tree is never changed, so that registries share it."""
    return ast.parse(text)


def imported_module(statement: ast.ImportFrom, module: str, path: Path) -> str:
    """The module of a ``from ... import`` in the file of a module, relative ones resolved."""
    if not statement.level:
        return statement.module or ""
    package = module.split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    parts = package[: len(package) - statement.level + 1]
    if statement.module:
        parts.append(statement.module)
    return ".".join(parts)


def read_source(module: str, path: Path) -> SourceFile:
    """A module's file. Registries share it while its content is the same."""
    try:
        return read_content(module, path, path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise Unreadable from error


@cache
def read_content(module: str, path: Path, text: bytes) -> SourceFile:
    """A module's file of a content."""
    return SourceFile(module, path, parse_source(text).body)


class SourceFile:
    """A parsed file: its top-level imports, definitions and constants by name. Never changed."""

    def __init__(self, module: str, path: Path, body: list[ast.stmt]) -> None:
        self.module, self.path = module, path
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
        base = ""
        if isinstance(statement, ast.ImportFrom):
            base = imported_module(statement, self.module, self.path)
        for alias in statement.names:
            top = alias.name.partition(".")[0]
            if isinstance(statement, ast.ImportFrom):
                yield alias.asname or alias.name, f"{base}.{alias.name}"
            elif alias.asname:
                yield alias.asname, alias.name
            else:
                yield top, top

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
