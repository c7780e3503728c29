"""The one-swap certificate: whether an arm differs from the baseline in what it is meant to, and in
nothing else.

Checked before anything is trained: recipes key by key, parameters, parameter groups, kernels and
precision. Checked from what runs recorded: the values that shared parameters started with, and
every batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from lswt_core.ablation.outcome import Outcome
from lswt_core.device import Precision
from lswt_core.errors import LswtError, RecipeError
from lswt_core.model.build import build_model
from lswt_core.model.parameters import build_parameter_groups, parameters_with_components
from lswt_core.recipe import Recipe
from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.recipe.toml_writer import flat
from lswt_core.registry import Registry
from lswt_core.registry.kinds import KIND_OF_TABLE

# What --allow may name besides keys of a recipe.
ALLOWANCES = ("parameters", "groups", "kernels", "initialisation", "data", "tokens")
SHAPES = ("model", "embedding", LAYERS)  # tables that may change any parameter
# keys of those that change the parameters of one owner
RESHAPED = {"model.d_ffn": "ffn", "model.bias": "attention"}
# keys that change the values parameters start with
STARTS = ("model.init_std", "embedding.warm_start", "train.seed")
# Keys that change how many tokens are trained on, how they are batched, or what of a document a
# token sees: never part of a swap.
BUDGET = (
    "train.steps",
    "train.tokens",
    "train.batch_size",
    "train.seq_len",
    "train.document_masking",
    "train.document_assignment",
)
READS = ("data", "tokenizer", "train.seed", *BUDGET)  # tables and keys that change what is read
MEASURED_ON = ("data", "tokenizer", "evaluate")  # tables that change what losses are measured on
KERNEL_KEYS = {"attention": "attention", "precision": "train.precision", "device": "device"}


class Change(NamedTuple):
    """A value of a recipe that is not the baseline's."""

    key: str
    before: Any
    after: Any
    where: str  # file:line


class Structure(NamedTuple):
    """What a recipe's model and optimizer are, before they have numbers."""

    parameters: dict[str, tuple[str, str, bool]]  # by name: shape and type, owner, trainable
    groups: dict[str, str]  # by name of a trainable parameter
    kernels: dict[str, str]


class Flaw(NamedTuple):
    """A difference outside of the axes."""

    about: str  # a key of a recipe, or one of ALLOWANCES
    text: str


class Uncertified(LswtError):
    """An arm differs from the baseline in more than it is meant to."""

    exit_code = 2


def changes(baseline: Recipe, arm: Recipe) -> list[Change]:
    """Every value that differs, in the arm's order."""
    before, after = flat(baseline.resolved()), flat(arm.resolved())
    keys = [key for key in {**after, **before} if before.get(key) != after.get(key)]
    return [
        Change(key, before.get(key), after.get(key), place_of(key, baseline, arm)) for key in keys
    ]


def place_of(key: str, baseline: Recipe, arm: Recipe) -> str:
    """Where the difference was written: the arm's own line, or the one that replaced the table, or
    else the baseline's.
    """
    table = key
    while table:
        for recipe, asked in ((arm, table), (arm, f"{table}.use")):
            try:
                *_, (_, origin) = recipe.explain(asked)
            except (RecipeError, ValueError):
                continue
            if origin.where != "default" or table != key:
                return origin.where
        table = table.rpartition(".")[0]
    return "default"


def axes_of(
    found: Sequence[Change], axes: tuple[str, ...] | None, steps: Sequence[str] = ()
) -> tuple[str, ...]:
    """What an arm may differ in. A named key of a component that only one side has stands for that
    component: whoever sets the weight of a new loss adds the loss.

    An arm that names no axis is about the one component or key in which it differs. If it extends
    the baseline by other files (``steps``), it is about one of each.
    """
    if axes is not None:
        return tuple(dict.fromkeys(added(axis, found) or axis for axis in axes))
    homes = [(home_of(change.key, found), change.where.rpartition(":")[0]) for change in found]
    first = {file: next((home for home, where in homes if where == file), None) for file in steps}
    return tuple(dict.fromkeys(filter(None, first.values()))) or tuple(
        home for home, _ in homes[:1]
    )


