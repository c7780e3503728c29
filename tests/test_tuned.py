"""A tuned study from its command to its report, in this process: arms are built and certified, and
what their runs came to is given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import write_recipe

from lswt_core.__main__ import main
from lswt_core.ablation import build_arms
from lswt_core.ablation.arms import lay_out_arms
from lswt_core.ablation.build_arms import AblationSpec
from lswt_core.ablation.carry import check_carried
from lswt_core.ablation.certify_runs import NOT_COMPARED
from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.ablation.runs.progress import Job
from lswt_core.ablation.runs.runner import Runner, Workers
from lswt_core.ablation.runs.store import CacheKeys, RunStore
from lswt_core.ablation.study import Ablation
from lswt_core.ablation.tuned import TUNING_SEEDS, Tuner, at_chosen_values, build_from
from lswt_core.ablation.tuning_grid import TunedOption
from lswt_core.distributed.world import World
from lswt_core.errors import UsageError
from lswt_core.recipe import Recipe
from lswt_core.recipe.toml_writer import flat
from lswt_core.registry import Registry

Runs = Callable[[Job], Outcome]
NAMES = [f"{i}.txt" for i in range(12)]
BEST = {"sophia-g": 2e-3, "adamw": 4e-3}  # learning rates; at these the two are level
BUDGETS: dict[str, Any] = {}  # by name of the feed-forward layer


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Costs are measured once, and no source is hashed: neither is what these tests are about."""
    measure: Callable[..., Any] = build_arms.budget

    def remembered(recipe: Recipe, *context: Any) -> Any:
        name = recipe.one("ffn").name
        if name not in BUDGETS:
            BUDGETS[name] = measure(recipe, *context)
        return BUDGETS[name]

    monkeypatch.setattr(build_arms, "budget", remembered)
    monkeypatch.setattr(CacheKeys, "of", lambda self, recipe, backends: recipe.fingerprint())
    for picture in ("plot_differences", "plot_curves"):
        monkeypatch.setattr(f"lswt_core.ablation.report.publish.{picture}", lambda *_: b"")
    if "level_once_tuned" not in request.node.name:
        monkeypatch.setattr("lswt_core.ablation.report.publish.plot_tuning", lambda *_: b"")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("tuned"))
    path.write_text(path.read_text().replace("n_layers = 2", "n_layers = 1"))
    return path


