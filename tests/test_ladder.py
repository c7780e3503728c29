"""Ablations on a ladder of sizes: its file, its arms, and its report for planted losses."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import environment, run
from runs import write_recipe

from lswt_core.__main__ import build_parser, main
from lswt_core.ablation import build_arms
from lswt_core.ablation.ladder import LadderAblation
from lswt_core.ablation.ladder_file import read_ladder
from lswt_core.ablation.report import publish
from lswt_core.ablation.report.ladder_plot import plot_ladder
from lswt_core.ablation.report.ladder_report import make_ladder_report
from lswt_core.ablation.report.ladder_text import LADDER_PICTURE
from lswt_core.ablation.report.page import render_markdown, render_page, render_terminal
from lswt_core.ablation.report.publish import publish_ladder
from lswt_core.ablation.run_ladder import LadderRuns, run_ladder
from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.ablation.runs.progress import Job
from lswt_core.ablation.runs.runner import Runner, RunsStopped, Workers
from lswt_core.ablation.runs.store import RunStore
from lswt_core.cli.ablate import planned_ablation
from lswt_core.cli.ablate_ladder import find_ladder
from lswt_core.distributed.world import World
from lswt_core.errors import RecipeError
from lswt_core.model.build import build_model
from lswt_core.model.parameters import count_parameters
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

Losses = Callable[[str, int, int], float]  # loss(arm, rung, seed)
Report = Callable[[Losses], dict[str, Any]]

SIZES = ("small", "middle", "large")
LADDER = """
[rate]
key = "optimizer.lr"
exponent = -0.5
at = "large"
[rung.small]
set = ["model.d_model=16"]
tokens_per_parameter = 0.5
[rung.middle]
set = ["model.d_model=32"]
tokens_per_parameter = 0.5
[rung.large]
set = ["model.d_model=64"]
steps = 1000
"""
TWO = LADDER.replace('[rung.middle]\nset = ["model.d_model=32"]\ntokens_per_parameter = 0.5\n', "")
GELU = ("--swap", "ffn=gelu")


@pytest.fixture(scope="module", autouse=True)
def quick_budgets() -> Iterator[None]:
    """Six FLOPs per parameter and token: to count them takes most of what it takes to build arms,
    and nothing here depends on them but the order of sizes.
    """

    def estimate(recipe: Recipe, registry: Registry, world: World) -> Any:
        built = build_model(recipe, registry, device=world.device, dtype=torch.float32)
        counted = count_parameters(built.loss)
        return SimpleNamespace(
            parameters=counted["by_component"],
            trainable=counted["trainable_by_component"],
            total=counted["total"],
            flops_per_token=6 * counted["total"],
            unknown={},
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_arms, "budget", estimate)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("ladder"))
    path.write_text(
        path.read_text()
        .replace('"sophia-g"', '"adamw"')
        .replace("hessian_update_interval = 3\n", "")
        .replace("n_layers = 2", "n_layers = 1")
    )
    path.with_name("two.toml").write_text(TWO)
    return path


def built(recipe: Path, ladder: str, *words: str) -> LadderAblation:
    """The arms at every rung."""
    file = recipe.with_name("other.toml")
    file.write_text(ladder)
    arguments = build_parser().parse_args(["ablate", str(recipe), *words, *GELU])
    planned, _ = planned_ablation(arguments)
    ablation = LadderAblation(
        planned.spec, read_ladder(str(file)), planned.registry, planned.world, print
    )
    ablation.build()
    return ablation


@pytest.fixture(scope="module")
def ladder(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> LadderRuns:
    """The runs of three rungs."""
    store = RunStore(tmp_path_factory.mktemp("store"))
    return LadderRuns(built(recipe, LADDER, "--seeds", "4"), store, Workers(1, 1, [], []))


# ---------- the file


@pytest.mark.parametrize(
    "text, line, why",
    [
        ("[rung.a]\nsteps = 3\n", "1", "2 rungs at least"),
        ("[rung.a]\nsteps = 3\nwidth = 3\n[rung.b]\n", "3", "set, tokens_per_parameter, steps"),
        ("[rung.a]\nsteps = 3\ntokens_per_parameter = 2.0\n[rung.b]\n", "1", "leave one of them"),
        ("[rung.a]\n[rung.b]\n[rate]\nexponent = -0.3\nat = 'c'\n", "5", "use one of: a, b"),
        ("[rung.a]\n[rung.b]\n[rate]\nexponent = 'x'\nat = 'a'\n", "4", "number"),
        ("[rung.a]\nrecipe = 'none'\n[rung.b]\n", "", "none"),
    ],
)
def test_a_ladder_that_is_wrong_says_where_and_why(
    tmp_path: Path, text: str, line: str, why: str
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_ladder(str(file))
    assert f"wrong.toml:{line}" in str(caught.value) or not line
    assert why in str(caught.value)


@pytest.mark.parametrize("name", ["nano", "ladders/family", "family.toml"])
def test_packaged_ladders_are_found_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ladder = read_ladder(name)
    assert len(ladder.rungs) == 3 and ladder.recipe in ("lswt:quickstart", "lswt:tiny")


# ---------- the arms


def test_every_rung_has_its_size_length_and_rate(
    ladder: LadderRuns,
) -> None:
    ablation = ladder.ablation
    small, middle, large = ablation.rungs
    for one in (small, middle):
        train = one.ablation.arms[0].recipe.train
        assert train.steps == round(0.5 * one.parameters / train.tokens_per_step)
    assert large.ablation.arms[0].recipe.train.steps == 1000
    rates = [one.ablation.arms[1].recipe.one("optimizer").options["lr"] for one in ablation.rungs]
    assert rates[0] == pytest.approx(rates[2] * (small.parameters / large.parameters) ** -0.5)
    widths = [[arm.recipe.model.d_model for arm in one.ablation.arms] for one in ablation.rungs]
    assert widths == [[16, 16], [32, 32], [64, 64]]
    assert "embedding" not in small.ablation.arms[0].spec.overrides
    total = small.ablation.arms[0].budget
    assert small.parameters == total.total - total.parameters["embedding"]


@pytest.mark.parametrize(
    "text, words, why",
    [
        (LADDER, ("model.d_model=16",), '"middle" is no larger than "small"'),
        pytest.param(
            "[rung.a]\nsteps = 900\n[rung.b]\nset=['model.d_model=64']\nsteps = 1\n",
            (),
            "no more compute",
            marks=pytest.mark.slow,
        ),
        (LADDER.replace("optimizer.lr", "optimizer.speed"), (), "has no such number"),
        ("[rung.a]\nset=['model.d_mode=3']\n[rung.b]\n", (), "model.d_mode"),
    ],
)
def test_rungs_that_make_no_ladder_are_refused(
    recipe: Path, text: str, words: tuple[str, ...], why: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        built(recipe, text, *words)
    assert why in str(caught.value)


def test_arms_that_are_recipes_have_no_size_where_rungs_are(recipe: Path) -> None:
    text = f"[rung.a]\nrecipe = '{recipe}'\n[rung.b]\nset = ['model.d_model=32']\n"
    arm = recipe.with_name("arm.toml")
    arm.write_text('extends = "nano.toml"\n[ffn]\nuse = "gelu"\n')
    with pytest.raises(RecipeError, match="both are recipes"):
        built(recipe, text, "--arm", str(arm))


def test_a_ladder_has_a_baseline_of_its_own(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe.with_name("with-recipe.toml")
    file.write_text('recipe = "nano.toml"\n' + TWO)
    words = ["ablate", "--ladder", str(file), *GELU, "train.steps=5", "--dry-run"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("5 steps of") == 2, "the command's own words come after the rungs'"
    given = build_parser().parse_args(shlex.split(printed.split("python -m lswt_core ")[1]))
    assert find_ladder(given) == read_ladder(str(file)) and given.recipe == recipe
    assert main(["ablate", *GELU, "--dry-run"]) == 2
    assert "name one" in capsys.readouterr().err


# ---------- the report


@pytest.fixture
def report(ladder: LadderRuns) -> Report:
    """``report(losses)``: that of a ladder whose runs have these losses."""

    def of(losses: Losses) -> dict[str, Any]:
        return make_ladder_report(ladder.collect(run_all(ladder.ordered(), losses)))

    return of


def run_all(jobs: list[Job], losses: Losses, at_once: int = 1) -> dict[str, Outcome]:
    outcomes = {}
    for job in jobs:
        arm, _, rung = job.arm.rpartition(" at ")
        loss = losses(arm, SIZES.index(rung), job.seed)
        train = job.recipe.train
        tokens = train.total_steps * train.tokens_per_step
        outcome = Outcome.failed(job.seed, "diverged: planted")
        if not math.isnan(loss):
            documents = [("a", 60 * loss, 60), ("b", 40 * loss, 40)]
            outcome = Outcome(job.seed, None, loss, documents, [(tokens, loss)])
            outcome = replace(outcome, tokens_per_second=1000.0, runs_at_once=at_once)
        if math.isfinite(loss) or math.isnan(loss):
            outcomes[job.key] = outcome
    if len(outcomes) < len(jobs):
        raise RunsStopped(outcomes, len(jobs))
    return outcomes


def planted(*differences: float) -> Losses:
    """Losses whose differences by rung are these, up to noise between seeds."""

    def loss(arm: str, rung: int, seed: int) -> float:
        noise = random.Random(f"{seed} {rung}").gauss(0, 0.01)
        own = random.Random(f"{seed} {rung} {arm}").gauss(0, 0.001)
        difference = 0.0 if arm == "baseline" else differences[rung]
        return (5.0, 4.35, 3.9)[rung] + noise + own + difference

    return loss


def only_arm(report: dict[str, Any]) -> dict[str, Any]:
    [arm] = report["ladder"]["arms"]
    return dict(arm)


@pytest.mark.parametrize(
    "differences, verdict, why",
    [
        ((-0.06, -0.05, -0.043), "persists", "and, by the line through all, at the next one"),
        ((0.06, 0.05, 0.043), "persists", "and, by the line through all, at the next one"),
        ((-0.06, -0.02, 0.0), "shrinks", "is less at larger sizes"),
        ((0.06, 0.02, 0.0), "shrinks", "worth, its own cost aside, is less at larger sizes"),
        ((0.0, -0.03, -0.08), "grows", "its difference in nats is larger at larger sizes"),
        ((0.0, 0.0, 0.0), "equivalent", "at every size"),
        ((0.06, 0.02, -0.05), "changes sign", "worse at the smallest size, better at the largest"),
        ((-0.05, 0.02, -0.0112), "not resolved", "at the largest size it is better, maybe by less"),
    ],
)
def test_planted_differences_have_their_verdict(
    report: Report, differences: tuple[float, ...], verdict: str, why: str
) -> None:
    found = report(planted(*differences))
    arm = only_arm(found)
    assert arm["verdict"] == verdict and why in arm["why"]
    assert [one["delta"] for one in arm["comparisons"]] == pytest.approx(differences, abs=0.003)
    top = found["ladder"]["rungs"][-1]["report"]
    assert found["comparisons"] == top["comparisons"] == [arm["comparisons"][-1]]
    cost = top["arms"][1]["training_flops"] / top["arms"][0]["training_flops"]
    low, high = (end * cost for end in arm["speedup"]["compute"]["ci95"])
    if differences[-1] == 0:
        assert low < 1 < high, "what it saves is its own lower cost alone"
    else:
        assert (low > 1) == (differences[-1] < 0) and (high < 1) == (differences[-1] > 0)
    lead = render_terminal(found).partition("\n\n")[0]
    if verdict == "not resolved":
        at_top = "better, maybe by less than the margin"
        assert f"ffn=gelu: at large {at_top}; beyond it not resolved (untuned); " in lead
    else:
        assert f"ffn=gelu: {verdict} (untuned); {arm['why']}." in lead
    assert "Based on 4 seeds at 3 sizes, small to large" in lead and "losses are on" in lead
    l_inf = [arm["law"]["l_inf"]["value"], *(one["l_inf"] for one in arm["speedup"]["if_l_inf"])]
    assert ("irreducible" in lead) == (f"loss of 0 to {max(l_inf):.3g} nats, which 3 sizes" in lead)
    assert "irreducible" in lead or verdict != "persists"


SHOWN = re.compile(r"predicted as (\S+) \(95 % interval (\S+) to (\S+)\), and is (\S+), OUTSIDE;")


def test_an_arm_that_is_better_at_small_sizes_only_would_have_been_missed_by_them(
    report: Report,
) -> None:
    found = report(planted(-0.06, -0.05, 0.04))
    before = only_arm(found)["back_test"]
    assert before["difference"]["covered"] is False and before["same_verdict"] is False
    text = render_markdown(found, [LADDER_PICTURE])
    [alt] = re.findall(r"!\[(.*)\]\(report-ladder\.png\)", text)
    assert re.search(r"intervals\. ffn=gelu: changes sign, -0\.0\d+ at small, .* at large\.$", alt)
    [numbers] = SHOWN.findall(text)
    difference, low, high, observed = map(float, numbers)
    assert difference == pytest.approx(before["difference"]["predicted"], abs=1e-4)
    assert observed == pytest.approx(0.04, abs=0.003) and not low <= observed <= high
    off_low, off_high = before["difference"]["ci95"]
    assert (low - observed, high - observed) == pytest.approx((off_low, off_high), abs=2e-4)


@pytest.mark.parametrize("at_once", [1, 2])
def test_time_is_not_told_of_runs_that_shared_the_machine(ladder: LadderRuns, at_once: int) -> None:
    outcomes = run_all(ladder.ordered(), planted(-0.06, -0.05, -0.043), at_once)
    found = make_ladder_report(ladder.collect(outcomes))
    assert ("of time as measured here" in render_terminal(found)) == (at_once == 1)


def test_noise_alone_resolves_nothing(report: Report) -> None:
    def noisy(arm: str, rung: int, seed: int) -> float:
        own = random.Random(f"{seed} {rung} {arm} 2").gauss(0, 0.03)
        return (5.0, 4.35, 3.9)[rung] + own

    arm = only_arm(report(noisy))
    assert arm["verdict"] == "not resolved"
    low, high = arm["speedup"]["compute"]["ci95"]
    assert low < 1 < high


def test_an_arm_that_fails_at_one_size_is_not_said_to_persist(report: Report) -> None:
    better = planted(-0.06, -0.05, -0.043)

    def failing(arm: str, rung: int, seed: int) -> float:
        fails = arm != "baseline" and rung == 2 and seed < 2
        return math.nan if fails else better(arm, rung, seed)

    arm = only_arm(report(failing))
    assert arm["verdict"] == "not resolved" and "2 of its runs" in arm["why"]
    assert arm["seeds"] == 2 and arm["speedup"]["compute"]["value"] > 1


def test_an_arm_that_never_finishes_at_one_size_has_no_speedup(report: Report) -> None:
    better = planted(-0.06, -0.05, -0.043)

    def failing(arm: str, rung: int, seed: int) -> float:
        return math.nan if arm != "baseline" and rung == 1 else better(arm, rung, seed)

    found = report(failing)
    arm = only_arm(found)
    assert arm["speedup"] is None and "no seed" in arm["unknown"]["speedup"]
    assert "no seed" in "".join(render_page(found, {}))
    assert "no seed" in render_terminal(found)


def test_losses_that_follow_no_law_have_no_speedup_and_a_report(report: Report) -> None:
    def rising(arm: str, rung: int, seed: int) -> float:
        return 3.0 + rung + seed / 1000 + (0.0 if arm == "baseline" else 0.1)

    found = report(rising)
    assert only_arm(found)["speedup"]["compute"]["value"] is None
    assert only_arm(found)["verdict"] == "not resolved"
    assert "unknown" in render_markdown(found)
    json.dumps(found, allow_nan=False)


def test_one_seed_has_no_trend(report: Report) -> None:
    def lonely(arm: str, rung: int, seed: int) -> float:
        return planted(-0.06, -0.05, -0.043)(arm, rung, seed) if seed == 0 else math.nan

    arm = only_arm(report(lonely))
    assert arm["verdict"] == "not resolved" and arm["speedup"]["compute"]["ci95"] is None


def test_a_ladder_that_was_stopped_ends_as_if_it_had_not_been(
    ladder: LadderRuns, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = planted(-0.06, -0.05, -0.043)
    monkeypatch.setattr(publish, "draw", lambda *_: None)

    def stopped(arm: str, rung: int, seed: int) -> float:
        return math.inf if rung == 0 and seed > 0 else losses(arm, rung, seed)

    with pytest.raises(RunsStopped) as caught:
        run_all(ladder.ordered(), stopped)
    publish_ladder(ladder.collect(caught.value.outcomes), tmp_path)
    partial = only_arm(json.loads((tmp_path / "report.json").read_text()))
    assert partial["verdict"] == "not finished" and partial["speedup"] is None
    names = ("report.json", "report.md", "report.html")
    contents = []
    for _ in range(2):
        publish_ladder(ladder.collect(run_all(ladder.ordered(), losses)), tmp_path)
        contents.append([(tmp_path / name).read_bytes() for name in names])
        for name in names:
            (tmp_path / name).unlink()
    assert contents[0] == contents[1]


def test_the_command_makes_the_runs_and_writes_the_report(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "draw", lambda *_: None)

    def losses(arm: str, rung: int, seed: int) -> float:
        return math.nan if (arm, rung) == ("ffn=gelu", 2) else 4.0 - rung

    monkeypatch.setattr(Runner, "run", lambda self: run_all(self.jobs, losses))
    study = recipe.with_name("study.toml")
    study.write_text('recipe = "nano.toml"\nladder = "two.toml"\nseeds = 1\nswap.ffn = "gelu"\n')
    words = ["ablate", str(study), "--out", str(tmp_path), "--store", str(tmp_path / "store")]
    assert main(words) == 8, "a run failed"
    found = json.loads((tmp_path / "report.json").read_text())
    assert [one["name"] for one in found["ladder"]["rungs"]] == ["small", "large"]
    for name in ("report.md", "report.html"):
        assert "Does it hold as models grow?" in (tmp_path / name).read_text()


def tuning_losses(best: dict[str, float]) -> Callable[[Runner], dict[str, Outcome]]:
    """Runs that lose by their rates: 0.3 nats per factor of e from each arm's best one."""

    def run_all_of(runner: Runner) -> dict[str, Outcome]:
        outcomes = {}
        for job in runner.jobs:
            rate = job.recipe.one("optimizer").options["lr"]
            arm = job.arm.partition(" ")[0]
            loss = 9 - math.log10(job.recipe.model.d_model) + 0.3 * abs(math.log(rate / best[arm]))
            documents = [(str(number), 100 * loss, 100) for number in range(9)]
            tokens = job.recipe.train.total_steps * job.recipe.train.tokens_per_step
            outcomes[job.key] = Outcome(job.seed, None, loss, documents, [(tokens, loss)])
        return outcomes

    return run_all_of


