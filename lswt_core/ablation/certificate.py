"""The one-swap certificate: the statement that an arm differs from the baseline in its axes and in
nothing else.

Checked before training: recipes key by key, parameters, parameter groups, attention backend and
precision. Checked from what runs recorded: the initial values of shared parameters, every batch,
and the text that losses were measured on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from lswt_core.ablation.recipe_diff import Change, covers, is_covered
from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.device import Precision
from lswt_core.errors import LswtError
from lswt_core.model.build import build_model
from lswt_core.model.parameters import build_parameter_groups, parameters_with_owners
from lswt_core.recipe import Recipe
from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.registry import Registry
from lswt_core.registry.kinds import KIND_OF_TABLE

SHAPES = ("model", "embedding", LAYERS)  # tables that may change any parameter
# keys of SHAPES that change the parameters of some kinds of component only
SHAPES_OF_KINDS = {
    "model.d_ffn": {"ffn"},
    "model.bias": {"mixer"},
    "model.n_kv_heads": {"mixer", "memory"},
}
# kinds that are made of other owners of parameters, which may change with them
PARTS_OF_KIND = {
    "head": {"embedding", "projections"},
    "mixer": {"memory", "attention", "qk_norm", "positional"},
    "block": {"norm", "mixer", "ffn", "memory", "attention", "qk_norm", "positional"},
}
# keys that change initial values
INITIALISATION_KEYS = (
    "model.init_std",
    "embedding.warm_start",
    "parametrisation",
    "train.seed",
)
# keys that change the parameter groups
GROUP_KEYS = ("optimizer", "groups", "parametrisation")
# Keys that change how many tokens are trained on, how they are batched, or which tokens of a
# document are visible: never part of a swap.
BUDGET_KEYS = (
    "train.steps",
    "train.tokens",
    "train.batch_size",
    "train.seq_len",
    "train.document_masking",
    "train.document_assignment",
)
DATA_KEYS = ("data", "tokenizer", "train.seed", *BUDGET_KEYS)  # that change the batches
HELD_OUT_KEYS = ("data", "tokenizer", "evaluate")  # that change the held-out text
KERNEL_KEYS = {"attention": "attention", "precision": "train.precision", "device": "device"}


class Structure(NamedTuple):
    """Parameters, parameter groups and kernels of a recipe."""

    # by name: shape and dtype, the components that it lies in, trainable
    parameters: dict[str, tuple[str, tuple[str, ...], bool]]
    groups: dict[str, str]  # by name of a trainable parameter
    kernels: dict[str, str]  # attention, precision, device


class Flaw(NamedTuple):
    """A difference outside of the axes."""

    # a recipe key, or parameters, groups, kernels, initialisation, data, tokens, schedule,
    # causality, context, loss, records
    about: str
    text: str


class Uncertified(LswtError):
    """An arm differs from the baseline in more than its axes."""

    exit_code = 2


class RunRecord(NamedTuple):
    """Initial values and batches of a run, as hashes."""

    parameters: dict[str, dict[str, Any]]  # by name: shape, owners, sha256 of the initial values
    batches: list[str]  # a hash of every batch, in order


class SharedCounts(NamedTuple):
    """What the runs of an arm and of the baseline at one seed have in common."""

    shared_parameters: int  # of one name and shape, not on an axis
    bitwise_equal: int
    batches: int
    batches_equal: int


def describe_structure(recipe: Recipe, registry: Registry, device: torch.device) -> Structure:
    """Build a recipe on the meta device and return its structure."""
    precision = Precision.choose(recipe.train.precision, device)
    built = build_model(recipe, registry, device=device, dtype=precision.dtype)
    parameters = {}
    for name, owners, parameter in parameters_with_owners(built.loss):
        shape = f"{list(parameter.shape)} {parameter.dtype}".replace("torch.", "")
        parameters[name] = (shape, owners, parameter.requires_grad)
    groups = {}
    for group in build_parameter_groups(built.loss, recipe.groups, built.loss.scalings):
        groups.update(dict.fromkeys(group["names"], group["name"]))
    kernels = {
        "attention": built.attention,
        "precision": str(precision.dtype).removeprefix("torch."),
        "device": device.type,
    }
    return Structure(parameters, groups, kernels)


def check_recipe(changes: Sequence[Change], axes: Sequence[str]) -> list[Flaw]:
    """Return values that differ outside of the axes; the token budget is outside of any axis."""
    flaws = []
    for change in changes:
        if is_covered(change.key, BUDGET_KEYS) or not is_covered(change.key, axes):
            values = f"{change.after!r} instead of {change.before!r}"
            flaws.append(Flaw(change.key, f"{change.key} is {values}  --> {change.where}"))
    for axis in axes:
        if is_covered(axis, HELD_OUT_KEYS):
            text = f"{axis} changes the text that losses are measured on: they do not compare"
            flaws.append(Flaw("data", text))
    return flaws


def find_free_components(axes: Iterable[str]) -> set[str] | None:
    """Return the kinds of components whose parameters an arm may change; None: all."""
    kinds: set[str] = set()
    for axis in axes:
        table = axis.partition(".")[0]
        if axis in SHAPES_OF_KINDS:
            kinds |= SHAPES_OF_KINDS[axis]
        elif table in SHAPES:
            return None
        elif table in KIND_OF_TABLE:
            kind = KIND_OF_TABLE[table].name
            kinds |= {kind} | PARTS_OF_KIND.get(kind, set())
    return kinds


def check_structure(baseline: Structure, arm: Structure, axes: Sequence[str]) -> list[Flaw]:
    """Return parameters, parameter groups and kernels that differ outside of the axes."""
    return [
        *check_parameters(baseline, arm, find_free_components(axes)),
        *check_groups(baseline, arm, axes),
        *check_kernels(baseline, arm, axes),
    ]


def check_parameters(baseline: Structure, arm: Structure, free: set[str] | None) -> list[Flaw]:
    """Return parameters that differ and lie in no ``free`` component."""
    flaws = []
    for name in {**baseline.parameters, **arm.parameters}:
        before, after = baseline.parameters.get(name), arm.parameters.get(name)
        kinds = kinds_of(owner for one in (before, after) if one for owner in one[1])
        if before != after and free is not None and kinds.isdisjoint(free):
            told = [describe_parameter(one) for one in (before, after)]
            flaws.append(Flaw("parameters", f"parameter {name}: {' becomes '.join(told)}"))
    return flaws


def kinds_of(owners: Iterable[str]) -> set[str]:
    """Return the kinds of some components: "ffn.gelu" -> "ffn"."""
    return {owner.partition(".")[0] for owner in owners}


def describe_parameter(parameter: tuple[str, tuple[str, ...], bool] | None) -> str:
    """Return shape, owner and state of a parameter in words."""
    if parameter is None:
        return "absent"
    shape, owners, trainable = parameter
    return f"{shape} of {owners[-1]}{'' if trainable else ', frozen'}"


def check_groups(baseline: Structure, arm: Structure, axes: Sequence[str]) -> list[Flaw]:
    """Return parameters of both that are in another parameter group, unless an axis is about
    groups.
    """
    if any(covers(key, axis) for key in GROUP_KEYS for axis in axes):
        return []
    flaws = []
    for name in sorted(baseline.groups.keys() & arm.groups.keys()):
        before, after = baseline.groups[name], arm.groups[name]
        if before != after:
            flaws.append(Flaw("groups", f"{name}: parameter group {before} becomes {after}"))
    return flaws


def check_kernels(baseline: Structure, arm: Structure, axes: Sequence[str]) -> list[Flaw]:
    """Return attention backend, precision or device if they differ outside of the axes."""
    flaws = []
    for kernel, before in baseline.kernels.items():
        after, key = arm.kernels[kernel], KERNEL_KEYS[kernel]
        if before != after and not any(covers(key, axis) for axis in axes):
            flaws.append(Flaw("kernels", f"{kernel} {before} becomes {after}"))
    return flaws


def check_records(
    baseline: RunRecord, arm: RunRecord, axes: Sequence[str], changed: Iterable[str] = ()
) -> tuple[SharedCounts, list[Flaw]]:
    """Compare what two runs recorded.

    Flaws are shared parameters whose initial values are not bitwise equal, and batches that differ
    although no ``changed`` key is about the data.
    """
    free = find_free_components(axes)
    compared = []
    for name, one in arm.parameters.items():
        is_shared = baseline.parameters.get(name, {}).get("shape") == one["shape"]
        if is_shared and (free is None or kinds_of(one["owners"]).isdisjoint(free)):
            compared.append(name)
    hashes = [(baseline.parameters[n]["sha256"], arm.parameters[n]["sha256"]) for n in compared]
    unequal = [n for n, (one, other) in zip(compared, hashes, strict=True) if one != other]
    # not strict: a run that diverged has read fewer batches
    same = [one == other for one, other in zip(baseline.batches, arm.batches, strict=False)]
    flaws = []
    if unequal and not any(covers(axis, key) for axis in axes for key in INITIALISATION_KEYS):
        count = f"{len(unequal)} of {len(compared)} shared parameters"
        text = f"{count} start with other values, the first is {unequal[0]}"
        flaws.append(Flaw("initialisation", text))
    if not all(same) and not any(is_covered(key, DATA_KEYS) for key in changed):
        flaws.append(Flaw("data", f"the batches differ from batch {same.index(False) + 1} on"))
    equal = len(compared) - len(unequal)
    return SharedCounts(len(compared), equal, len(arm.batches), sum(same)), flaws


def check_outcomes(baseline: Outcome, arm: Outcome, changed: Iterable[str]) -> list[Flaw]:
    """Return how two finished runs of one seed differ in tokens trained on or held-out text."""
    flaws = []
    before, after = (one.curve[-1][0] if one.curve else 0 for one in (baseline, arm))
    if before != after and not any(is_covered(key, BUDGET_KEYS) for key in changed):
        text = f"runs were trained on {after:,} tokens instead of {before:,}"
        flaws.append(Flaw("tokens", text))
    texts = baseline.evaluated_text, arm.evaluated_text
    if None not in texts and texts[0] != texts[1]:
        flaws.append(Flaw("data", "losses were measured on other tokens"))
    if held_out_documents(baseline) != held_out_documents(arm):
        was, now = describe_held_out(baseline), describe_held_out(arm)
        difference = f"{now}, but of other ones" if was == now else f"{now} instead of {was}"
        flaws.append(Flaw("data", f"losses were measured on {difference}"))
    return flaws


def held_out_documents(outcome: Outcome) -> list[tuple[str, int]]:
    """Return name and number of tokens of every held-out document."""
    return [(name, tokens) for name, _, tokens in outcome.documents]


def describe_held_out(outcome: Outcome) -> str:
    """Return the size of a held-out text in words."""
    documents = held_out_documents(outcome)
    return f"{sum(tokens for _, tokens in documents):,} tokens of {len(documents):,} documents"


def is_allowed(flaw: Flaw, allowed: Sequence[str]) -> bool:
    """Whether --allow names a difference."""
    return is_covered(flaw.about, allowed)


def require_clean(name: str, axes: Sequence[str], flaws: Sequence[Flaw]) -> None:
    """Raise Uncertified, naming every flaw, if there is one."""
    if not flaws:
        return
    listed = "\n".join(f"  - {flaw.text}" for flaw in flaws)
    raise Uncertified(
        f'arm "{name}" is no clean swap: besides {", ".join(axes) or "its axis"} it differs from'
        f" the baseline in\n{listed}\n"
        "  why: the difference in loss could not be attributed to the swap\n"
        "  fix: undo these differences, or allow them:"
        f" {format_allow_options(flaw.about for flaw in flaws)}"
    )


def format_allow_options(about: Iterable[str]) -> str:
    """Return the options that allow some differences."""
    return " ".join(f"--allow {one}" for one in sorted(set(about)))
