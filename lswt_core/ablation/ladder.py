"""An ablation at several sizes: its arms laid over every rung of a ladder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from lswt_core.ablation.arms import ArmSpec
from lswt_core.ablation.build_arms import AblationSpec, BuiltArm
from lswt_core.ablation.comparison import check_comparison, describe_plan
from lswt_core.ablation.ladder_file import Ladder, RateTable, Rung
from lswt_core.ablation.study import Ablation
from lswt_core.distributed.world import World
from lswt_core.errors import Problem, RecipeError, UsageError
from lswt_core.model.build import build_model
from lswt_core.model.parameters import count_parameters
from lswt_core.recipe import Recipe
from lswt_core.recipe.toml_writer import flat
from lswt_core.registry import Registry

# components whose parameters are tables of the vocabulary
TABLES = ("embedding", "head.")


class SizedRung(NamedTuple):
    """A rung whose size is known: what its arms are given."""

    rung: Rung
    parameters: int  # of the baseline, without embedding tables
    overrides: tuple[str, ...]  # besides the rate

    def lay_over(self, arm: ArmSpec) -> ArmSpec:
        """Return an arm at this size. Its own overrides come last: a swap holds at every size."""
        path = arm.path if self.rung.path is None else self.rung.path
        return arm._replace(path=path, overrides=(*self.overrides, *arm.overrides))


class RungAblation(NamedTuple):
    """The ablation at one rung."""

    rung: Rung
    parameters: int  # of the baseline, without embedding tables
    ablation: Ablation

    @property
    def name(self) -> str:
        """The rung's name."""
        return self.rung.name

    @property
    def flops(self) -> int:
        """Training FLOPs of the baseline; 0: unknown."""
        return self.ablation.arms[0].training_flops or 0


