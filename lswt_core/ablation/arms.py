"""The arms of an ablation: a baseline and recipes that differ from it by swaps, given on the
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
from lswt_core.recipe.swap_syntax import overrides_of
from lswt_core.recipe.toml_lines import parse_key
from lswt_core.recipe.toml_writer import flat
from lswt_core.recipe.toml_writer import value as toml_value

COMMAND_LINE = "command line"
BASELINE = "baseline"
Layout = Literal["one-at-a-time", "leave-one-out", "add-one-in", "factorial"]
Match = Literal["none", "params", "flops", "time"]


class ArmSpec(NamedTuple):
    """One arm, or the baseline: a recipe with overrides."""

    name: str
    swaps: tuple[str, ...]  # as the user wrote them, e.g. "ffn=gelu"; empty: the baseline
    path: Path  # of the recipe
    overrides: tuple[str, ...] = ()
    # tables and keys in which it may differ from the baseline; None: the one in which it does
    axes: tuple[str, ...] | None = ()
    where: str = COMMAND_LINE  # file:line of the arm


class ArmTable(Table):
    """[arm.NAME] of an ablation file: a recipe, or overrides, and the axes of the arm."""

    recipe: str | None = None  # a path, relative to this file
    set: list[str] = Field(default_factory=list)
    axis: list[str] | None = None  # None: the one table or key in which it differs


class AblationFile(Table):
    """The schema of an ablation file."""

    recipe: str  # the baseline's, a path relative to this file
    seeds: Annotated[int, Ge(1)] = 5
    looks: list[Annotated[int, Ge(2)]] = Field(default_factory=list)  # seeds; empty: one look
    sequential: bool = False
    match: Match = "none"
    margin: Annotated[float, Gt(0)] = 0.01
    plan: Layout = "one-at-a-time"
    set: list[str] = Field(default_factory=list)  # overrides of every arm
    allow: list[str] = Field(default_factory=list)
    ladder: str | None = None  # a ladder file, as --ladder; relative to this file
    tune: list[str] = Field(default_factory=list)  # as --tune
    tuning_seeds: Annotated[int, Ge(1)] = 3
    horizons: list[Annotated[float, Gt(0)]] = Field(default_factory=list)
    probe: list[str] = Field(default_factory=list)  # as --probe
    swap: Mapping[str, Any] = Field(default_factory=dict)
    arm: Mapping[str, ArmTable] = Field(default_factory=dict)


def read_ablation_file(path: Path) -> tuple[AblationFile, File] | None:
    """Read and validate an ablation file; None if the file is a recipe (it has no ``recipe``)."""
    file = read(find(path), str(path), Origin(str(path), ""))
    if "recipe" not in file.tables:
        return None
    try:
        return AblationFile.model_validate(file.tables), file
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = [describe_problem(file, one["loc"], one["msg"]) for one in details]
        raise RecipeError(problems) from error


def describe_problem(file: File, place: Sequence[Any], why: str) -> Problem:
    """Return the problem of an invalid key of an ablation file."""
    origin = file.locate(tuple(map(str, place)))
    model = ArmTable if place[0] == "arm" else AblationFile
    return Problem(
        f'cannot use "{".".join(map(str, place))}"',
        origin.where,
        why,
        f"an ablation has the keys {', '.join(model.model_fields)}",
        origin.text,
    )


def list_swaps(tables: Mapping[str, Any]) -> list[str]:
    """Return the swaps of a table [swap]: each value is one, and each member of a list."""
    swaps = []
    for key, entry in flat(tables).items():
        values = entry if isinstance(entry, list) else [entry]
        swaps += [f"{key}={format_value(value)}" for value in values]
    return swaps


def format_value(value: Any) -> str:
    """Return a value as one writes it on the command line."""
    if isinstance(value, str) and value.isidentifier():
        return value
    return toml_value(value)


def axes_of_swap(swap: str) -> tuple[str, ...]:
    """Return the tables and keys that a swap changes: "ffn=gelu" -> "ffn",
    "positional.base=10000" -> "positional.base", "ffn=gelu,norm=rmsnorm" -> "ffn", "norm".
    """
    axes = []
    for override in overrides_of(swap):
        key = override.partition("=")[0]
        path = parse_key(key) or (key,)
        axes.append(LAYERS if path[0] == LAYERS else key.removesuffix(".use"))
    return tuple(dict.fromkeys(axes))


def axes_of_swaps(swaps: Iterable[str]) -> list[str]:
    """Return the tables and keys that each of some swaps changes, one after the other."""
    return [axis for swap in swaps for axis in axes_of_swap(swap)]


def lay_out_arms(
    layout: Layout, path: Path, swaps: Sequence[str], overrides: tuple[str, ...], where: str
) -> list[ArmSpec]:
    """Return baseline and arms for some swaps.

    "one-at-a-time" (or "leave-one-out", where swaps remove components): the recipe, and the recipe
    with each swap. "add-one-in": the recipe with all swaps, and each swap undone. "factorial":
    every combination of the values of all axes.
    """

    def make_arm(name: str, chosen: Sequence[str], axes: Iterable[str]) -> ArmSpec:
        swapped = (override for swap in chosen for override in overrides_of(swap))
        all_overrides = (*overrides, *swapped)
        return ArmSpec(name, tuple(chosen), path, all_overrides, tuple(dict.fromkeys(axes)), where)

    if layout == "add-one-in":
        require_distinct_axes(swaps, where)
        arms = [make_arm(BASELINE, swaps, [])]
        for swap in swaps:
            others = [other for other in swaps if other is not swap]
            arms.append(make_arm(f"without {swap}", others, axes_of_swap(swap)))
        return arms
    combinations: Iterable[tuple[str, ...]] = [(swap,) for swap in swaps]
    if layout == "factorial":
        combinations = combine_swaps(swaps)
    arms = [make_arm(BASELINE, [], [])]
    for chosen in combinations:
        arms.append(make_arm(" + ".join(chosen), chosen, axes_of_swaps(chosen)))
    return arms


def combine_swaps(swaps: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield every combination that has at most one swap of each axis, and at least one swap."""
    choices: dict[tuple[str, ...], list[str | None]] = {}
    for swap in swaps:
        choices.setdefault(axes_of_swap(swap), [None]).append(swap)
    for combination in product(*choices.values()):
        chosen = tuple(swap for swap in combination if swap is not None)
        if chosen and find_duplicate(axes_of_swaps(chosen)) is None:
            yield chosen


