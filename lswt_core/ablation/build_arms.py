"""Builds every arm of an ablation, matches its budget and certifies it, before anything is
trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lswt_core.ablation.arms import ArmSpec, files_between
from lswt_core.ablation.certificate import (
    Flaw,
    Structure,
    check_recipe,
    check_structure,
    describe_structure,
    is_allowed,
    require_clean,
)
from lswt_core.ablation.match import Matched, choose_knob, match_size
from lswt_core.ablation.recipe_diff import Change, diff_recipes, resolve_axes
from lswt_core.ablation.runs.store import CacheKeys
from lswt_core.ablation.runs.surroundings import Surroundings
from lswt_core.ablation.shared_attention import SharedAttention, share_attention
from lswt_core.ablation.tuning_grid import TunedOption
from lswt_core.budget import Budget, budget
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import UsageError
from lswt_core.model.attention_choice import choose_backends
from lswt_core.model.build import build_model
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry


class AblationSpec(NamedTuple):
    """What an ablation compares, and how."""

    name: str
    arms: Sequence[ArmSpec]  # the baseline first
    seeds: int
    match: str  # "none", "params", "flops", "time"
    knob: str  # of match.KNOBS
    margin: float  # nats per token within which two arms count as equivalent
    allow: Sequence[str]
    overlay: str | None
    command: str
    # of a run's process; --match time measures with them
    threads: int = 1
    plugins: Sequence[Path] = ()
    tune: tuple[TunedOption, ...] = ()  # options that are tuned for every arm
    tuning_seeds: int = 3
    horizons: tuple[float, ...] = ()  # multiples of the recipe's steps; empty: 1 alone
    looks: tuple[int, ...] = ()  # numbers of seeds at which verdicts are planned; empty: at `seeds`
    sequential: bool = False  # seeds are added look by look, until every arm is decided
    confidence: float = 0.95  # 1 - alpha
    probes: tuple[str, ...] = ()  # of trained models, by name (evaluation.probes.PROBES)

    @property
    def planned_looks(self) -> tuple[int, ...]:
        """The numbers of seeds at which verdicts are planned."""
        return self.looks or (self.seeds,)

    def fingerprint(self) -> str:
        """Return a hash of what is asked: other arms, another margin or other planned looks get
        another report. More seeds do not: they are another look at the same comparisons, which the
        store records (``ComparisonRecords``).
        """
        arms = [[str(part) for part in arm] for arm in self.arms]
        rule = [self.margin, self.confidence, self.looks]
        asked: list[Any] = [arms, self.match, self.knob, self.overlay, rule]
        if self.tune:
            asked += [self.tune, self.tuning_seeds]
        if self.horizons:
            asked += [self.horizons]
        text = json.dumps(asked)
        return sha256(text.encode()).hexdigest()[:8]


class BuiltArm(NamedTuple):
    """An arm that is certified and can be run."""

    spec: ArmSpec
    recipe: Recipe  # with the first seed
    overrides: tuple[str, ...]  # besides the seed
    axes: tuple[str, ...]
    changes: list[Change]  # against the baseline
    structure: Structure
    budget: Budget
    matched: Matched | None
    flaws: list[Flaw]  # that were allowed

    @property
    def training_flops(self) -> int | None:
        """FLOPs of the whole training; None: unknown."""
        return self.flops_of(self.recipe)

    def flops_of(self, recipe: Recipe) -> int | None:
        """Return the training FLOPs of this arm with a recipe of another length; None: unknown."""
        per_token = self.budget.flops_per_token
        return None if per_token is None else per_token * count_training_tokens(recipe)


class ArmBuilder:
    """Builds the arms of one ablation on this machine."""

    def __init__(self, spec: AblationSpec, registry: Registry, world: World) -> None:
        self.spec, self.registry, self.world = spec, registry, world
        self.attention: SharedAttention | None = None  # None: the baseline names its backend

    def build(self, recipe: Recipe) -> list[BuiltArm]:
        """Return all arms, the baseline (whose recipe this is) first; raises Uncertified if one is
        no clean swap.
        """
        first, *others = self.spec.arms
        recipes = {first.name: recipe} | {arm.name: self.load(arm, arm.overrides) for arm in others}
        self.attention = share_attention(recipes, self.registry, self.world.device)
        baseline = self.build_baseline(first)
        return [baseline, *(self.build_arm(arm, baseline) for arm in others)]

    def load(self, arm: ArmSpec, overrides: Sequence[str]) -> Recipe:
        """Return an arm's recipe, with the attention backend that all arms share."""
        shared: tuple[str, ...] = ()
        if self.attention is not None:
            shared = self.attention.overrides.get(arm.name, ())
        return Recipe.load(
            arm.path, (*overrides, *shared), overlay=self.spec.overlay, registry=self.registry
        )

    def build_baseline(self, arm: ArmSpec) -> BuiltArm:
        """Return the baseline."""
        recipe = self.load(arm, arm.overrides)
        structure = describe_structure(recipe, self.registry, self.world.device)
        return BuiltArm(
            arm, recipe, arm.overrides, (), [], structure, self.estimate(recipe), None, []
        )

    def build_arm(self, arm: ArmSpec, baseline: BuiltArm) -> BuiltArm:
        """Return an arm, its budget matched and certified against the baseline."""
        recipe, overrides = self.load(arm, arm.overrides), arm.overrides
        files = files_between(baseline.spec.path, arm.path)
        axes = resolve_axes(diff_recipes(baseline.recipe, recipe), arm.axes, files)
        matched = self.match_budget(arm, recipe, axes, baseline)
        if matched is not None:
            overrides, axes = (*overrides, matched.override), (*axes, matched.key)
            recipe = self.load(arm, overrides)
        changes = diff_recipes(baseline.recipe, recipe)
        if not changes:
            swaps = ", ".join(arm.swaps)
            raise UsageError(
                f'arm "{arm.name}" is the baseline: its swap ({swaps}) changes nothing'
            )
        structure = describe_structure(recipe, self.registry, self.world.device)
        own = [change for change in changes if matched is None or change.key != matched.key]
        flaws = check_recipe(own, axes) + check_structure(baseline.structure, structure, axes)
        forbidden = [flaw for flaw in flaws if not is_allowed(flaw, self.spec.allow)]
        require_clean(arm.name, axes, forbidden)
        cost = self.estimate(recipe)
        return BuiltArm(arm, recipe, overrides, axes, changes, structure, cost, matched, flaws)

    def estimate(self, recipe: Recipe) -> Budget:
        """Return parameters, memory and FLOPs of a recipe on this machine."""
        return budget(recipe, self.registry, self.world)

    def match_budget(
        self, arm: ArmSpec, recipe: Recipe, axes: tuple[str, ...], baseline: BuiltArm
    ) -> Matched | None:
        """Return the size that gives the arm the baseline's parameters or FLOPs; None if nothing
        is to be matched, or they are equal already.
        """
        if self.spec.match == "none":
            return None
        if self.spec.match == "time":
            return self.match_time(arm, recipe, axes, baseline)
        cost = self.count_parameters if self.spec.match == "params" else self.count_flops
        target = cost(baseline.recipe)
        if cost(recipe) == target:
            return None
        key = choose_knob(self.spec.knob, axes, self.spec.match)
        start = recipe.model.d_ffn or 4 * recipe.model.d_model
        if self.spec.knob == "n_layers":
            start = recipe.model.n_layers

        def cost_of_size(size: int) -> int:
            return cost(self.load(arm, (*arm.overrides, f"{key}={size}")))

        return match_size(arm.name, key, start, target, cost_of_size)

    def match_time(
        self, arm: ArmSpec, recipe: Recipe, axes: tuple[str, ...], baseline: BuiltArm
    ) -> Matched | None:
        """Return the number of steps that takes as long as the baseline's; None if it is theirs."""
        from lswt_core.ablation.match_time import match_steps, remember_times, time_steps

        keys = CacheKeys(self.registry, Surroundings.here(self.world.device, self.spec.threads))
        pair = (baseline.recipe, recipe)
        times = remember_times(
            [keys.of(one, self.attention_backends(one)) for one in pair],
            lambda: time_steps(*pair, self.spec.threads, self.spec.plugins),
        )
        matched = match_steps(arm.name, axes, baseline.recipe, times)
        return None if matched.size == recipe.train.total_steps else matched

    def attention_backends(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the names of the attention backends of a recipe."""
        precision = Precision.choose(recipe.train.precision, self.world.device)
        return choose_backends(recipe, self.registry, self.world.device, precision.dtype).names

    def count_parameters(self, recipe: Recipe) -> int:
        """Return the number of parameters of a recipe."""
        built = build_model(recipe, self.registry, device=self.world.device, dtype=torch.float32)
        return sum(parameter.numel() for parameter in built.loss.parameters())

    def count_flops(self, recipe: Recipe) -> int:
        """Return the FLOPs of a recipe's whole training; raises UsageError if unknown."""
        estimate = self.estimate(recipe)
        if estimate.flops_per_token is None:
            raise UsageError(
                f"--match flops: {'; '.join(estimate.unknown.values())}\n"
                "  fix: --match params, or --match none"
            )
        return estimate.flops_per_token * count_training_tokens(recipe)


def count_training_tokens(recipe: Recipe) -> int:
    """Return how many tokens a recipe trains on."""
    return recipe.train.total_steps * recipe.train.tokens_per_step
