"""Where plugins are: entry points of installed distributions (metadata only), single files, or
modules given in Python.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lswt_core.errors import PluginError
from lswt_core.hooks import PROJECT

FILE = "file"  # stands for the distribution of a single-file plugin


class Entry(NamedTuple):
    """One plugin, not yet read."""

    name: str
    distribution: str
    version: str
    module: str  # dotted name, or whatever else stands in the metadata
    path: Path | None = None  # a single-file plugin
    live: ModuleType | None = None  # given as a module

    def suggests(self, component: str) -> bool:
        """Is this where a component of that name would be looked for first?"""
        package = self.module.partition(".")[0].removeprefix(f"{PROJECT}_").replace("_", "-")
        return any(
            component == name or component.startswith(f"{name}-") for name in (self.name, package)
        )

    def __str__(self) -> str:
        return (
            f"plugin {self.name!r} of {self.distribution} {self.version}"
            f" ({self.path or self.module})"
        )


def normal(distribution: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def installed() -> Iterator[Entry]:
    """Every entry point of the group, each module of a distribution once.

    Distribution by distribution: ``importlib.metadata.entry_points()`` raises if a single one's
    file is malformed.
    """
    known: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        if entries := points(distribution):
            # hides others of that name, as in imports
            first = known.setdefault(normal(entries[0].distribution), distribution)
            yield from (
                {entry.module: entry for entry in reversed(entries)}.values()
                if first is distribution
                else ()
            )


def points(distribution: metadata.Distribution) -> list[Entry]:
    """The plugins one distribution declares."""
    try:
        if f"[{PROJECT}]" not in (distribution.read_text("entry_points.txt") or ""):
            return []
        declared = [
            (point.name, point.value)
            for point in distribution.entry_points
            if point.group == PROJECT
        ]
    except (OSError, ValueError, TypeError):  # not UTF-8, or a line without "="
        declared = [("entry_points.txt", "a malformed entry_points.txt")]
    facts = distribution.metadata  # slow to read: only of those that matter
    name, version = (str(facts[key]) if key in facts else "unknown" for key in ("Name", "Version"))
    return [Entry(entry, name, version, module) for entry, module in declared]


def from_file(path: Path) -> Entry:
    """A plugin that is one file, identified by its content."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PluginError(
            f"the plugin file {path} cannot be read: {error.strerror}; give the path of a Python"
            " file"
        ) from error
    return Entry(path.stem, FILE, digest[:12], f"{PROJECT}_file_{digest[:12]}", path=path)


def from_module(module: ModuleType) -> Entry:
    """A plugin given as a module, named after its package."""
    package = module.__name__.partition(".")[0].replace("_", "-")
    return Entry(
        module.__name__,
        package,
        str(getattr(module, "__version__", "unknown")),
        module.__name__,
        live=module,
    )