class Tuned:
    """Studies whose runs are given."""

    def __init__(self, recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recipe, self.out, self.monkeypatch = recipe, out, monkeypatch
        self.jobs: dict[str, Job] = {}  # made, by key

    def run(self, runs: Runs, *words: str) -> dict[str, Any]:
        """Make a study; returns its report, with the exit code as "code"."""

        def run(runner: Runner) -> dict[str, Outcome]:
            self.jobs |= {job.key: job for job in runner.jobs}
            return {job.key: runs(job) for job in runner.jobs}

        self.monkeypatch.setattr(Runner, "run", run)
        place = ["--out", str(self.out), "--store", str(self.out / "store")]
        code = main(["ablate", str(self.recipe), "--seeds", "3", *place, *words])
        path = self.out / "report.json"
        report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return report | {"code": code}


@pytest.fixture
def tuned(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tuned:
    return Tuned(recipe, tmp_path / "out", monkeypatch)


def measured(job: Job, loss: float) -> Outcome:
    """A run that finished; half of what it says of documents is noise of its seed."""
    train = job.recipe.train
    noise = 0.001 * math.sin(job.seed + loss)
    documents = [(name, 100 * (loss + noise), 100) for name in NAMES]
    curve = [(train.tokens_per_step, 5.0), (train.total_steps * train.tokens_per_step, loss)]
    return Outcome(job.seed, loss=loss + noise, documents=documents, curve=curve)


def by_rate(job: Job) -> Outcome:
    """Runs with a valley around the best learning rate of each optimizer."""
    values = flat(job.recipe.resolved())
    off = math.log2(values["optimizer.lr"] / BEST[values["optimizer.use"]])
    if off > 3:
        return Outcome(job.seed, "diverged: the loss is not finite", curve=[(64, 5.0)])
    return measured(job, 3.0 + 0.1 * off**2)


@pytest.mark.slow
def test_an_optimizer_whose_default_rate_is_far_off_is_level_once_tuned(
    tuned: Tuned, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--swap", "optimizer=adamw", "--tune", "optimizer.lr=5", "--margin", "0.02"]
    report = tuned.run(by_rate, *words)
    fixed, best = report["comparisons"][0], report["tuned"]["comparisons"][0]
    assert report["code"] == 0 and fixed["verdict"] == "worse" and fixed["delta"] > 1
    assert best["verdict"] == "equivalent" and abs(best["delta"]) < 0.02
    assert fixed.keys() == best.keys()
    told = capsys.readouterr().out
    assert "optimizer=adamw: equivalent (each arm at its own best optimizer.lr)" in told
    assert "At the recipe's values (untuned), optimizer=adamw: worse" in told
    chosen = {one["arm"]: one["chosen"][0] for one in report["tuning"]["arms"]}
    assert chosen["baseline"]["value"] == pytest.approx(2e-3, rel=0.02)
    assert chosen["optimizer=adamw"]["own"] == 3e-4
    assert chosen["optimizer=adamw"]["value"] == pytest.approx(4e-3, rel=0.02)
    assert all(one["bracketed"] and one["sensitivity"] > 0 for one in chosen.values())
    assert (tuned.out / "report-tuning.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("report.md", "report.html"):
        assert "Tuning" in (tuned.out / name).read_text()


def test_without_tuning_every_verdict_is_called_untuned(
    tuned: Tuned, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tuned.run(by_rate, "--swap", "optimizer=adamw")
    told = capsys.readouterr().out
    assert report["tuning"] is report["tuned"] is report["horizons"] is None
    assert "optimizer=adamw: worse (untuned)" in told and "UNTUNED" in told


def test_tuning_has_seeds_and_documents_of_its_own_and_equal_effort(tuned: Tuned) -> None:
    report = tuned.run(by_rate, "--swap", "ffn=gelu", "--tune", "optimizer.lr=3")
    tuning = report["tuning"]
    documents = tuning["documents"]
    assert not set(documents["choosing"]) & set(documents["judging"])
    assert sorted(documents["choosing"] + documents["judging"]) == sorted(NAMES)
    assert report["arms"][0]["evaluated"]["documents"] == len(documents["judging"])
    seeds = {run["seed"] for run in tuning["runs"]}
    assert min(seeds) >= TUNING_SEEDS > max(report["settings"]["seeds"])
    assert [one["runs"] for one in tuning["arms"]] == [7, 7]
    assert len({run["key"] for run in tuning["runs"]}) == len(tuning["runs"]) == 14
    assert {run["key"] for run in tuning["runs"]} <= tuned.jobs.keys()
    assert all(run["loss"] is not None for run in tuning["runs"])


def test_arms_may_differ_in_what_was_tuned_and_in_nothing_else(tuned: Tuned) -> None:
    def runs(job: Job) -> Outcome:
        rate = flat(job.recipe.resolved())["optimizer.lr"]
        best = 1e-3 if flat(job.recipe.resolved())["ffn.use"] == "gelu" else 2e-3
        return measured(job, 3.0 + 0.1 * math.log2(rate / best) ** 2)

    report = tuned.run(runs, "--swap", "ffn=gelu", "--tune", "optimizer.lr=5")
    assert report["certificate"][0]["flaws"] == []
    (certificate,) = report["tuned"]["certificate"]
    assert [flaw["about"] for flaw in certificate["flaws"]] == ["optimizer.lr"]
    assert certificate["status"] == NOT_COMPARED, "these runs leave no records"
    assert {change["key"] for change in certificate["changes"]} == {"ffn.use", "optimizer.lr"}


@pytest.mark.slow
def test_a_rate_that_only_grows_better_is_not_bracketed(
    tuned: Tuned, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(job: Job) -> Outcome:
        return measured(job, 3.0 - math.log2(flat(job.recipe.resolved())["optimizer.lr"]))

    report = tuned.run(runs, "--swap", "ffn=gelu", "--tune", "optimizer.lr=3")
    assert not any(arm["chosen"][0]["bracketed"] for arm in report["tuning"]["arms"])
    assert "OPTIMUM NOT BRACKETED: baseline" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_tuning_that_diverges_is_a_result_and_no_failure(tuned: Tuned) -> None:
    report = tuned.run(by_rate, "--swap", "ffn=gelu", "--tune", "optimizer.lr=3x16")
    assert report["code"] == 0
    failed = [run for run in report["tuning"]["runs"] if run["failure"]]
    assert failed and all(run["loss"] is None for run in failed)


def test_a_run_of_tuning_that_is_lost_is_no_result(
    tuned: Tuned, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(job: Job) -> Outcome:
        if job.seed == TUNING_SEEDS + 1:
            return Outcome.failed(job.seed, "killed by signal 9 (out of memory?)")
        return by_rate(job)

    assert tuned.run(runs, "--swap", "ffn=gelu", "--tune", "optimizer.lr=3")["code"] == 8
    told = capsys.readouterr().err
    assert "baseline optimizer.lr=0.002, seed 1073741825: killed by signal 9" in told
    assert "the same command makes them again" in told


def test_too_few_held_out_documents_end_the_study_after_its_first_run(
    tuned: Tuned, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(job: Job) -> Outcome:
        return Outcome(job.seed, loss=3.0, documents=[("a", 30.0, 10)], curve=[(64, 3.0)])

    assert tuned.run(runs, "--swap", "ffn=gelu", "--tune", "optimizer.lr=3")["code"] == 2
    assert "evaluate.tokens" in capsys.readouterr().err and len(tuned.jobs) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tune", "optimizer.lr=two"], "KEY=POINTS"),
        (["--tune", "model.n_layers=3"], "real numbers alone"),
        (["--tune", "optimizer.speed=3"], "no such value"),
        (["--tune", "schedule.warmup_steps=3"], "real numbers alone"),
        (["--tune", "optimizer.weight_decay=3", "optimizer.weight_decay=0.0"], "give a range"),
        (["--tune", "optimizer.beta1=3"], "optimizer.beta1"),
        (["--tune", "optimizer.lr=3", "--swap", "optimizer.lr=1e-3"], "is about it"),
        (["--tune", "optimizer.lr=3", "train.seed=1073741823"], "smaller train.seed"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_training(
    tuned: Tuned, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuned.run(by_rate, "--swap", "ffn=gelu", *words, "--dry-run")["code"] == 2
    assert told in capsys.readouterr().err and not tuned.jobs


def test_a_file_asks_what_the_command_line_asks(
    tuned: Tuned, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tuned.recipe.with_name("study.toml")
    file.write_text(
        'recipe = "nano.toml"\ntune = ["optimizer.lr=3"]\ntuning_seeds = 2\nhorizons = [0.5]\n'
        'set = ["schedule.use=wsd", "schedule.decay_share=0.5"]\n[swap]\nffn = "gelu"\n'
    )
    assert main(["ablate", str(file), "--dry-run"]) == 0
    asked = capsys.readouterr().out
    assert "tuned: optimizer.lr, 3 points a factor of 2 apart" in asked and "5 runs" in asked
    assert "lengths of training: 6, 12 steps" in asked
    words = ["schedule.use=wsd", "schedule.decay_share=0.5", "--swap", "ffn=gelu"]
    words += ["--tune", "optimizer.lr=3", "--tuning-seeds", "2", "--horizons", "0.5"]
    assert main(["ablate", str(tuned.recipe), *words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("--tune optimizer.lr=3", "--tuning-seeds 2", "--horizons"))


def test_verdicts_at_several_lengths_and_where_they_cross(
    tuned: Tuned, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(job: Job) -> Outcome:
        steps = job.recipe.train.total_steps
        is_arm = flat(job.recipe.resolved())["ffn.use"] == "gelu"
        return measured(job, 3.0 - 0.01 * steps + (0.1 - 0.01 * steps) * is_arm)

    words = ["schedule.use=wsd", "schedule.decay_share=0.5", "--horizons", "0.5,2"]
    report = tuned.run(runs, "--swap", "ffn=gelu", *words)
    at = report["horizons"]["at"]
    assert [(one["multiple"], one["steps"]) for one in at] == [(0.5, 6), (1, 12), (2, 24)]
    assert at[1]["comparisons"][0]["delta"] == report["comparisons"][0]["delta"]
    (crossing,) = report["horizons"]["crossings"]
    assert (crossing["arm"], crossing["from"]) == ("ffn=gelu", 0.5)
    assert "CROSSING: ffn=gelu" in capsys.readouterr().out


# ---------- values that are carried to another size


def built(recipe: Path, *swaps: str, overrides: tuple[str, ...] = ()) -> Ablation:
    """An ablation that is built and certified."""
    arms = lay_out_arms("one-at-a-time", recipe, swaps, overrides, "here")
    option = TunedOption("optimizer.lr", 3, 2.0)
    spec = AblationSpec(
        "s", arms, 2, "none", "d_ffn", 0.01, [], None, "", tune=(option,), tuning_seeds=2
    )
    ablation = Ablation(spec, Registry(), World(device=torch.device("cpu")), lambda _: None)
    ablation.build(Recipe.load(recipe, overrides))
    return ablation


def test_tuned_values_are_carried_to_another_size_and_checked_there(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(best: float) -> Callable[[Runner], dict[str, Outcome]]:
        def run(runner: Runner) -> dict[str, Outcome]:
            outcomes = {}
            for job in runner.jobs:
                off = math.log2(flat(job.recipe.resolved())["optimizer.lr"] / best)
                outcomes[job.key] = measured(job, 3.0 + 0.1 * off**2)
            return outcomes

        return run

    store, workers = RunStore(tmp_path), Workers(1, 1, [], [])
    monkeypatch.setattr(Runner, "run", runs(4e-3))
    tuning = Tuner(built(recipe, "ffn=gelu"), store, workers).tune()
    assert tuning.overrides("ffn=gelu") == ("optimizer.lr=0.004",)
    larger = built(recipe, "ffn=gelu", overrides=("model.d_model=48",))
    carried = build_from(larger, at_chosen_values(larger, tuning))
    assert {arm.recipe.model.d_model for arm in carried.arms} == {48}
    assert {flat(arm.recipe.resolved())["optimizer.lr"] for arm in carried.arms} == {4e-3}
    confirmed = check_carried(larger, tuning, store, workers)
    assert [one.value for one in confirmed] == [2e-3, 8e-3] * 2
    assert all(one.difference is not None and one.difference > 0 for one in confirmed)
    monkeypatch.setattr(Runner, "run", runs(1e-3))
    lower, upper = check_carried(larger, tuning, store, workers)[:2]
    assert lower.difference is not None and lower.difference < 0, "the rate was not to be carried"
    assert upper.difference is not None and upper.difference > 0
    with pytest.raises(UsageError, match="norm=rmsnorm"):
        at_chosen_values(built(recipe, "norm=rmsnorm"), tuning)


def test_another_tuning_is_another_question(recipe: Path) -> None:
    spec = built(recipe, "ffn=gelu").spec
    others = [
        spec._replace(tune=()),
        spec._replace(tune=(TunedOption("optimizer.lr", 5, 2.0),)),
        spec._replace(tuning_seeds=3),
        spec._replace(horizons=(0.5,)),
    ]
    assert len({one.fingerprint() for one in (spec, *others)}) == 5
