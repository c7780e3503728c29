"""Fingerprints of a component's code: its own files, those of its base classes, and everything
they import. Imports are read from the syntax, so that one inside a function counts too. Installed
libraries are identified by their distributions instead.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import lswt_core
from lswt_core.interfaces import Component
from lswt_core.recipe import Chosen
from lswt_core.registry import Offer, Registry
from lswt_core.registry.source_file import (
    Unreadable,
    imported_module,
    locate,
    parse_source,
)

CORE = "lswt_core"
# the core's modules whose libraries every training run uses
TRAINING_MODULES = (f"{CORE}.train.trainer", f"{CORE}.data.corpus")
# directories of libraries that nobody edits in place
SITE_DIRECTORIES = {"site-packages", "dist-packages"}
LONGEST_NAME = 256  # characters, of files
OF_THE_SYSTEM = ("/proc/", "/sys/", "/dev/")  # whose content is not fixed


class CodeFingerprint(NamedTuple):
    """The fingerprint of some code."""

    sha256: str  # of its source files' contents, wherever they lie
    data_sha256: str  # of files that are no source: of its package, or named by string literals
    libraries: frozenset[str]  # top-level modules of installed libraries it imports, e.g. "torch"
    files: frozenset[Path]  # sources


class SourceModule(NamedTuple):
    """A module's name and file."""

    name: str
    path: Path


class Imported(NamedTuple):
    """What modules import, themselves included."""

    files: set[Path]
    sources: list[SourceModule]  # of those files, without those of installed libraries
    libraries: set[str]  # top-level modules of installed libraries


def fingerprint_component(offer: Offer, registry: Registry) -> CodeFingerprint:
    """Fingerprint a component's code, the core's excluded."""
    component = registry.load(offer)
    bases = [
        base
        for base in inspect.getmro(component)
        if issubclass(base, Component) and not is_core_or_stdlib(base.__module__)
    ]
    modules = [SourceModule(base.__module__, Path(inspect.getfile(base))) for base in bases]
    # the module that offers a class need not be the one that defines it
    hook = getattr(sys.modules.get(offer.module), "__file__", None)
    modules += [SourceModule(offer.module, Path(hook))] if hook else []
    own = {component.__module__, offer.module}
    package = [one for module in modules if module.name in own for one in package_modules(module)]
    data = [path for module in modules if module.name in own for path in package_data(module)]
    return fingerprint_modules([*modules, *package], {top_level_name(name) for name in own}, data)


def fingerprint_components(
    components: Iterable[Chosen], registry: Registry, backends: Iterable[str]
) -> dict[str, dict[str, str]]:
    """Distribution, version and code hash of every component that can change a run's numbers, by
    "kind/name". ``backends`` are the attention backends chosen for the run.
    """
    offers = {
        f"{one.kind}/{one.name}": one.offer
        for one in components
        if one.offer.source and one.kind != "tracker"
    }
    offers |= {f"attention/{name}": registry.find("attention", name) for name in backends}
    return {
        name: {
            "distribution": offer.distribution,
            "version": offer.version,
            "sha256": fingerprint_component(offer, registry).sha256,
        }
        for name, offer in offers.items()
    }


@cache
def fingerprint_core() -> str:
    """Hash the core's own source files."""
    return hash_files(Path(lswt_core.__file__).parent.rglob("*.py"))


@cache
def describe_core() -> dict[str, str | None]:
    """The core's version, the hash of its source, and the commit of its repository; None: it lies
    in none, or git is not installed.
    """
    folder = str(Path(lswt_core.__file__).parent)
    # fails where the core is no part of the repository that it lies in
    command = ["git", "-C", folder, "rev-parse", "HEAD", "HEAD:./__init__.py"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        commit = done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"version": lswt_core.__version__, "sha256": fingerprint_core(), "commit": commit}


@cache
def core_libraries() -> frozenset[str]:
    """Top-level modules of the installed libraries that training itself imports."""
    modules = [SourceModule(name, locate(name)) for name in TRAINING_MODULES]
    return frozenset(follow_imports(modules, {CORE}).libraries)


def fingerprint_modules(
    modules: Iterable[SourceModule], own: set[str], data: Iterable[Path] = ()
) -> CodeFingerprint:
    """Fingerprint modules and everything they import, transitively, except installed libraries, and
    ``data`` files and those that modules name. Modules below a top-level name in ``own`` never
    count as installed.
    """
    imported = follow_imports(modules, own)
    named = {path for module in imported.sources for path in named_files(module)}
    return CodeFingerprint(
        hash_files(imported.files),
        hash_files(named.union(data) - imported.files),
        frozenset(imported.libraries),
        frozenset(imported.files),
    )