def added(axis: str, found: Sequence[Change]) -> str | None:
    """The table of a stacking component that an axis lies in, if the component is not in both
    recipes.
    """
    table = ".".join(axis.split(".")[:2])
    one_sided = any(
        change.key == f"{table}.use" and None in (change.before, change.after) for change in found
    )
    return table if one_sided else None


def home_of(key: str, found: Sequence[Change]) -> str:
    """The component a key belongs to if the component itself was exchanged, else the key."""
    parts = key.split(".")
    kind = KIND_OF_TABLE.get(parts[0])
    table = ".".join(parts[: 2 if kind and kind.many else 1])
    exchanged = any(change.key in (table, f"{table}.use") for change in found)
    return LAYERS if parts[0] == LAYERS else table if kind and exchanged else key


def covers(axis: str, key: str) -> bool:
    """Whether a key is an axis or inside of it."""
    return key == axis or key.startswith(f"{axis}.")


def is_any(key: str, places: Iterable[str]) -> bool:
    """Whether a key is one of some tables and keys, or inside of one."""
    return any(covers(place, key) for place in places)


def structure(recipe: Recipe, registry: Registry, device: torch.device) -> Structure:
    """Parameters, parameter groups and kernels of a recipe, without memory."""
    precision = Precision.choose(recipe.train.precision, device)
    built = build_model(recipe, registry, device=device, dtype=precision.dtype)
    found = {
        name: (f"{list(p.shape)} {p.dtype}".replace("torch.", ""), owner, p.requires_grad)
        for name, owner, p in parameters_with_components(built.loss)
    }
    groups = {
        name: group["name"]
        for group in build_parameter_groups(built.loss)
        for name in group["names"]
    }
    kernels = {
        "attention": built.attention,
        "precision": str(precision.dtype).removeprefix("torch."),
        "device": device.type,
    }
    return Structure(found, groups, kernels)


def flaws_of_recipe(found: Sequence[Change], axes: Iterable[str]) -> list[Flaw]:
    """Values that differ outside of the axes, and another budget wherever it was asked for."""
    axes = tuple(axes)
    outside = [
        change for change in found if is_any(change.key, BUDGET) or not is_any(change.key, axes)
    ]
    flaws = [
        Flaw(
            change.key,
            f"{change.key} is {change.after!r} instead of {change.before!r}  --> {change.where}",
        )
        for change in outside
    ]
    measured = [axis for axis in axes if any(covers(table, axis) for table in MEASURED_ON)]
    return flaws + [
        Flaw("data", f"{axis} changes the text that losses are measured on: they do not compare")
        for axis in measured
    ]


def freed(axes: Iterable[str]) -> set[str] | None:
    """The owners whose parameters an arm may change; None: any."""
    kinds: set[str] = set()
    for axis in axes:
        table = axis.partition(".")[0]
        if axis in RESHAPED:
            kinds.add(RESHAPED[axis])
        elif table in SHAPES:
            return None
        elif table in KIND_OF_TABLE:
            kinds.add(KIND_OF_TABLE[table].name)
    return kinds


def flaws_of_structure(baseline: Structure, arm: Structure, axes: Iterable[str]) -> list[Flaw]:
    """Parameters, groups and kernels that differ although no axis is about them."""
    axes = tuple(axes)
    found = [
        Flaw("parameters", f"parameter {name}: {told(baseline, name)} becomes {told(arm, name)}")
        for name in {**baseline.parameters, **arm.parameters}
        if baseline.parameters.get(name) != arm.parameters.get(name)
        and not on_axis(name, (baseline, arm), freed(axes))
    ]
    if not any(covers("optimizer", axis) for axis in axes):
        moved = [
            name
            for name in baseline.groups.keys() & arm.groups.keys()
            if baseline.groups[name] != arm.groups[name]
        ]
        found += [
            Flaw(
                "groups",
                f"{name}: parameter group {baseline.groups[name]} becomes {arm.groups[name]}",
            )
            for name in sorted(moved)
        ]
    for kernel, before in baseline.kernels.items():
        if before != arm.kernels[kernel] and not any(
            covers(KERNEL_KEYS[kernel], axis) for axis in axes
        ):
            found.append(Flaw("kernels", f"{kernel} {before} becomes {arm.kernels[kernel]}"))
    return found