@pytest.mark.parametrize("carried", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_arms_are_tuned_at_every_rung_or_carried_up_under_mup(
    recipe: Path, tmp_path: Path, carried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["parametrisation.use=mup"] if carried else []
    words += ["--tune", "optimizer.lr=3", "--tuning-seeds", "1", "--seeds", "1"]
    ablation = built(recipe, TWO, *words)
    best = {"baseline": 0.004, "ffn=gelu": 0.016}
    runs = tuning_losses(best)
    waves: list[list[str]] = []

    def run_and_note(runner: Runner) -> dict[str, Outcome]:
        waves.append([job.arm for job in runner.jobs])
        return runs(runner)

    monkeypatch.setattr(Runner, "run", run_and_note)
    study = run_ladder(ablation, RunStore(tmp_path), Workers(1, 1, [], []))
    found = make_ladder_report(study)
    chosen = [found["ladder"]["rungs"][rung]["report"]["tuning"]["arms"] for rung in (0, 1)]
    assert (chosen[0] == chosen[1]) == carried == (found["ladder"]["carried"] is not None)
    for arms in chosen:
        for arm in arms:
            [one] = arm["chosen"]
            assert abs(math.log(one["value"] / best[arm["arm"]])) < 0.05
            assert one["best_point"] == min(
                (point["value"] for point in one["curve"]),
                key=lambda value, arm=arm: abs(math.log(value / best[arm["arm"]])),
            )
    if carried:
        assert all(one["difference"] >= -0.2 for one in found["ladder"]["carried"])
        assert "carried up" in render_markdown(found)
    else:
        assert any(" at small" in str(wave) and " at large" in str(wave) for wave in waves)
    assert abs(only_arm(found)["comparisons"][0]["delta"]) < 0.3, "each at its own best"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_ladder_that_is_killed_goes_on_and_reports_what_its_store_has(
    recipe: Path, tmp_path: Path
) -> None:
    words = [str(recipe), "train.steps=4", *GELU, "--ladder", str(recipe.with_name("two.toml"))]
    words += ["--seeds", "1", "--jobs", "2", "--out", "out", "--store", "store"]
    command, cache = ["lswt_core", "ablate", *words], {"LSWT_CACHE_DIR": recipe.parent / "cache"}
    silent = {"env": environment(**cache), "stdout": subprocess.DEVNULL}
    killed = subprocess.Popen([sys.executable, "-m", *command], cwd=tmp_path, **silent)
    while not any(tmp_path.glob("store/*/outcome.json")):
        assert killed.poll() is None
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    reports = []
    for _ in range(2):  # made to its end, and found in the store
        done = run(*command, cwd=tmp_path, **cache)
        assert done.returncode == 0, done.stderr
        reports.append((tmp_path / "out" / "report.json").read_bytes())
    assert reports[0] == reports[1] and len(list(tmp_path.glob("store/*/outcome.json"))) == 4


@pytest.mark.slow
def test_the_picture_of_a_ladder_is_drawn(report: Report) -> None:
    assert plot_ladder(report(planted(-0.06, -0.02, 0.0))).startswith(b"\x89PNG")
