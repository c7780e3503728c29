"""The code that a run's process imported and that its cache key does not cover: what was found by
names made at run time, or lazily by a library.

It is recorded beside the run. Where one of these files or libraries has changed, the run is not the
one that is asked for.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import lswt_core
from lswt_core.ablation.runs.store import IMPORTS, covered_code, write_json
from lswt_core.model.code_fingerprint import SITE_DIRECTORIES, top_level_name
from lswt_core.model.installed_libraries import distributions_of_modules, library_versions
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

CORE = Path(lswt_core.__file__).parent
STANDARD = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib")]


def imported_code(covered: Iterable[Path], libraries: Iterable[str]) -> dict[str, Any]:
    """Return what this process has imported besides the core, the standard library, the source
    files ``covered`` and the ``libraries`` (top-level names) of the cache key.

    "files": sha256 by path. "libraries": version and content hash by distribution.
    """
    known, names = {path.resolve() for path in covered}, set(libraries)
    distributions, files, installed = distributions_of_modules(), dict[str, str](), set[str]()
    for name, module in [*sys.modules.items()]:
        path, top = file_of(module), top_level_name(name)
        if path is None or path in known or is_of_the_key(path, top) or top in names:
            continue
        if top in distributions and not SITE_DIRECTORIES.isdisjoint(path.parts):
            installed.add(top)
        else:
            files[str(path)] = hash_file(path)
    of_the_key = library_versions(names)
    versions = library_versions(installed)
    return {
        "files": dict(sorted(files.items())),
        "libraries": {name: versions[name] for name in versions if name not in of_the_key},
    }


def is_of_the_key(path: Path, top: str) -> bool:
    """Whether every cache key covers a file: the core, Python, and the path of what is installed in
    place.
    """
    if path.is_relative_to(CORE) or top.startswith("__editable__"):
        return True
    is_installed = not SITE_DIRECTORIES.isdisjoint(path.parts)
    return not is_installed and any(path.is_relative_to(directory) for directory in STANDARD)


def file_of(module: ModuleType) -> Path | None:
    """Return the file of a module; None if it has none."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str):
        return None
    path = Path(file).resolve()
    return path if path.is_file() else None


def hash_file(path: Path) -> str:
    """Hash a file's content."""
    return sha256(path.read_bytes()).hexdigest()


def record_imports(directory: Path, recipe: Recipe, registry: Registry) -> None:
    """Record what this process has imported in a run's directory, besides what earlier processes of
    this run have.
    """
    path, now = directory / IMPORTS, imported_code(*covered_code(recipe, registry))
    before: dict[str, dict[str, Any]] = {}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {name: before.get(name, {}) | found for name, found in now.items()})
