"""The difference between two recipes: every changed value, where it was written, and the axes that
an arm is about. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lswt_core.errors import RecipeError
from lswt_core.recipe import Recipe
from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.recipe.toml_writer import flat
from lswt_core.registry.kinds import KIND_OF_TABLE

DEFAULT = "default"  # the place of a value that nobody wrote


class Change(NamedTuple):
    """A value of an arm's recipe that differs from the baseline's; None: the key is absent."""

    key: str
    before: Any
    after: Any
    where: str  # file:line


def diff_recipes(baseline: Recipe, arm: Recipe) -> list[Change]:
    """Return every value that differs, in the arm's order; keys that the arm lacks come last."""
    before, after = flat(baseline.resolved()), flat(arm.resolved())
    changes = []
    for key in {**after, **before}:
        if before.get(key) != after.get(key):
            where = locate_change(key, baseline, arm)
            changes.append(Change(key, before.get(key), after.get(key), where))
    return changes


def locate_change(key: str, baseline: Recipe, arm: Recipe) -> str:
    """Return where a difference was written: the arm's own line, or the arm's line that replaced
    or removed the component, or else the baseline's line.
    """
    for recipe in (arm, baseline):
        table = key
        while table:
            for candidate in (table, f"{table}.use"):
                where = locate_value(recipe, candidate)
                if where != DEFAULT:
                    return where
            table = table.rpartition(".")[0]
    return DEFAULT


def locate_value(recipe: Recipe, key: str) -> str:
    """Return where the value in force was written; DEFAULT if it was not, or there is none."""
    try:
        history = recipe.explain(key)
    except RecipeError:
        return DEFAULT
    if not history:
        return DEFAULT
    _, origin = history[-1]
    return origin.where


def resolve_axes(
    changes: Sequence[Change], axes: tuple[str, ...] | None, steps: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the tables and keys in which an arm may differ from the baseline.

    An axis inside of a component that only one side has stands for the whole component: setting
    the weight of a new loss adds that loss. An arm that names no axis (None) is about the first
    component or key in which it differs; if it extends the baseline through other files
    (``steps``), it is about the first one of each file.
    """
    if axes is not None:
        return tuple(dict.fromkeys(find_added_component(axis, changes) or axis for axis in axes))
    first_of_file: dict[str, str] = {}
    for change in changes:
        file = change.where.rpartition(":")[0]
        first_of_file.setdefault(file, find_axis(change.key, changes))
    resolved = [first_of_file[file] for file in steps if file in first_of_file]
    if not resolved:
        resolved = [find_axis(change.key, changes) for change in changes[:1]]
    return tuple(dict.fromkeys(resolved))


def find_added_component(axis: str, changes: Sequence[Change]) -> str | None:
    """Return the table of the component that an axis lies in, if one recipe alone has it."""
    path = axis.split(".")
    tables = [".".join(path[:size]) for size in range(2, len(path) + 1)]
    for table in tables:
        for change in changes:
            if change.key == f"{table}.use" and None in (change.before, change.after):
                return table
    return None


def find_axis(key: str, changes: Sequence[Change]) -> str:
    """Return the component that a key belongs to if the component was exchanged, else the key."""
    path = key.split(".")
    if path[0] == LAYERS:
        return LAYERS
    kind = KIND_OF_TABLE.get(path[0])
    if kind is None:
        return key
    for size in range(2 if kind.many else 1, len(path)):
        table = ".".join(path[:size])
        if any(change.key in (table, f"{table}.use") for change in changes):
            return table
    return key


def covers(axis: str, key: str) -> bool:
    """Whether a key is an axis or lies inside of it."""
    return key == axis or key.startswith(f"{axis}.")


def is_covered(key: str, axes: Iterable[str]) -> bool:
    """Whether a key is one of some axes or lies inside of one."""
    return any(covers(axis, key) for axis in axes)
