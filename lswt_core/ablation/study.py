"""An ablation from what was asked to its report: arms are built and certified, budgets matched,
runs made or found, and compared.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lswt_core.ablation import certificate, outcome
from lswt_core.ablation.arms import BASELINE, Variant, steps_between
from lswt_core.ablation.certificate import Change, Common, Flaw, Start, Structure, Uncertified
from lswt_core.ablation.match import Matched, free_knob, match
from lswt_core.ablation.outcome import Outcome
from lswt_core.ablation.runner import Job, Matrix, Workers
from lswt_core.ablation.shared_attention import Shared, shared_attention
from lswt_core.ablation.store import Keys, RunStore, Surroundings
from lswt_core.ablation.worker import BATCHES, START
from lswt_core.budget import Budget, budget
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import UsageError
from lswt_core.model.attention_choice import choose_backends
from lswt_core.model.build import build_model
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.train.environment import is_intact, read_record

Say = Callable[[str], None]


class Asked(NamedTuple):
    """What an ablation is to find out, and how."""

    name: str
    variants: Sequence[Variant]  # the baseline first
    seeds: int
    match: str  # "none", "params", "flops"
    knob: str
    margin: float  # nats per token within which two arms count as equivalent
    allow: Sequence[str]
    overlay: str | None
    command: str

    def fingerprint(self) -> str:
        """A hash of what is compared: another question gets another report."""
        told = [[str(part) for part in variant] for variant in self.variants]
        return sha256(json.dumps([told, self.match, self.knob, self.overlay]).encode()).hexdigest()[
            :8
        ]


class Built(NamedTuple):
    """An arm, ready to be run."""

    variant: Variant
    recipe: Recipe  # with the first seed
    overrides: tuple[str, ...]  # besides the seed
    axes: tuple[str, ...]
    changes: list[Change]
    structure: Structure
    budget: Budget
    matched: Matched | None
    flaws: list[Flaw]  # that were allowed

    @property
    def work(self) -> int | None:
        """FLOPs of the whole training; None: unknown."""
        per_token = self.budget.flops_per_token
        return None if per_token is None else per_token * tokens_of(self.recipe)


class Ablation:
    """One ablation on this machine."""

    def __init__(self, asked: Asked, registry: Registry, world: World, say: Say) -> None:
        self.asked, self.registry, self.world, self.say = asked, registry, world, say
        self.built: list[Built] = []
        self.attention: Shared | None = None  # None: the baseline names its backend

    # ---------- before the runs

    def build(self) -> None:
        """Build every arm and certify it; raises Uncertified before anything is trained."""
        recipes = {
            variant.name: self.load(variant, variant.overrides) for variant in self.asked.variants
        }
        self.attention = shared_attention(recipes, self.registry, self.world.device)
        for variant in self.asked.variants:
            self.built.append(self.arm(variant, self.built[0] if self.built else None))

    def load(self, variant: Variant, overrides: Sequence[str]) -> Recipe:
        """An arm's recipe, with the attention backend that all arms share."""
        shared = self.attention.overrides.get(variant.name, ()) if self.attention else ()
        return Recipe.load(
            variant.path, (*overrides, *shared), overlay=self.asked.overlay, registry=self.registry
        )

    def arm(self, variant: Variant, baseline: Built | None) -> Built:
        """An arm, its budget matched, certified against the baseline."""
        recipe, matched, overrides = self.load(variant, variant.overrides), None, variant.overrides
        axes: tuple[str, ...] = ()
        if baseline is not None:
            steps = steps_between(baseline.variant.path, variant.path)
            axes = certificate.axes_of(
                certificate.changes(baseline.recipe, recipe), variant.axes, steps
            )
            matched = self.matched(variant, recipe, axes, baseline)
        if matched is not None:
            overrides, axes = (*overrides, matched.override), (*axes, matched.key)
            recipe = self.load(variant, overrides)
        found = certificate.structure(recipe, self.registry, self.world.device)
        if baseline is None:
            return Built(variant, recipe, overrides, axes, [], found, self.budget(recipe), None, [])
        changes = certificate.changes(baseline.recipe, recipe)
        if not changes:
            raise UsageError(
                f'arm "{variant.name}" is the baseline: its swap ({", ".join(variant.swaps)})'
                " changes nothing"
            )
        flaws = certificate.flaws_of_recipe(changes, axes) + certificate.flaws_of_structure(
            baseline.structure, found, axes
        )
        certificate.refuse(
            variant.name,
            axes,
            [flaw for flaw in flaws if not certificate.allowed(flaw, self.asked.allow)],
        )
        return Built(
            variant, recipe, overrides, axes, changes, found, self.budget(recipe), matched, flaws
        )

    def budget(self, recipe: Recipe) -> Budget:
        """What a recipe takes on this machine."""
        return budget(recipe, self.registry, self.world)

    def matched(
        self, variant: Variant, recipe: Recipe, axes: tuple[str, ...], baseline: Built
    ) -> Matched | None:
        """The size that gives the arm the baseline's budget; None if none is to be matched, or the
        budgets are equal.
        """
        if self.asked.match == "none":
            return None
        spent = self.parameters if self.asked.match == "params" else self.work
        target = spent(baseline.recipe)
        if spent(recipe) == target:
            return None
        key = free_knob(self.asked.knob, axes, self.asked.match)
        start = (
            recipe.model.n_layers
            if self.asked.knob == "n_layers"
            else recipe.model.d_ffn or 4 * recipe.model.d_model
        )
        return match(
            variant.name,
            key,
            start,
            target,
            lambda size: spent(self.load(variant, (*variant.overrides, f"{key}={size}"))),
        )

    def parameters(self, recipe: Recipe) -> int:
        """All parameters of a recipe."""
        built = build_model(recipe, self.registry, device=self.world.device, dtype=torch.float32)
        return sum(parameter.numel() for parameter in built.loss.parameters())

    def work(self, recipe: Recipe) -> int:
        """The work of a recipe's whole training, in FLOPs; raises UsageError where it is unknown."""
        taken = budget(recipe, self.registry, self.world)
        if taken.flops_per_token is None:
            raise UsageError(
                f"--match flops: {'; '.join(taken.unknown.values())}\n  fix: --match params, or"
                " --match none"
            )
        return taken.flops_per_token * tokens_of(recipe)

    def table(self) -> str:
        """The arms and what they cost, and how clean their swaps are."""
        base = self.built[0]
        lines = [
            f"{'arm':<32}{'parameters':>16}{'':>9}{'FLOP/token':>16}{'':>9}{'training FLOP':>16}{'':>9}"
            "  differs in"
        ]
        for built in self.built:
            own = built.budget
            cells = [
                *amount(own.total, base.budget.total, ","),
                *amount(own.flops_per_token, base.budget.flops_per_token, ","),
                *amount(built.work, base.work, ".3e"),
            ]
            row = "".join(
                f"{cell:>{width}}" for cell, width in zip(cells, (16, 9) * 3, strict=True)
            )
            lines.append(f"{built.variant.name:<32}{row}  {', '.join(built.axes) or '-'}")
            lines += [f"  unknown: {what} ({why})" for what, why in own.unknown.items()]
            lines += (
                [f"  matched by {built.matched.override}, residual {built.matched.residual:+.3%}"]
                if built.matched
                else []
            )
            lines += [f"  allowed: {flaw.text}" for flaw in built.flaws]
        return "\n".join([*lines, *self.notes()])

    def notes(self) -> list[str]:
        """What all arms have been given so that they compare; nothing where the baseline is as it
        would be alone.
        """
        told = self.attention.text() if self.attention else ""
        return [told] if told else []

    # ---------- the runs

    def seeds(self) -> range:
        """The seeds of the runs, from the baseline recipe's on."""
        first = self.built[0].recipe.train.seed
        return range(first, first + self.asked.seeds)

    def jobs(self, threads: int) -> list[Job]:
        """Every run, seed by seed, so that an ablation that is stopped has whole pairs."""
        keys = Keys(self.registry, Surroundings.here(self.world.device, threads))
        backends = {built.variant.name: self.backends(built.recipe) for built in self.built}
        jobs = []
        for seed in self.seeds():
            for built in self.built:
                recipe = self.load(built.variant, (*built.overrides, f"train.seed={seed}"))
                jobs.append(
                    Job(
                        built.variant.name,
                        seed,
                        keys.of(recipe, backends[built.variant.name]),
                        recipe,
                    )
                )
        return jobs

    def backends(self, recipe: Recipe) -> tuple[str, ...]:
        """The attention backends that compute an arm."""
        precision = Precision.choose(recipe.train.precision, self.world.device)
        return choose_backends(recipe, self.registry, self.world.device, precision.dtype).names

    def run(self, store: RunStore, workers: Workers) -> outcome.Study:
        """Make the runs that are not in the store, and put everything together."""
        jobs = self.jobs(workers.threads)
        found = Matrix(jobs, store, workers, self.say).run()
        keys = {(job.arm, job.seed): job.key for job in jobs}
        arms = [
            self.result(built, [found[keys[built.variant.name, seed]] for seed in self.seeds()])
            for built in self.built
        ]
        return outcome.Study(
            name=self.asked.name,
            arms=arms,
            settings=self.settings(workers),
            certificate=[
                self.certify(built, keys, store, (arms[0], arm))
                for built, arm in zip(self.built[1:], arms[1:], strict=True)
            ],
            environment=environment_of(store, list(keys.values())),
            recipe=self.built[0].recipe.dump(),
            command=self.asked.command,
        )

    def settings(self, workers: Workers) -> dict[str, Any]:
        """How the comparison was made."""
        first = self.built[0]
        return {
            "seeds": list(self.seeds()),
            "confidence": 0.95,
            "margin": self.asked.margin,
            "steps": first.recipe.train.total_steps,
            "tokens": tokens_of(first.recipe),
            "match": self.asked.match,
            "overlay": self.asked.overlay,
            "allowed": list(self.asked.allow),
            "runs_at_once": workers.at_once,
            "threads": workers.threads,
            **first.structure.kernels,
            "notes": self.notes(),
        }

    def result(self, built: Built, outcomes: list[Outcome]) -> outcome.Arm:
        """An arm with what its runs came to."""
        return outcome.Arm(
            name=built.variant.name,
            swap=(
                " + ".join(built.variant.swaps)
                if built.variant.name != BASELINE or built.variant.swaps
                else ""
            ),
            changes=[change._asdict() for change in built.changes],
            parameters=built.budget.total,
            trainable=sum(built.budget.trainable.values()),
            flops_per_token=built.budget.flops_per_token,
            tokens=tokens_of(built.recipe),
            by_component=built.budget.parameters,
            components=[
                {
                    "kind": one.kind,
                    "name": one.name,
                    "distribution": one.offer.distribution,
                    "version": one.offer.version,
                    "citation": one.offer.citation,
                }
                for one in built.recipe.components()
            ],
            outcomes=outcomes,
        )

    # ---------- afterwards

    def certify(
        self,
        built: Built,
        keys: dict[tuple[str, int], str],
        store: RunStore,
        arms: tuple[outcome.Arm, outcome.Arm],
    ) -> dict[str, Any]:
        """The arm's certificate: what differs, what was allowed to, and what its runs had in common
        with the baseline's.
        """
        commons: dict[int, Common] = {}
        changed = [change.key for change in built.changes]
        found = list(built.flaws)
        for seed, (one, other) in zip(
            self.seeds(), zip(*(arm.outcomes for arm in arms), strict=True), strict=True
        ):
            pair = [start_of(store.directory(keys[arm.name, seed])) for arm in arms]
            if pair[0] is not None and pair[1] is not None:
                commons[seed], more = certificate.flaws_of_start(
                    pair[0], pair[1], built.axes, changed
                )
                found += more
            if one.failure is other.failure is None:
                found += certificate.flaws_of_amounts(one, other, changed)
        flaws = list(dict.fromkeys(found))
        strange = [flaw for flaw in flaws if not certificate.allowed(flaw, self.asked.allow)]
        return {
            "arm": built.variant.name,
            "swaps": list(built.variant.swaps),
            "axes": list(built.axes),
            "status": "broken" if strange else "allowed" if flaws else "certified",
            "changes": [change._asdict() for change in built.changes],
            "flaws": [flaw._asdict() for flaw in flaws],
            "matched": None if built.matched is None else built.matched._asdict(),
            "parameter_groups": (
                "as in the baseline"
                if "groups" not in {flaw.about for flaw in flaws}
                else "different"
            ),
            "kernels": built.structure.kernels,
            "runs": [{"seed": seed, **common._asdict()} for seed, common in commons.items()],
        }

    def refuse_broken(self, study: outcome.Study) -> None:
        """Raise Uncertified if what runs recorded contradicts what was promised; the report is
        written, and says so too.
        """
        broken = [one for one in study.certificate if one["status"] == "broken"]
        if broken:
            told = "\n".join(
                f"  - {one['arm']}: {'; '.join(flaw['text'] for flaw in one['flaws'])}"
                for one in broken
            )
            about = (flaw["about"] for one in broken for flaw in one["flaws"])
            raise Uncertified(
                "the runs of some arms were not what a swap promises, so their differences cannot"
                f" be ascribed to it:\n{told}\n  fix: undo these differences, or let them pass"
                f" knowingly: {certificate.allowances(about)}"
            )


