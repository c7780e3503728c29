"""What code a component is: its own files, those of the classes it derives from, and what they
import. Read from source, so that an import within a function counts too. Installed libraries are
told by their distributions instead.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from lswt_core.interfaces import Component
from lswt_core.recipe import Recipe
from lswt_core.registry import Offer, Registry
from lswt_core.registry.static_reader import Unreadable, locate

CORE = "lswt_core"
# directories of libraries that nobody edits in place
INSTALLED = {"site-packages", "dist-packages"}


class Code(NamedTuple):
    """The code of a component."""

    sha256: str  # of its source files, wherever they lie
    # top-level modules of installed libraries that it imports, e.g. "torch"
    libraries: frozenset[str]


class Module(NamedTuple):
    """A module's name and file."""

    name: str
    path: Path


def code_of(offer: Offer, registry: Registry) -> Code:
    """The code of a component, without the core's."""
    component = registry.load(offer)
    parents = [
        base
        for base in inspect.getmro(component)
        if issubclass(base, Component) and not apart(base.__module__)
    ]
    # others are found where they are imported
    modules = [Module(base.__module__, Path(inspect.getfile(base))) for base in parents]
    # it may offer a class that another module defines
    hook = getattr(sys.modules.get(offer.module), "__file__", None)
    modules += [Module(offer.module, Path(hook))] if hook else []
    own = {component.__module__, offer.module}
    inner = [one for module in modules if module.name in own for one in package(module)]
    return read([*modules, *inner], set(map(top, own)))


def codes_of(
    recipe: Recipe, registry: Registry, backends: Iterable[str]
) -> dict[str, dict[str, str]]:
    """By "kind/name", who offers a component of a run, and a hash of its code; of those that can
    change its numbers. ``backends`` are the attention backends that were chosen.
    """
    offers = {
        f"{one.kind}/{one.name}": one.offer
        for one in recipe.components()
        if one.offer.source and one.kind != "tracker"
    }
    offers |= {f"attention/{name}": registry.find("attention", name) for name in backends}
    return {
        name: {
            "distribution": offer.distribution,
            "version": offer.version,
            "sha256": code_of(offer, registry).sha256,
        }
        for name, offer in offers.items()
    }


@cache
def core_libraries() -> frozenset[str]:
    """Installed libraries that training itself imports."""
    return read(
        [Module(name, locate(name)) for name in (f"{CORE}.train", f"{CORE}.corpus")], {CORE}
    ).libraries


def read(modules: Iterable[Module], own: set[str]) -> Code:
    """The code of modules and of those they import that are no installed library; modules below a
    name in ``own`` never are.
    """
    waiting, libraries, files = list(modules), set[str](), set[Path]()
    while waiting:
        module = waiting.pop()
        if module.path in files:
            continue
        files.add(module.path)
        # a parent's: its file counts, what it imports is its distribution's
        if library(module, own):
            libraries.add(top(module.name))
            continue
        for name in imported(module):
            if not apart(name) or top(name) in own:
                found = places(name)
                inner = [one for one in found if not library(one, own)]
                waiting += inner
                libraries |= set() if inner else {top(name)}
    digests = sorted(sha256(path.read_bytes()).hexdigest() for path in files)
    return Code(sha256("".join(digests).encode()).hexdigest(), frozenset(libraries))


def library(module: Module, own: set[str]) -> bool:
    """Whether a module belongs to an installed library."""
    return top(module.name) not in own and bool(INSTALLED & set(module.path.parts))


def apart(module: str) -> bool:
    """Whether a module is the core's or Python's own."""
    return top(module) == CORE or top(module) in sys.stdlib_module_names


def top(module: str) -> str:
    """The first part of a dotted name."""
    return module.partition(".")[0]


def package(module: Module) -> Iterator[Module]:
    """All of the package that a module is in: what it imports by a name that it makes up counts
    too.
    """
    folder = module.path.parent
    if folder.joinpath("__init__.py").is_file():
        name = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            yield Module(".".join([name, *(part for part in parts if part != "__init__")]), path)


def imported(module: Module) -> Iterator[str]:
    """Every name that a file imports, anywhere in it; ``from a import b`` is a.b, which may be a
    module or a value of module a. Where modules are imported by what a text says, every text that
    reads like a name may be one.
    """
    text = module.path.read_bytes()
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return  # not Python; its content counts
    by_text = b"import_module" in text or b"__import__" in text
    parents = (
        module.name.split(".") if module.path.name == "__init__.py" else module.name.split(".")[:-1]
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = [*above, *filter(None, [node.module])]
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif by_text and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from [node.value] if all(map(str.isidentifier, node.value.split("."))) else []


def places(name: str) -> list[Module]:
    """The files that an import of a name runs: of every package on the way, and of the module
    itself.
    """
    parts, found = name.split("."), list[Module]()
    for size in range(1, len(parts) + 1):
        module = ".".join(parts[:size])
        try:
            found.append(Module(module, locate(module)))
        except Unreadable:
            # a value of the module, a namespace, a library that is not here or not written in
            # Python
            continue
    return found


def versions_of(libraries: Iterable[str]) -> dict[str, list[str]]:
    """Of every installed distribution that brings one of some top-level modules: its version, and a
    hash of the files it says it has installed, which another build of the same version changes.
    """
    owners = metadata.packages_distributions()
    names = {name for module in libraries for name in owners.get(module, ())}
    return {
        name: [metadata.version(name), content(metadata.distribution(name))]
        for name in sorted(names)
    }


def content(distribution: metadata.Distribution) -> str:
    """A hash of the files of a distribution, as it lists them; of none where it has no list."""
    lines = (distribution.read_text("RECORD") or "").splitlines()
    files = sorted(line for line in lines if ",sha256=" in line and ".dist-info/" not in line)
    return sha256("\n".join(files).encode()).hexdigest()
