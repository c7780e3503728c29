"""An ablation from its specification to its results: arms are built and certified, run with every
seed, and put together for the report.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from lswt_core.ablation.arms import BASELINE
from lswt_core.ablation.arms_text import format_arms
from lswt_core.ablation.build_arms import (
    AblationSpec,
    ArmBuilder,
    BuiltArm,
    count_training_tokens,
)
from lswt_core.ablation.certificate import (
    Flaw,
    SharedCounts,
    Uncertified,
    check_outcomes,
    check_records,
    format_allow_options,
    is_allowed,
)
from lswt_core.ablation.runs.comparison_records import Comparison
from lswt_core.ablation.runs.looks import StudyLooks
from lswt_core.ablation.runs.outcome import ArmResult, Outcome, Study
from lswt_core.ablation.runs.progress import Job, format_partial_table
from lswt_core.ablation.runs.run_records import read_environment, read_run_record
from lswt_core.ablation.runs.runner import Runner, RunsStopped, Workers
from lswt_core.ablation.runs.store import CacheKeys, RunStore, Surroundings
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.model.attention_choice import choose_backends
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry


class Ablation:
    """One ablation on this machine."""

    def __init__(
        self, spec: AblationSpec, registry: Registry, world: World, say: Callable[[str], None]
    ) -> None:
        self.spec, self.registry, self.world, self.say = spec, registry, world, say
        self.builder = ArmBuilder(spec, registry, world)
        self.arms: list[BuiltArm] = []  # the baseline first

    def build(self, baseline: Recipe) -> None:
        """Build and certify every arm; raises Uncertified before anything is trained. ``baseline``
        is the first arm's recipe, with the overlay of the specification.
        """
        self.arms = self.builder.build(baseline)

    def describe_arms(self) -> str:
        """Return the table of arms and their costs."""
        return format_arms(self.arms, self.notes())

    def notes(self) -> list[str]:
        """Return remarks about what all arms share."""
        attention = self.builder.attention
        if attention is None or not attention.note():
            return []
        return [attention.note()]

    def seeds(self) -> range:
        """Return the seeds of all arms, from the baseline recipe's on."""
        first = self.arms[0].recipe.train.seed
        return range(first, first + self.spec.seeds)

    def jobs(self, keys: CacheKeys) -> list[Job]:
        """Return every run, seed by seed, so that an ablation that is stopped has whole pairs."""
        backends = {arm.spec.name: self.attention_backends(arm.recipe) for arm in self.arms}
        jobs = []
        for seed in self.seeds():
            for arm in self.arms:
                name = arm.spec.name
                recipe = self.builder.load(arm.spec, (*arm.overrides, f"train.seed={seed}"))
                jobs.append(Job(name, seed, keys.of(recipe, backends[name]), recipe))
        return jobs

    def attention_backends(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the names of the attention backends of an arm."""
        precision = Precision.choose(recipe.train.precision, self.world.device)
        return choose_backends(recipe, self.registry, self.world.device, precision.dtype).names

    def run(self, store: RunStore, workers: Workers) -> Study:
        """Make the runs that are not in the store, and return the results of all arms.

        Asked to stop, it prints what is finished and raises RunsStopped.
        """
        cache_keys = CacheKeys(self.registry, Surroundings.here(self.world.device, workers.threads))
        jobs = self.jobs(cache_keys)
        looks = StudyLooks(self.comparisons(cache_keys), store, self.spec.planned_looks)
        looks.declare(jobs)
        try:
            outcomes = Runner(jobs, store, workers, self.say).run()
        except RunsStopped as stopped:
            self.say(format_partial_table(jobs, stopped.outcomes))
            raise
        keys = {(job.arm, job.seed): job.key for job in jobs}
        arms = []
        for arm in self.arms:
            own = [outcomes[keys[arm.spec.name, seed]] for seed in self.seeds()]
            arms.append(collect_result(arm, own))
        pairs = list(zip(self.arms, arms, strict=True))
        looks.take(arms)
        return Study(
            name=self.spec.name,
            arms=arms,
            settings=self.settings(workers),
            certificate=[self.certify(arm, (arms[0], own), keys, store) for arm, own in pairs[1:]],
            environment=read_environment(store, list(keys.values())),
            recipe=self.arms[0].recipe.dump(),
            command=self.spec.command,
            looks=looks.by_arm(),
            others=looks.others(),
        )

    def comparisons(self, keys: CacheKeys) -> list[Comparison]:
        """Return what is asked about every arm but the baseline."""
        baseline, *others = [self.key_of_any_seed(arm, keys) for arm in self.arms]
        spec, (first, *_) = self.spec, self.seeds()
        rule = (spec.name, first, spec.margin, spec.confidence)
        return [
            Comparison(baseline, key, arm.spec.name, *rule)
            for arm, key in zip(self.arms[1:], others, strict=True)
        ]

    def key_of_any_seed(self, arm: BuiltArm, keys: CacheKeys) -> str:
        """Return a key that an arm's runs with all seeds share."""
        recipe = self.builder.load(arm.spec, (*arm.overrides, "train.seed=0"))
        return keys.of(recipe, self.attention_backends(arm.recipe))

    def settings(self, workers: Workers) -> dict[str, Any]:
        """Return how the comparison was made, as plain data."""
        baseline = self.arms[0]
        return {
            "seeds": list(self.seeds()),
            "confidence": self.spec.confidence,
            "margin": self.spec.margin,
            "looks": list(self.spec.planned_looks),
            "steps": baseline.recipe.train.total_steps,
            "tokens": count_training_tokens(baseline.recipe),
            "match": self.spec.match,
            "overlay": self.spec.overlay,
            "allowed": list(self.spec.allow),
            "runs_at_once": workers.at_once,
            "threads": workers.threads,
            **baseline.structure.kernels,
            "notes": [*self.notes(), *self.unchecked_note(workers)],
        }

    def unchecked_note(self, workers: Workers) -> list[str]:
        """A remark that plugins of others were not checked, if they were not."""
        third_party = [chosen for arm in self.arms for chosen in arm.recipe.third_party()]
        names = dict.fromkeys(f"{one.kind}/{one.offer.name}" for one in third_party)
        if not workers.unchecked or not names:
            return []
        return [f"Not checked before the runs (--unchecked): {', '.join(names)}"]

    def certify(
        self,
        arm: BuiltArm,
        results: tuple[ArmResult, ArmResult],
        keys: dict[tuple[str, int], str],
        store: RunStore,
    ) -> dict[str, Any]:
        """Return an arm's certificate as plain data: its axes, every flaw, and what its runs have
        in common with the baseline's (``results``: the baseline's, the arm's).
        """
        shared, flaws = self.compare_runs(arm, results, keys, store)
        flaws = list(dict.fromkeys([*arm.flaws, *flaws]))
        status = "certified"
        if flaws:
            is_allowed_throughout = all(is_allowed(flaw, self.spec.allow) for flaw in flaws)
            status = "allowed" if is_allowed_throughout else "broken"
        same_groups = "groups" not in {flaw.about for flaw in flaws}
        return {
            "arm": arm.spec.name,
            "swaps": list(arm.spec.swaps),
            "axes": list(arm.axes),
            "status": status,
            "changes": [change._asdict() for change in arm.changes],
            "flaws": [flaw._asdict() for flaw in flaws],
            "matched": None if arm.matched is None else arm.matched._asdict(),
            "parameter_groups": "as in the baseline" if same_groups else "different",
            "kernels": arm.structure.kernels,
            "runs": [{"seed": seed, **counts._asdict()} for seed, counts in shared.items()],
        }

    def compare_runs(
        self,
        arm: BuiltArm,
        results: tuple[ArmResult, ArmResult],
        keys: dict[tuple[str, int], str],
        store: RunStore,
    ) -> tuple[dict[int, SharedCounts], list[Flaw]]:
        """Return what runs have in common with the baseline's, by seed, and every flaw."""
        shared: dict[int, SharedCounts] = {}
        changed, flaws = [change.key for change in arm.changes], list[Flaw]()
        baseline, own = results
        for index, seed in enumerate(self.seeds()):
            before = read_run_record(store.directory(keys[baseline.name, seed]))
            after = read_run_record(store.directory(keys[own.name, seed]))
            if before is not None and after is not None:
                shared[seed], more = check_records(before, after, arm.axes, changed)
                flaws += more
            pair = baseline.outcomes[index], own.outcomes[index]
            if all(outcome.failure is None for outcome in pair):
                flaws += check_outcomes(*pair, changed)
        return shared, flaws


def collect_result(arm: BuiltArm, outcomes: list[Outcome]) -> ArmResult:
    """Return an arm with the outcomes of its runs."""
    is_plain_baseline = arm.spec.name == BASELINE and not arm.spec.swaps
    components = []
    for chosen in arm.recipe.components():
        offer = chosen.offer
        components.append(
            {
                "kind": chosen.kind,
                "name": chosen.name,
                "distribution": offer.distribution,
                "version": offer.version,
                "citation": offer.citation,
            }
        )
    return ArmResult(
        name=arm.spec.name,
        swap="" if is_plain_baseline else " + ".join(arm.spec.swaps),
        changes=[change._asdict() for change in arm.changes],
        parameters=arm.budget.total,
        trainable=sum(arm.budget.trainable.values()),
        flops_per_token=arm.budget.flops_per_token,
        tokens=count_training_tokens(arm.recipe),
        by_component=arm.budget.parameters,
        components=components,
        outcomes=outcomes,
    )


def require_certified(study: Study) -> None:
    """Raise Uncertified if what runs recorded contradicts an arm's certificate; the report is
    written by then, and says so too.
    """
    broken = [one for one in study.certificate if one["status"] == "broken"]
    if not broken:
        return
    lines = []
    for one in broken:
        lines.append(f"  - {one['arm']}: {'; '.join(flaw['text'] for flaw in one['flaws'])}")
    about = [flaw["about"] for one in broken for flaw in one["flaws"]]
    raise Uncertified(
        "the runs of some arms differ in more than their swap, so that their differences in loss"
        " cannot be attributed to it:\n"
        + "\n".join(lines)
        + f"\n  fix: undo these differences, or allow them: {format_allow_options(about)}"
    )


def format_command(words: Sequence[str]) -> str:
    """Return a command line that can be typed again."""
    return shlex.join(["python", "-m", "lswt_core", "ablate", *words])