def follow_imports(modules: Iterable[SourceModule], own: set[str]) -> Imported:
    """Follow the imports of modules to installed libraries, which are not looked into."""
    queue, imported = list(modules), Imported(set(), [], set())
    while queue:
        module = queue.pop()
        if module.path in imported.files:
            continue
        imported.files.add(module.path)
        # an installed base class: its file counts, its imports belong to its distribution
        if is_installed(module, own):
            imported.libraries.add(top_level_name(module.name))
            continue
        imported.sources.append(module)
        for name in imported_names(module):
            if is_core_or_stdlib(name) and top_level_name(name) not in own:
                continue
            local = [one for one in modules_imported_by(name) if not is_installed(one, own)]
            queue += local
            if not local:
                imported.libraries.add(top_level_name(name))
    return imported


def hash_files(paths: Iterable[Path]) -> str:
    """Hash the contents of files, whatever their names and order."""
    digests = sorted(sha256(path.read_bytes()).hexdigest() for path in paths)
    return sha256("".join(digests).encode()).hexdigest()


def is_installed(module: SourceModule, own: set[str]) -> bool:
    """Whether a module belongs to an installed library."""
    in_site_directory = bool(SITE_DIRECTORIES & set(module.path.parts))
    return top_level_name(module.name) not in own and in_site_directory


def is_core_or_stdlib(module: str) -> bool:
    """Whether a module is the core's or of Python's standard library."""
    return top_level_name(module) == CORE or top_level_name(module) in sys.stdlib_module_names


def top_level_name(module: str) -> str:
    """The first part of a dotted name."""
    return module.partition(".")[0]


def package_modules(module: SourceModule) -> Iterator[SourceModule]:
    """Yield all modules of a module's package: it may import them by names built at run time."""
    folder = module.path.parent
    if not folder.joinpath("__init__.py").is_file():
        return
    package = module.name
    if module.path.name != "__init__.py":
        package = module.name.rpartition(".")[0]
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        below = [part for part in parts if part != "__init__"]
        yield SourceModule(".".join([package, *below]), path)


def package_data(module: SourceModule) -> list[Path]:
    """Files of a module's package that are no Python source: tables, kernels, compiled code."""
    folder = module.path.parent
    if not folder.joinpath("__init__.py").is_file():
        return []
    return [
        path
        for path in folder.rglob("*")
        if path.suffix not in (".py", ".pyc", ".pyo") and is_visible_file(path, folder)
    ]


def is_visible_file(path: Path, folder: Path) -> bool:
    """Whether a path is a file, and neither it nor a directory that it lies in is hidden."""
    parts = path.relative_to(folder).parts
    return path.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts)


def named_files(module: SourceModule) -> Iterator[Path]:
    """Yield the files that string literals of a module name, relative to it or to the working
    directory: it may read them.
    """
    for node in ast.walk(parse_module(module)):
        value = node.value if isinstance(node, ast.Constant) else None
        if not isinstance(value, str) or not 0 < len(value) < LONGEST_NAME or "\0" in value:
            continue
        for path in (module.path.parent / value, Path(value)):
            if not str(path).startswith(OF_THE_SYSTEM) and path.is_file():
                yield path


def parse_module(module: SourceModule) -> ast.Module:
    """A module's syntax tree; an empty one if it is not Python: then only its content counts."""
    try:
        return parse_source(module.path.read_bytes())
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def imported_names(module: SourceModule) -> Iterator[str]:
    """Yield every name that a file imports, anywhere in it. ``from a import b`` is a.b, a module
    or a value of module a. In a file that imports by strings, every string that looks like a
    dotted name is taken for one.
    """
    text, tree = module.path.read_bytes(), parse_module(module)
    imports_by_string = b"import_module" in text or b"__import__" in text
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = imported_module(node, module.name, module.path)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif imports_by_string and isinstance(node, ast.Constant):
            yield from dotted_names(node.value)


def dotted_names(value: object) -> list[str]:
    """The value of a literal if it is a string that could name a module, else nothing."""
    if isinstance(value, str) and all(part.isidentifier() for part in value.split(".")):
        return [value]
    return []


def modules_imported_by(name: str) -> list[SourceModule]:
    """The files that importing a name runs: those of its parent packages and of the module."""
    parts, modules = name.split("."), list[SourceModule]()
    for size in range(1, len(parts) + 1):
        module = ".".join(parts[:size])
        try:
            modules.append(SourceModule(module, locate(module)))
        except Unreadable:
            # a value of the module, a namespace package, or a library that is not installed or
            # not written in Python
            continue
    return modules
