"""Ladder files: the sizes (rungs) at which an ablation is made, smallest first, with the length of
training and the learning rate of each. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt
from pydantic import Field, ValidationError

from lswt_core.errors import Problem, RecipeError
from lswt_core.recipe.loader import File, find, read
from lswt_core.recipe.packaged import SUFFIX, is_qualified, own_recipes
from lswt_core.recipe.provenance import Origin
from lswt_core.recipe.schema import Table

FOLDER = "ladders/"  # of the packaged ladders
LEAST_RUNGS = 2
TokensPerParameter = Annotated[float, Gt(0)]  # parameters without embedding tables


class RungTable(Table):
    """[rung.NAME] of a ladder file: a size, as overrides or as a recipe, and its training."""

    recipe: str | None = None  # in place of the ablation's: a name, or a path relative to the file
    set: list[str] = Field(default_factory=list)  # overrides; an arm's own come after them
    tokens_per_parameter: TokensPerParameter | None = None  # None: the ladder's
    steps: Annotated[int, Ge(1)] | None = None  # in place of tokens_per_parameter


class RateTable(Table):
    """[rate] of a ladder file: every arm's own value of ``key``, times (N / N0)^exponent, with N
    the parameters of the baseline without embedding tables and N0 those at the rung ``at``.

    OLMo-core's ladder has the exponent -1/3 for the learning rate.
    """

    key: str = "optimizer.lr"
    exponent: float
    at: str  # the rung at which the recipes' own values hold


class LadderFile(Table):
    """The schema of a ladder file."""

    recipe: str | None = None  # the baseline's, where the command names none
    tokens_per_parameter: TokensPerParameter | None = None  # None: recipes' own lengths
    set: list[str] = Field(default_factory=list)  # overrides of every rung
    rate: RateTable | None = None  # None: recipes' own rates
    rung: Mapping[str, RungTable]


class Rung(NamedTuple):
    """One size of a ladder."""

    name: str
    path: Path | None  # of its recipe; None: the ablation's
    overrides: tuple[str, ...]
    tokens_per_parameter: float | None
    steps: int | None
    where: str  # file:line


class Ladder(NamedTuple):
    """A ladder file that was read."""

    name: str
    where: str  # the file, as shown
    recipe: str | None  # the baseline's, where the command names none
    rungs: tuple[Rung, ...]
    rate: RateTable | None


def read_ladder(reference: str, folder: Path = Path()) -> Ladder:
    """Read a ladder by path, relative to ``folder``, or by name ("nano": a packaged one). Raises
    RecipeError with file and line.
    """
    packaged = f"{FOLDER}{reference.removesuffix(SUFFIX)}"
    is_packaged = packaged in own_recipes() and not (folder / reference).is_file()
    path = find(packaged if is_packaged else reference, folder)
    file = read(path, reference, Origin(reference, ""))
    try:
        table = LadderFile.model_validate(file.tables)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise RecipeError([describe(file, one["loc"], one["msg"]) for one in details]) from error
    check(table, file)
    recipe = table.recipe
    if recipe is not None and not is_qualified(recipe):
        recipe = str(find(recipe, path.parent))
    rungs = tuple(rung_of(name, table, file) for name in table.rung)
    return Ladder(path.stem, file.shown, recipe, rungs, table.rate)


def rung_of(name: str, ladder: LadderFile, file: File) -> Rung:
    """Return a rung of a file, with what it takes from the whole ladder."""
    own = ladder.rung[name]
    per_parameter = own.tokens_per_parameter
    if per_parameter is None and own.steps is None:
        per_parameter = ladder.tokens_per_parameter
    return Rung(
        name,
        None if own.recipe is None else find(own.recipe, file.path.parent),
        (*ladder.set, *own.set),
        per_parameter,
        own.steps,
        file.locate(("rung", name)).where,
    )


def describe(file: File, place: tuple[int | str, ...], why: str) -> Problem:
    """Return the problem of an invalid key of a ladder file."""
    key = tuple(map(str, place))
    models: dict[str, type[Table]] = {"rung": RungTable, "rate": RateTable}
    model = models.get(key[0], LadderFile) if len(key) > 1 else LadderFile
    origin = file.locate(key)
    what, fix = f'cannot use "{".".join(key)}"', f"its keys are {', '.join(model.model_fields)}"
    return Problem(what, origin.where, why, fix, origin.text)


def check(ladder: LadderFile, file: File) -> None:
    """Raise RecipeError for a ladder whose keys do not fit each other."""
    if len(ladder.rung) < LEAST_RUNGS:
        why = f"a ladder has {LEAST_RUNGS} rungs at least, three to fit an irreducible loss"
        refuse(file, ("rung",), why, 'add [rung."NAME"]')
    for name, rung in ladder.rung.items():
        if rung.steps is not None and rung.tokens_per_parameter is not None:
            why = "it gives steps and tokens_per_parameter, which both say how long it trains"
            refuse(file, ("rung", name), why, "leave one of them out")
    if ladder.rate is not None and ladder.rate.at not in ladder.rung:
        why = f'no rung is called "{ladder.rate.at}"'
        refuse(file, ("rate", "at"), why, f"use one of: {', '.join(ladder.rung)}")


def refuse(file: File, key: tuple[str, ...], why: str, fix: str) -> None:
    """Raise the error about a key."""
    origin = file.locate(key)
    what = f'cannot use "{".".join(key)}"'
    raise RecipeError([Problem(what, origin.where, why, fix, origin.text)])
