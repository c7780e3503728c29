"""An ablation from its specification to its results: arms are built and certified, run with every
seed, and put together for the report.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lswt_core.ablation.arms import BASELINE
from lswt_core.ablation.arms_text import format_arms
from lswt_core.ablation.build_arms import (
    AblationSpec,
    ArmBuilder,
    BuiltArm,
    count_training_tokens,
)
from lswt_core.ablation.certificate import Uncertified, format_allow_options
from lswt_core.ablation.certify_runs import RunsOfArms, certify
from lswt_core.ablation.probe_runs import ProbedRuns
from lswt_core.ablation.runs.comparison_records import Comparison
from lswt_core.ablation.runs.looks import StudyLooks
from lswt_core.ablation.runs.outcome import ArmResult, Outcome, Study
from lswt_core.ablation.runs.progress import Job, format_partial_table
from lswt_core.ablation.runs.run_records import read_environment
from lswt_core.ablation.runs.runner import Runner, RunsStopped, Workers
from lswt_core.ablation.runs.store import CacheKeys, RunStore
from lswt_core.ablation.runs.surroundings import Surroundings
from lswt_core.distributed.world import World
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
        self.keys: CacheKeys | None = None

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

    def cache_keys(self, store: RunStore, workers: Workers) -> CacheKeys:
        """Return the keys of runs that these workers make; they are computed once."""
        if self.keys is None:
            surroundings = Surroundings.here(self.world.device, workers.threads, workers.devices)
            self.keys = CacheKeys(self.registry, surroundings, store)
        return self.keys

    def jobs(self, store: RunStore, workers: Workers) -> list[Job]:
        """Return every run, seed by seed, so that an ablation that is stopped has whole pairs."""
        make_job = self.job_maker(store, workers)
        return [make_job(arm, seed) for seed in self.seeds() for arm in self.arms]

    def job_maker(self, store: RunStore, workers: Workers) -> Callable[..., Job]:
        """Return ``make_job(arm, seed, overrides=())``: the run of a built arm with a seed, with
        further overrides.
        """
        keys = self.cache_keys(store, workers)
        backends = {arm.spec.name: self.builder.attention_backends(arm.recipe) for arm in self.arms}

        def make_job(arm: BuiltArm, seed: int, overrides: Sequence[str] = ()) -> Job:
            name, words = arm.spec.name, (*arm.overrides, *overrides, f"train.seed={seed}")
            recipe = self.builder.load(arm.spec, words)
            label = " ".join([name, *overrides])
            key, code = keys.of(recipe, backends[name]), keys.code_of(recipe, backends[name])
            return Job(label, seed, key, recipe, code, arm.flops_of(recipe))

        return make_job

    def run(self, store: RunStore, workers: Workers) -> Study:
        """Make the runs that are not in the store, and return the results of all arms.

        Asked to stop, it prints what is finished and raises RunsStopped, which has the study of it.
        """
        jobs = self.jobs(store, workers)
        self.looks(store, workers).declare(jobs)
        try:
            outcomes = Runner(jobs, store, workers, self.say).run()
        except RunsStopped as stopped:
            self.say(format_partial_table(jobs, stopped.outcomes))
            stopped.study = self.collect(jobs, stopped.outcomes, store, workers)
            raise
        return self.collect(jobs, outcomes, store, workers)

    def collect(
        self,
        jobs: Sequence[Job],
        outcomes: Mapping[str, Outcome],
        store: RunStore,
        workers: Workers,
    ) -> Study:
        """Return the results of all arms, whose looks were declared; with all runs this is a look.
        Runs that have no outcome (by key) are not finished.
        """
        keys = {(job.arm, job.seed): job.key for job in jobs}
        results = []
        for arm in self.arms:
            own, stored = [], {}
            for seed in self.seeds():
                key = keys[arm.spec.name, seed]
                own.append(outcomes.get(key) or Outcome.unfinished(seed))
                stored[seed] = key, str(store.directory(key))
            results.append(replace(collect_result(arm, own), stored=stored))
        arms = ProbedRuns(self.spec.probes, self.registry, self.say).add(results)
        looks = self.looks(store, workers)
        if not any(arm.unfinished_seeds() for arm in arms):
            looks.take(arms)
        pairs, runs = list(zip(self.arms, arms, strict=True)), RunsOfArms(store, keys)
        return Study(
            name=self.spec.name,
            arms=arms,
            settings=self.settings(workers),
            certificate=[
                certify(arm, arms[0], own, runs, self.spec.allow) for arm, own in pairs[1:]
            ],
            environment=read_environment(store, list(keys.values())),
            recipe=self.arms[0].recipe.dump(),
            command=self.spec.command,
            looks=looks.by_arm(),
            others=looks.others(),
            values=list_values(self.arms[0].recipe),
        )

    def looks(self, store: RunStore, workers: Workers) -> StudyLooks:
        """Return the looks at every arm in a store."""
        comparisons = self.comparisons(self.cache_keys(store, workers))
        return StudyLooks(comparisons, store, self.spec.planned_looks)

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
        return keys.of(recipe, self.builder.attention_backends(arm.recipe))

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


def list_values(recipe: Recipe) -> list[dict[str, Any]]:
    """Return every value of a recipe, where it is written, and what it belongs to."""
    names = ("key", "value", "where", "owner")
    return [dict(zip(names, one, strict=True)) for one in recipe.origins()]


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
