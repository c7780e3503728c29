"""What an ablation compares: a baseline and arms, each a recipe with some swaps, told on the
command line or in a TOML file. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt
from pydantic import Field, ValidationError

from lswt_core.errors import Problem, RecipeError
from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.recipe.loader import File, find, read, read_chain
from lswt_core.recipe.provenance import Origin
from lswt_core.recipe.schema import Table
from lswt_core.recipe.swap import override_of
from lswt_core.recipe.toml_lines import parse_key
from lswt_core.recipe.toml_writer import flat
from lswt_core.recipe.toml_writer import value as toml

PLACE = "command line"
BASELINE = "baseline"
Layout = Literal["one-at-a-time", "leave-one-out", "add-one-in", "factorial"]
Match = Literal["none", "params", "flops"]


class Variant(NamedTuple):
    """One recipe of an ablation."""

    name: str
    swaps: tuple[str, ...]  # as they were asked for, e.g. "ffn=gelu"; none: the baseline
    path: Path  # of the recipe file
    overrides: tuple[str, ...] = ()
    # tables and keys in which it may differ from the baseline; None: one, whichever it is
    axes: tuple[str, ...] | None = ()
    where: str = PLACE  # where it was asked for


class ArmTable(Table):
    """[arm.NAME] of an ablation file: a recipe of its own, or overrides, and where they may differ
    from the baseline.
    """

    recipe: str | None = None  # a path, relative to this file
    set: list[str] = Field(default_factory=list)
    axis: list[str] | None = None  # none: one table or key, whichever it is


class Ablation(Table):
    """An ablation file."""

    recipe: str  # the baseline's, a path relative to this file
    seeds: Annotated[int, Ge(1)] = 5
    match: Match = "none"
    margin: Annotated[float, Gt(0)] = 0.01
    plan: Layout = "one-at-a-time"
    set: list[str] = Field(default_factory=list)  # overrides of every arm
    allow: list[str] = Field(default_factory=list)
    swap: Mapping[str, Any] = Field(default_factory=dict)
    arm: Mapping[str, ArmTable] = Field(default_factory=dict)


def read_ablation(path: Path) -> tuple[Ablation, File] | None:
    """An ablation file, checked; None if the file is a recipe (it names no ``recipe``)."""
    file = read(find(path), str(path), Origin(str(path), ""))
    if "recipe" not in file.tables:
        return None
    try:
        return Ablation.model_validate(file.tables), file
    except ValidationError as error:
        raise RecipeError(
            [
                wrong(file, detail["loc"], detail["msg"])
                for detail in error.errors(include_url=False)
            ]
        ) from error


def wrong(file: File, place: Sequence[Any], why: str) -> Problem:
    """A key of an ablation file that cannot be used."""
    origin = file.locate(tuple(map(str, place)))
    keys = ", ".join(ArmTable.model_fields if place[0] == "arm" else Ablation.model_fields)
    return Problem(
        f'cannot use "{".".join(map(str, place))}"',
        origin.where,
        why,
        f"an ablation has the keys {keys}",
        origin.text,
    )


def swaps_in(tables: Mapping[str, Any]) -> list[str]:
    """The swaps of a table [swap]: every value, and every member of a list, is one."""
    words = []
    for key, given in flat(tables).items():
        words += [
            f"{key}={plain(value)}" for value in (given if isinstance(given, list) else [given])
        ]
    return words


def plain(value: Any) -> str:
    """A value as one writes it on the command line."""
    return value if isinstance(value, str) and value.isidentifier() else toml(value)


def axis_of(swap: str) -> str:
    """The table or key that a swap is about: "ffn=gelu" -> "ffn", "positional.base=10000" ->
    "positional.base".
    """
    key = override_of(swap).partition("=")[0].strip()
    parts = parse_key(key) or (key,)
    return LAYERS if parts[0] == LAYERS else key.removesuffix(".use")


def laid_out(
    layout: Layout, path: Path, swaps: Sequence[str], overrides: tuple[str, ...], where: str
) -> list[Variant]:
    """Baseline and arms for some swaps.

    "one-at-a-time" (or "leave-one-out", where swaps take parts away): the recipe, and the recipe
    with each swap. "add-one-in": the recipe with all swaps, and each swap undone. "factorial":
    every combination of the values of all axes.
    """

    def arm(name: str, made: Sequence[str], axes: Sequence[str]) -> Variant:
        return Variant(
            name,
            tuple(made),
            path,
            (*overrides, *map(override_of, made)),
            tuple(dict.fromkeys(axes)),
            where,
        )

    if layout == "add-one-in":
        refuse_contradictions(swaps, where)
        others = [[other for other in swaps if other is not swap] for swap in swaps]
        arms = [
            arm(f"without {swap}", left, [axis_of(swap)])
            for swap, left in zip(swaps, others, strict=True)
        ]
        return [arm(BASELINE, swaps, []), *arms]
    chosen = factorial(swaps) if layout == "factorial" else [(swap,) for swap in swaps]
    return [
        arm(BASELINE, [], []),
        *(arm(" + ".join(made), made, list(map(axis_of, made))) for made in chosen),
    ]


def factorial(swaps: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every combination that takes at most one swap of each axis, and at least one."""
    axes: dict[str, list[str | None]] = {}
    for swap in swaps:
        axes.setdefault(axis_of(swap), [None]).append(swap)
    for choice in product(*axes.values()):
        if made := tuple(swap for swap in choice if swap is not None):
            yield made