def tokens_of(recipe: Recipe) -> int:
    """How many tokens a recipe trains on."""
    return recipe.train.total_steps * recipe.train.tokens_per_step


def amount(own: int | None, base: int | None, form: str) -> tuple[str, str]:
    """An amount in words, and its difference to the baseline's."""
    if own is None:
        return "unknown", ""
    return f"{own:{form}}", "" if base is None else f"{own / base - 1:+.2%}"


def start_of(directory: Path) -> Start | None:
    """What a run recorded of its beginning and its data; None if it has not begun."""
    start, batches = directory / START, directory / BATCHES
    if not start.is_file() or not batches.is_file():
        return None
    return Start(
        json.loads(start.read_text(encoding="utf-8")),
        batches.read_text(encoding="utf-8").splitlines(),
    )


def environment_of(store: RunStore, keys: Sequence[str]) -> dict[str, Any]:
    """The surroundings the first run recorded that can be read; runs are only compared where they
    are the same.
    """
    for key in keys:
        path = store.directory(key) / "environment.json"
        if is_intact(path):
            found = read_record(path)
            return {
                name: found[name]
                for name in ("device", "processes", "precision", "machine", "versions")
                if name in found
            }
    return {"device": str(torch.device("cpu"))}


def command_of(words: Sequence[str]) -> str:
    """A command line as it may be typed again."""
    return shlex.join(["python", "-m", "lswt_core", "ablate", *words])
