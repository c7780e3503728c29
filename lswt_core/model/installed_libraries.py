"""Versions and contents of installed libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import sha256
from importlib import metadata


def library_versions(libraries: Iterable[str]) -> dict[str, list[str]]:
    """Version and content hash of every installed distribution that provides one of some
    top-level modules; the hash tells builds of one version apart.
    """
    distributions = distributions_of_modules()
    names = {name for module in libraries for name in distributions.get(module, ())}
    return {name: distribution_version(name) for name in sorted(names)}


def distributions_of_modules() -> Mapping[str, list[str]]:
    """The installed distributions that provide every top-level module."""
    return distributions_on(tuple(sys.path))


@cache
def distributions_on(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Those of a ``sys.path``. Reads the lists of files of all that is installed."""
    return metadata.packages_distributions()


def distribution_version(name: str) -> list[str]:
    """Version and content hash of an installed distribution. Raises PackageNotFoundError."""
    return [metadata.version(name), hash_installed_files(metadata.distribution(name))]


def hash_installed_files(distribution: metadata.Distribution) -> str:
    """Hash a distribution's RECORD of installed files; an empty one where it has none."""
    lines = (distribution.read_text("RECORD") or "").splitlines()
    files = sorted(line for line in lines if ",sha256=" in line and ".dist-info/" not in line)
    return sha256("\n".join(files).encode()).hexdigest()
