"""The pluggy hook by which a package offers components."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

PROJECT = "lswt"  # also the entry-point group

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def lswt_components() -> Iterable[type]:  # type: ignore[empty-body]
    """Return the component classes this package offers; kind = base class, name = ``cls.name``."""