class LadderAblation:
    """One ablation at every rung of a ladder on this machine. ``spec`` has the arms as they are
    without a ladder, the baseline first.
    """

    def __init__(
        self,
        spec: AblationSpec,
        ladder: Ladder,
        registry: Registry,
        world: World,
        say: Callable[[str], None],
    ) -> None:
        self.spec, self.ladder = spec, ladder
        self.registry, self.world, self.say = registry, world, say
        self.rungs: list[RungAblation] = []  # as in the file

    def fingerprint(self) -> str:
        """Return a hash of what is compared at every rung."""
        parts = [[one.name, one.ablation.spec.fingerprint()] for one in self.rungs]
        return sha256(json.dumps(parts).encode()).hexdigest()[:8]

    @property
    def arms(self) -> list[BuiltArm]:
        """All built arms of all rungs."""
        return [arm for one in self.rungs for arm in one.ablation.arms]

    def build(self) -> None:
        """Build and certify every arm at every rung, before anything is trained; raises
        Uncertified, RecipeError or UsageError.
        """
        if self.spec.horizons:
            raise UsageError(
                "--horizons and --ladder: every rung has its own length of training\n  fix: one of"
                " them at a time"
            )
        self.check_paths()
        sized = [self.measure(rung) for rung in self.ladder.rungs]
        self.check_sizes(sized)
        factors = rate_factors(sized, self.ladder.rate)
        for one, factor in zip(sized, factors, strict=True):
            arms = [self.with_rate(one.lay_over(arm), factor) for arm in self.spec.arms]
            name = f"{self.spec.name} at {one.rung.name}"
            spec = self.spec._replace(name=name, arms=arms)
            ablation = Ablation(spec, self.registry, self.world, self.say)
            ablation.build(self.load(arms[0]))
            self.rungs.append(RungAblation(one.rung, one.parameters, ablation))
            check_comparison(ablation)
        self.check_compute()

    def load(self, arm: ArmSpec) -> Recipe:
        """Return an arm's recipe."""
        return Recipe.load(
            arm.path, arm.overrides, overlay=self.spec.overlay, registry=self.registry
        )

    def measure(self, rung: Rung) -> SizedRung:
        """Count a rung's parameters, and give it the length of training that follows from them."""
        baseline = self.spec.arms[0]
        recipe = self.load(SizedRung(rung, 0, rung.overrides).lay_over(baseline))
        parameters = count_without_tables(recipe, self.registry, self.world.device)
        steps, overrides = rung.steps, rung.overrides
        if rung.tokens_per_parameter is not None:
            tokens = rung.tokens_per_parameter * parameters
            steps = max(1, round(tokens / recipe.train.tokens_per_step))
        if steps is not None:
            overrides = (*overrides, f"train.steps={steps}")
        return SizedRung(rung, parameters, overrides)

    def with_rate(self, arm: ArmSpec, factor: float) -> ArmSpec:
        """Return an arm whose own rate is multiplied by a factor."""
        rate = self.ladder.rate
        if rate is None or factor == 1.0:
            return arm
        value = flat(self.load(arm).resolved()).get(rate.key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            what, why = f"the ladder's rate {rate.key}", f'arm "{arm.name}" has no such number'
            fix = f"give it one, or take [rate] out of {self.ladder.where}"
            raise RecipeError([Problem(what, arm.where, why, fix)])
        return arm._replace(overrides=(*arm.overrides, f"{rate.key}={value * factor:.6g}"))

    def check_paths(self) -> None:
        """Raise RecipeError if rungs are recipes and so are arms: then nobody says which sizes
        those arms have.
        """
        baseline, *others = self.spec.arms
        own = [arm for arm in others if arm.path != baseline.path]
        rung = next((rung for rung in self.ladder.rungs if rung.path is not None), None)
        if rung is None or not own:
            return
        what = f'arm "{own[0].name}" has no size at rung "{rung.name}"'
        why = "both are recipes of their own"
        fix = "give the arm as --swap, or the rung as set = [...] in place of recipe"
        raise RecipeError([Problem(what, rung.where, why, fix)])

    def check_sizes(self, sized: Sequence[SizedRung]) -> None:
        """Raise RecipeError unless every rung is larger than the one before."""
        for smaller, larger in pairwise(sized):
            if larger.parameters > smaller.parameters:
                continue
            what = f'rung "{larger.rung.name}" is no larger than "{smaller.rung.name}"'
            why = (
                f"{larger.parameters:,} and {smaller.parameters:,} parameters without embedding"
                " tables; the command's own overrides come after the rung's"
            )
            fix = "order rungs by size, the smallest first, and leave sizes to the ladder"
            raise RecipeError([Problem(what, larger.rung.where, why, fix)])

    def check_compute(self) -> None:
        """Raise RecipeError unless every rung takes more compute than the one before."""
        for smaller, larger in pairwise(self.rungs):
            if larger.flops > smaller.flops or not larger.flops:
                continue
            what = f'rung "{larger.name}" takes no more compute than "{smaller.name}"'
            why = f"{larger.flops:.3g} and {smaller.flops:.3g} FLOPs of training"
            fix = "give the larger one more steps, or tokens_per_parameter to both"
            raise RecipeError([Problem(what, larger.rung.where, why, fix)])

    def describe_arms(self) -> str:
        """Return the table of arms of every rung, under its size and training."""
        parts = []
        for one in self.rungs:
            lines = [self.describe_rung(one), one.ablation.describe_arms()]
            parts.append("\n".join([*lines, *describe_plan(one.ablation)]))
        return "\n\n".join(parts)

    def describe_rung(self, one: RungAblation) -> str:
        """Return a rung's size, length of training and rate."""
        recipe = one.ablation.arms[0].recipe
        train, text = recipe.train, ""
        if self.ladder.rate is not None:
            text = f", {self.ladder.rate.key} {read_rate(recipe, self.ladder.rate):g}"
        return (
            f"{one.name}: {one.parameters:,} parameters without embedding tables,"
            f" {train.total_steps:,} steps of {train.tokens_per_step:,} tokens{text}"
        )


def rate_factors(sized: Sequence[SizedRung], rate: RateTable | None) -> list[float]:
    """Return what rates are multiplied by at every rung."""
    if rate is None:
        return [1.0] * len(sized)
    reference = next(one.parameters for one in sized if one.rung.name == rate.at)
    return [(one.parameters / reference) ** rate.exponent for one in sized]


def read_rate(recipe: Recipe, rate: RateTable) -> Any:
    """Return a recipe's value of the option that the rate rule is about."""
    return flat(recipe.resolved())[rate.key]


def count_without_tables(recipe: Recipe, registry: Registry, device: torch.device) -> int:
    """Return a recipe's number of parameters without the tables of its embedding and head."""
    built = build_model(recipe, registry, device=device, dtype=torch.float32)
    counts = count_parameters(built.loss)["by_component"]
    return sum(number for name, number in counts.items() if not name.startswith(TABLES))
