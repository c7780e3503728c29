"""Finds plugins: entry points of installed distributions (metadata only), single files, and modules
given in Python.
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

FILE = "file"  # the distribution of a single-file plugin


class Entry(NamedTuple):
    """A plugin's entry point, not yet read."""

    name: str
    distribution: str
    version: str
    module: str  # dotted name, unless the metadata are malformed
    path: Path | None = None  # of a single-file plugin
    live: ModuleType | None = None  # given as a module

    def suggests(self, component: str) -> bool:
        """Whether a component of that name is looked up here first: the plugin or its package is
        named like the component.
        """
        package = self.module.partition(".")[0].removeprefix(f"{PROJECT}_").replace("_", "-")
        names = (self.name, package)
        return any(component == name or component.startswith(f"{name}-") for name in names)

    def __str__(self) -> str:
        place = self.path or self.module
        return f"plugin {self.name!r} of {self.distribution} {self.version} ({place})"


def normal(distribution: str) -> str:
    """Normalize a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def installed() -> Iterator[Entry]:
    """Yield every entry point of the group, each module of a distribution once.

    ``importlib.metadata.entry_points()`` raises if a single distribution is malformed, so each is
    read on its own. Of two distributions of one name the first on the path counts, as in imports.
    """
    first: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        entries = declared_entries(distribution)
        if not entries:
            continue
        if first.setdefault(normal(entries[0].distribution), distribution) is distribution:
            yield from {entry.module: entry for entry in reversed(entries)}.values()


def declared_entries(distribution: metadata.Distribution) -> list[Entry]:
    """The plugins that one distribution declares."""
    try:
        if f"[{PROJECT}]" not in (distribution.read_text("entry_points.txt") or ""):
            return []
        points = [point for point in distribution.entry_points if point.group == PROJECT]
        declared = [(point.name, point.value) for point in points]
    except (OSError, ValueError, TypeError):  # not UTF-8, or a line without "="
        declared = [("entry_points.txt", "a malformed entry_points.txt")]
    facts = distribution.metadata  # slow to read, so only if the distribution has plugins
    name, version = (str(facts[key]) if key in facts else "unknown" for key in ("Name", "Version"))
    return [Entry(entry, name, version, module) for entry, module in declared]


def entry_of_file(path: Path) -> Entry:
    """A single-file plugin; its version is a hash of its content. Raises PluginError."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PluginError(
            f"the plugin file {path} cannot be read: {error.strerror}; give the path of a Python"
            " file"
        ) from error
    return Entry(path.stem, FILE, digest[:12], f"{PROJECT}_file_{digest[:12]}", path=path)


def entry_of_module(module: ModuleType) -> Entry:
    """A plugin given as a module, named after its package."""
    name, package = module.__name__, module.__name__.partition(".")[0].replace("_", "-")
    version = str(getattr(module, "__version__", "unknown"))
    return Entry(name, package, version, name, live=module)
