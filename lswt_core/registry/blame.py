"""Which plugin's code raised an exception, by the frames of its traceback. Imports no torch."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from lswt_core.registry.discover import Entry
from lswt_core.registry.kinds import KIND_OF_INTERFACE

CORE = "lswt_core"
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")  # the machine's, in whose code it is raised
# Modules of the core that plugins call: what is raised there is the caller's mistake.
LIBRARY = tuple(f"{CORE}.{name}" for name in ("interfaces", "hooks", "errors", "plugin_api"))


class Culprit(NamedTuple):
    """The place in a plugin's code where an exception was raised, or that led to it."""

    plugin: Entry
    component: str  # "kind/name"; empty outside of a component
    method: str  # e.g. "Moe.forward"
    where: str  # file:line
    cause: str  # the exception in one line

    def __str__(self) -> str:
        what = f"{self.component} of {self.plugin}" if self.component else str(self.plugin)
        return f"{what}: {self.method} raised {self.cause} ({self.where})"


def culprit(error: BaseException, entries: Iterable[Entry]) -> Culprit | None:
    """The plugin with the innermost frame. Frames of torch and other libraries do not count, unless
    they are methods of an object of the plugin.

    None if that frame is the core's, or memory ran out.
    """
    if type(error).__name__ in OUT_OF_MEMORY:
        return None
    entries = tuple(entries)
    frames = list(traceback.walk_tb(error.__traceback__))
    for depth, (frame, line) in reversed(list(enumerate(frames))):
        module: str = frame.f_globals.get("__name__", "")
        entry = owner(module, entries)
        if entry is None and is_core(module):
            return None
        # a library's method on an object of the plugin
        entry = entry or owner(type(frame.f_locals.get("self")).__module__, entries)
        if entry is not None:
            component = innermost_component([frame for frame, _ in frames[: depth + 1]])
            code = frame.f_code
            where = f"{code.co_filename}:{line}"
            return Culprit(entry, component, code.co_qualname, where, one_line(error))
    return None


def is_core(module: str) -> bool:
    """Whether a module is the core's, other than what plugins call."""
    library = any(module == name or module.startswith(f"{name}.") for name in LIBRARY)
    return module.partition(".")[0] == CORE and not library


def owner(module: str, entries: Iterable[Entry]) -> Entry | None:
    """The plugin a module belongs to: itself or a submodule, else a plugin of the same package."""
    entries = tuple(entries)
    for entry in entries:
        if module == entry.module or module.startswith(f"{entry.module}."):
            return entry
    top = module.partition(".")[0]
    for entry in entries:
        if top != CORE and top == entry.module.partition(".")[0]:
            return entry
    return None


def innermost_component(frames: Sequence[FrameType]) -> str:
    """Kind and name of the component whose method the innermost frame runs; empty if none does."""
    for frame in reversed(frames):
        if component := component_of(frame):
            return component
    return ""


def component_of(frame: FrameType) -> str:
    """Kind and name of the component whose method a frame runs; empty if it is none's."""
    instance: Any = frame.f_locals.get("self")
    for base in type(instance).__mro__:
        if base.__module__ == f"{CORE}.interfaces" and base.__name__ in KIND_OF_INTERFACE:
            name = getattr(type(instance), "name", type(instance).__name__)
            return f"{KIND_OF_INTERFACE[base.__name__]}/{name}"
    return ""


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def location_in(path: Path, error: BaseException) -> str:
    """The innermost line of a file in a traceback, as " (file:line)"; empty if there is none."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if Path(frame.f_code.co_filename) == path]
    return f" ({path}:{lines[-1]})" if lines else ""