def refuse_contradictions(swaps: Sequence[str], where: str) -> None:
    """Swaps that are made together must be about different things."""
    axes = list(map(axis_of, swaps))
    if twice := next((axis for axis in axes if axes.count(axis) > 1), None):
        why = f'all swaps are made at once, and two of them are about "{twice}"'
        raise RecipeError(
            [
                Problem(
                    "cannot add one in",
                    where,
                    why,
                    "leave one of them out, or choose the plan one-at-a-time",
                )
            ]
        )


def arms_of_file(ablation: Ablation, file: File) -> Iterator[Variant]:
    """The arms an ablation file tells one by one."""
    for name, table in ablation.arm.items():
        path = find(table.recipe or ablation.recipe, file.path.parent)
        overrides = (*ablation.set, *table.set)
        origin = file.locate(("arm", name))
        if table.recipe is None and not table.set:
            fix = 'give it recipe = "FILE", or set = ["key=value"]'
            raise RecipeError(
                [
                    Problem(
                        f'arm "{name}" is the baseline',
                        origin.where,
                        "it changes nothing",
                        fix,
                        origin.text,
                    )
                ]
            )
        axes = None if table.axis is None else tuple(table.axis)
        yield Variant(
            name,
            tuple(table.set) or (f"recipe {table.recipe}",),
            path,
            overrides,
            axes,
            origin.where,
        )


def arms_of_recipes(paths: Iterable[Path], overrides: tuple[str, ...]) -> Iterator[Variant]:
    """Arms that are recipe files of their own."""
    for path in paths:
        yield Variant(path.stem, (f"recipe {path}",), path, overrides, None)


def steps_between(baseline: Path, arm: Path) -> list[str]:
    """The files that lead from a baseline's recipe to an arm's, each extending the one before it,
    as they are shown; empty if the arm does not extend the baseline.
    """
    chain, start = read_chain(arm), find(baseline)
    paths = [file.path for file in chain]
    return [file.shown for file in chain[paths.index(start) + 1 :]] if start in paths else []


def distinct(arms: Sequence[Variant]) -> list[Variant]:
    """The arms, if all names differ and there is something to compare."""
    names = [arm.name for arm in arms]
    if twice := next((name for name in names if names.count(name) > 1), None):
        where = next(arm.where for arm in reversed(arms) if arm.name == twice)
        raise RecipeError(
            [
                Problem(
                    f'two arms are called "{twice}"',
                    where,
                    "the report tells arms by their names",
                    "leave one out",
                )
            ]
        )
    if len(arms) < 2:
        fix = "add e.g. --swap ffn=gelu, --arm FILE, or a table [swap] to the ablation file"
        raise RecipeError(
            [
                Problem(
                    "there is nothing to compare",
                    arms[0].where,
                    "the ablation has no arm but the baseline",
                    fix,
                )
            ]
        )
    return list(arms)
