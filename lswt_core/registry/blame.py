"""Whose code an exception comes from: a plugin's, by the frames of its traceback. Imports no torch."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from lswt_core.registry.discover import Entry
from lswt_core.registry.kinds import KIND_OF_INTERFACE

CORE = "lswt_core"
SHORTAGE = ("MemoryError", "OutOfMemoryError")  # the machine's, wherever it shows
LIBRARY = {  # modules of the core that plugins call: what is raised there is raised on behalf of the caller
    f"{CORE}.{name}"
    for name in (
        *("interfaces", "hooks", "errors", "randomness", "parts", "merge"),
        *("cross_entropy", "fast", "moments", "gguf_file", "hub"),
    )
}


class Culprit(NamedTuple):
    """The place in a plugin's code where an exception was raised, or from which it was called upon."""

    plugin: Entry
    component: str  # "kind/name"; empty outside of a component
    method: str  # e.g. "Moe.forward"
    where: str  # file:line
    cause: str  # the exception in one line

    def __str__(self) -> str:
        what = f"{self.component} of {self.plugin}" if self.component else str(self.plugin)
        return f"{what}: {self.method} raised {self.cause} ({self.where})"


def culprit(error: BaseException, entries: Iterable[Entry]) -> Culprit | None:
    """The plugin whose frame is the innermost, those of torch and other libraries aside unless they
    work on an object of its own.

    None if that frame is the core's, or the machine's memory did not suffice.
    """
    if type(error).__name__ in SHORTAGE:
        return None
    entries = tuple(entries)
    frames = list(traceback.walk_tb(error.__traceback__))
    for i in reversed(range(len(frames))):
        frame, line = frames[i]
        module: str = frame.f_globals.get("__name__", "")
        entry = owner(module, entries)
        if entry is None and module.partition(".")[0] == CORE and module not in LIBRARY:
            return None
        held = type(frame.f_locals.get("self"))
        # a library's method on an object of the plugin's
        entry = entry or owner(held.__module__, entries)
        if entry is not None:
            component = next(
                filter(None, (component_of(f) for f, _ in reversed(frames[: i + 1]))), ""
            )
            code = frame.f_code
            return Culprit(
                entry, component, code.co_qualname, f"{code.co_filename}:{line}", told(error)
            )
    return None


def owner(module: str, entries: Iterable[Entry]) -> Entry | None:
    """The plugin a module belongs to: its own, or one of the same package."""
    entries = tuple(entries)
    inside = [
        entry
        for entry in entries
        if module == entry.module or module.startswith(f"{entry.module}.")
    ]
    top = module.partition(".")[0]
    beside = [entry for entry in entries if top != CORE and top == entry.module.partition(".")[0]]
    return next(iter([*inside, *beside]), None)


def component_of(frame: FrameType) -> str:
    """Kind and name of the component whose method a frame runs; empty if it is none's."""
    owner: Any = frame.f_locals.get("self")
    bases = [base for base in type(owner).__mro__ if base.__module__ == f"{CORE}.interfaces"]
    kind = next(
        (KIND_OF_INTERFACE[base.__name__] for base in bases if base.__name__ in KIND_OF_INTERFACE),
        None,
    )
    return "" if kind is None else f"{kind}/{getattr(type(owner), 'name', type(owner).__name__)}"


def told(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def place(error: BaseException, path: Path) -> str:
    """Where in a file an exception was raised, in brackets; empty if it was raised elsewhere."""
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if Path(frame.f_code.co_filename) == path
    ]
    return f" ({path}:{lines[-1]})" if lines else ""