def on_axis(name: str, structures: Sequence[Structure], kinds: set[str] | None) -> bool:
    """Whether a parameter belongs to what may change."""
    if kinds is None:
        return True
    return any(
        one.parameters[name][1].partition(".")[0] in kinds
        for one in structures
        if name in one.parameters
    )


def told(one: Structure, name: str) -> str:
    """A parameter in words."""
    return one.parameters[name][0] if name in one.parameters else "absent"


class Start(NamedTuple):
    """What a run recorded of its beginning and its data."""

    # by name: shape, owner, and sha256 of the values it started with
    parameters: dict[str, dict[str, str]]
    batches: list[str]  # a hash of every batch, in order


class Common(NamedTuple):
    """What two runs had in common, for the record."""

    shared_parameters: int  # of one name and shape, not on the axis
    bitwise_equal: int
    batches: int
    batches_equal: int


def flaws_of_start(
    baseline: Start, arm: Start, axes: Iterable[str], changed: Iterable[str] = ()
) -> tuple[Common, list[Flaw]]:
    """Shared parameters that did not start bitwise equal, and batches that were not the same
    although no key that was ``changed`` is about what is read.
    """
    axes = tuple(axes)
    kinds, found = freed(axes), list[Flaw]()
    shared = [
        name
        for name, told in arm.parameters.items()
        if baseline.parameters.get(name, {}).get("shape") == told["shape"]
    ]
    compared = [
        name
        for name in shared
        if kinds is None or arm.parameters[name]["owner"].partition(".")[0] not in kinds
    ]
    unequal = [
        name
        for name in compared
        if baseline.parameters[name]["sha256"] != arm.parameters[name]["sha256"]
    ]
    if unequal and not any(covers(axis, key) for axis in axes for key in STARTS):
        text = (
            f"{len(unequal)} of {len(compared)} shared parameters start with other values, the"
            f" first is {unequal[0]}"
        )
        found.append(Flaw("initialisation", text))
    # one of them may have discarded a few
    same = [one == other for one, other in zip(baseline.batches, arm.batches, strict=False)]
    if not all(same) and not any(is_any(key, READS) for key in changed):
        found.append(Flaw("data", f"the batches differ from batch {same.index(False) + 1} on"))
    return Common(len(compared), len(compared) - len(unequal), len(arm.batches), sum(same)), found


def flaws_of_amounts(baseline: Outcome, arm: Outcome, changed: Iterable[str]) -> list[Flaw]:
    """What two runs of one seed that came to an end were trained and measured on, where it is not
    the same.
    """
    found = []
    trained = [one.curve[-1][0] if one.curve else 0 for one in (arm, baseline)]
    if trained[0] != trained[1] and not any(is_any(key, BUDGET) for key in changed):
        found.append(
            Flaw("tokens", f"runs were trained on {trained[0]:,} tokens instead of {trained[1]:,}")
        )
    texts = [[(name, tokens) for name, _, tokens in one.documents] for one in (arm, baseline)]
    if texts[0] != texts[1]:
        told = [
            f"{sum(tokens for _, tokens in text):,} tokens of {len(text):,} documents"
            for text in texts
        ]
        other = (
            f"{told[0]} instead of {told[1]}"
            if told[0] != told[1]
            else f"{told[0]}, but of other ones"
        )
        found.append(Flaw("data", f"losses were measured on {other}"))
    return found


def allowed(flaw: Flaw, allowances: Sequence[str]) -> bool:
    """Whether the user has asked to let a difference pass."""
    return any(covers(allowance, flaw.about) for allowance in allowances)


def refuse(name: str, axes: Sequence[str], flaws: Sequence[Flaw]) -> None:
    """Raise Uncertified, naming every difference that was not allowed."""
    if not flaws:
        return
    listed = "\n".join(f"  - {flaw.text}" for flaw in flaws)
    raise Uncertified(
        f'arm "{name}" is no clean swap: beside {", ".join(axes) or "its axis"} it differs from the'
        f" baseline in\n{listed}\n  why: the difference in loss could not be ascribed to the swap\n"
        "  fix: undo these differences, or let them pass knowingly:"
        f" {allowances(flaw.about for flaw in flaws)}"
    )


def allowances(about: Iterable[str]) -> str:
    """The words that would let these differences pass."""
    return " ".join(f"--allow {one}" for one in sorted(set(about)))
