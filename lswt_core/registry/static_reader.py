"""Reads a plugin's components and their options from its syntax tree, without importing it (plugins
import torch, which is slow).

Covers the usual form of a plugin. Anything else raises Unreadable, and the plugin is imported.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache

from lswt_core.registry.component_option import read_annotation
from lswt_core.registry.discover import Entry
from lswt_core.registry.kinds import KIND_OF_BASE
from lswt_core.registry.offer import REQUIRED, Offer, Option, find_flaw
from lswt_core.registry.source_file import Function, SourceFile, Unreadable, locate, read_source

HOOK = "lswt_components"
HOOKIMPL = "lswt_core.hooks.hookimpl"


def read_offers(entry: Entry) -> list[Offer]:
    """Describe a plugin's components. Raises Unreadable."""
    home = read_source(entry.module, entry.path or locate(entry.module))
    offers = [describe(entry, *find_class(home, node)) for node in offered(home)]
    if find_flaw(offers):
        raise Unreadable
    return offers


@cache
def describe(entry: Entry, source: SourceFile, node: ast.ClassDef) -> Offer:
    """Describe the component that a class defines; registries share what they are told."""
    return Offer(
        kind=kind_of(source, node),
        name=constant(source, node, "name"),
        distribution=entry.distribution,
        version=entry.version,
        module=entry.module,
        source=str(source.path),
        doc=ast.get_docstring(node) or "",
        citation=inspect.cleandoc(constant(source, node, "citation", absent="")),
        options=options_of(source, node),
    )


def offered(source: SourceFile) -> list[ast.expr]:
    """The expressions of the classes in the list that a file's hook returns."""
    hooks = [
        node
        for node in source.definitions.values()
        if isinstance(node, Function) and is_hook(source, node)
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


def is_hook(source: SourceFile, node: Function) -> bool:
    """Whether a function is decorated with ``hookimpl``."""
    plain = [mark for mark in node.decorator_list if not isinstance(mark, ast.Call)]
    return any(source.origin(mark) == HOOKIMPL for mark in plain)


def find_class(source: SourceFile, node: ast.expr) -> tuple[SourceFile, ast.ClassDef]:
    """The file that defines a class, which may be imported here, and the definition."""
    module, _, name = source.origin(node).rpartition(".")
    home = source if module == source.module else read_source(module, locate(module))
    definition = home.definitions.get(name)
    if not isinstance(definition, ast.ClassDef):
        raise Unreadable
    return home, definition


def kind_of(source: SourceFile, node: ast.ClassDef) -> str:
    """The kind of a class, by the interface among its bases."""
    origins = [source.origin(base) for base in node.bases]
    kinds = [KIND_OF_BASE[origin] for origin in origins if origin in KIND_OF_BASE]
    may_inherit_options = len(origins) > 1 and not constructors(node)
    if len(kinds) != 1 or node.decorator_list or node.keywords or may_inherit_options:
        raise Unreadable
    return kinds[0]


def constant(source: SourceFile, node: ast.ClassDef, name: str, absent: str | None = None) -> str:
    """The value of a string attribute of a class; ``absent`` if it has none."""
    values = [source.literal(value) for value in assigned(node, name)]
    if not values and absent is not None:
        return absent
    if len(values) != 1 or not isinstance(values[0], str):
        raise Unreadable
    return values[0]


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


def constructors(node: ast.ClassDef) -> list[Function]:
    """The definitions of a class's constructor."""
    return [item for item in node.body if isinstance(item, Function) and item.name == "__init__"]


def options_of(source: SourceFile, node: ast.ClassDef) -> tuple[Option, ...]:
    """The keyword-only parameters of a class's constructor."""
    match constructors(node):
        case []:
            return ()
        case [constructor] if not constructor.decorator_list:
            pairs = zip(constructor.args.kwonlyargs, constructor.args.kw_defaults, strict=True)
            return tuple(option(source, *pair) for pair in pairs)
    raise Unreadable


def option(source: SourceFile, parameter: ast.arg, default: ast.expr | None) -> Option:
    """One parameter, its annotation and its default."""
    if parameter.annotation is None:
        raise Unreadable
    return Option(
        parameter.arg,
        read_annotation(source, parameter.annotation) or source.annotation(parameter.annotation),
        REQUIRED if default is None else source.literal(default),
    )