def require_distinct_axes(swaps: Sequence[str], where: str) -> None:
    """Raise RecipeError if two swaps that are made together change the same axis."""
    axis = find_duplicate(axes_of_swaps(swaps))
    if axis is None:
        return
    why = f'all swaps are made at once, and two of them are about "{axis}"'
    fix = "leave one of them out, or choose the plan one-at-a-time"
    raise RecipeError([Problem("cannot add one in", where, why, fix)])


def find_duplicate(values: Sequence[str]) -> str | None:
    """Return the first value that occurs twice."""
    return next((value for value in values if values.count(value) > 1), None)


def arms_of_file(ablation: AblationFile, file: File) -> Iterator[ArmSpec]:
    """Yield the arms of the tables [arm.NAME]."""
    for name, table in ablation.arm.items():
        origin = file.locate(("arm", name))
        if table.recipe is None and not table.set:
            what, why = f'arm "{name}" is the baseline', "it changes nothing"
            fix = 'give it recipe = "FILE", or set = ["key=value"]'
            raise RecipeError([Problem(what, origin.where, why, fix, origin.text)])
        yield ArmSpec(
            name,
            tuple(table.set) or (f"recipe {table.recipe}",),
            find(table.recipe or ablation.recipe, file.path.parent),
            (*ablation.set, *table.set),
            None if table.axis is None else tuple(table.axis),
            origin.where,
        )


def arms_of_recipes(paths: Iterable[Path], overrides: tuple[str, ...]) -> Iterator[ArmSpec]:
    """Yield an arm for each recipe file."""
    for path in paths:
        yield ArmSpec(path.stem, (f"recipe {path}",), path, overrides, None)


def files_between(baseline: Path, arm: Path) -> list[str]:
    """Return the files by which an arm's recipe extends the baseline's, as they are shown in
    errors, the nearest to the baseline first; empty if it does not extend it.
    """
    chain, start = read_chain(arm), find(baseline)
    paths = [file.path for file in chain]
    if start not in paths:
        return []
    return [file.shown for file in chain[paths.index(start) + 1 :]]


def require_arms(arms: Sequence[ArmSpec]) -> list[ArmSpec]:
    """Return the arms; raises RecipeError if two share a name, or the baseline is alone."""
    name = find_duplicate([arm.name for arm in arms])
    if name is not None:
        where = next(arm.where for arm in reversed(arms) if arm.name == name)
        what, why = f'two arms are called "{name}"', "the report names arms by these"
        raise RecipeError([Problem(what, where, why, "leave one out")])
    if len(arms) < 2:
        what, why = "there is nothing to compare", "the ablation has no arm but the baseline"
        fix = "add e.g. --swap ffn=gelu, --arm FILE, or a table [swap] to the ablation file"
        raise RecipeError([Problem(what, arms[0].where, why, fix)])
    return list(arms)
