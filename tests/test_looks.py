"""Verdicts at several looks: valid however seeds are added, and remembered by the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import write_shallow_recipe
from scipy import special

from lswt_core.__main__ import main
from lswt_core.ablation.report.compare import make_report
from lswt_core.ablation.report.page import render_markdown
from lswt_core.ablation.report.plots import MARKERS
from lswt_core.ablation.report.verdict import (
    EQUIVALENT,
    SMALL,
    SMALL_BETTER,
    SMALL_WORSE,
    UNRESOLVED,
)
from lswt_core.ablation.runs.comparison_records import (
    Comparison,
    ComparisonRecords,
    create_directory,
)
from lswt_core.ablation.runs.outcome import ArmResult, Looks, Outcome, Study
from lswt_core.ablation.runs.progress import Job
from lswt_core.ablation.runs.runner import Runner
from lswt_core.ablation.runs.store import CacheKeys
from lswt_core.ablation.statistics.looks import MAXIMUM, nominal_level, spend, valid_p
from lswt_core.ablation.statistics.paired_runs import paired_test, seeds_needed
from lswt_core.budget import Budget, budget
from lswt_core.errors import UsageError

pytestmark = pytest.mark.usefixtures("budgets_once")
Noise = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
NOISES: dict[str, Noise] = {
    "normal": lambda draw, shape: draw.normal(size=shape),
    "skewed": lambda draw, shape: draw.exponential(size=shape),
    "bimodal": lambda draw, shape: draw.choice([-1.0, 1.0], shape) + draw.normal(0, 0.3, shape),
    "heavy-tailed": lambda draw, shape: draw.standard_t(2, size=shape),
}


# ---------- boundaries


def t_statistics(values: np.ndarray) -> np.ndarray:
    """Of the first 2, 3, ... values of every row [rows, values - 1]."""
    count = np.arange(1, values.shape[1] + 1)
    sums, squares = values.cumsum(1), (values**2).cumsum(1)
    variance = (squares - sums**2 / count)[:, 1:] / (count[1:] - 1)
    return sums[:, 1:] / np.sqrt(count[1:] * variance)


SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in [((5,), 1), ((2,), 2), ((4, 5), 2)]]


@pytest.mark.parametrize(("declared", "sides"), [((5,), 2), ((5, 10, 20), 1), *SLOW])
def test_looking_after_every_pair_spends_what_was_planned(
    declared: tuple[int, ...], sides: int
) -> None:
    draws = 20_000
    t = t_statistics(np.random.default_rng(0).normal(size=(draws, MAXIMUM)))
    crossed = np.zeros(draws, dtype=bool)
    spent = 0.0
    for pairs in range(declared[0], MAXIMUM + 1):
        spent += 0.05 * spend(declared, pairs)
        level = nominal_level(0.05, declared, pairs, sides)
        seen = t[:, pairs - 2] if sides == 1 else np.abs(t[:, pairs - 2])
        crossed |= seen > -special.stdtrit(pairs - 1, level / sides)
        assert crossed.mean() == pytest.approx(spent, abs=4 * np.sqrt(0.05 / draws))
    assert spent == pytest.approx(0.05)


def test_one_declared_look_costs_a_fifth_of_alpha_and_is_exact() -> None:
    assert nominal_level(0.05, (5,), 5) == pytest.approx(0.04)
    assert valid_p(0.02, (5,), 5) == pytest.approx(0.025)
    assert nominal_level(0.05, (500,), 500) == pytest.approx(0.04)


@pytest.mark.parametrize("declared", [(5,), (5, 10, 20), (50, 100)])
def test_p_values_and_levels_are_inverse_and_grow_together(declared: tuple[int, ...]) -> None:
    for pairs in (declared[0], declared[-1]):
        alphas = np.geomspace(1e-9, 0.3, 30)
        levels = [nominal_level(alpha, declared, pairs) for alpha in alphas]
        assert levels == sorted(levels) and levels[0] > 0 and levels[-1] < 0.3
        assert [valid_p(level, declared, pairs) for level in levels] == pytest.approx(list(alphas))


@pytest.mark.parametrize("pairs", [2, 4, 51, 500])
def test_there_is_nothing_to_spend_before_the_first_look_and_after_the_last(pairs: int) -> None:
    assert nominal_level(0.05, (5,), pairs) == 0.0 and valid_p(1e-9, (5,), pairs) == 1.0


# ---------- verdicts


def arm(name: str, losses: Sequence[float]) -> ArmResult:
    outcomes = [Outcome(seed, loss=float(loss)) for seed, loss in enumerate(losses)]
    return ArmResult(name, name, [], 1000, 1000, 6000, 1280, {}, [], outcomes)


def study(
    baseline: Sequence[float],
    *losses: Sequence[float],
    margin: float = 0.5,
    looks: tuple[int, ...] = (),
) -> Study:
    arms = [arm("baseline", baseline), *(arm(f"x{i}", one) for i, one in enumerate(losses))]
    settings = {
        "seeds": list(range(len(baseline))),
        "confidence": 0.95,
        "margin": margin,
        "steps": 20,
        "tokens": 1280,
    }
    taken = {one.name: Looks(looks, looks[:1]) for one in arms if looks}
    return Study("study", arms, settings, [], {}, "", "ablate", taken)


@pytest.fixture
def without_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of a report's time."""
    monkeypatch.setattr("lswt_core.ablation.report.compare.add_plans", plan_nothing)


def plan_nothing(comparisons: list[dict[str, Any]], *_: object) -> None:
    for one in comparisons:
        one |= {"power": None, "margin_seeds": None}


def verdict_at(losses: np.ndarray, pairs: int, margin: float) -> dict[str, Any]:
    report = make_report(study(*losses[:, :pairs], margin=margin, looks=(5,)))
    one: dict[str, Any] = report["comparisons"][0]
    return one


def claims(
    noise: Noise, delta: float, margin: float, looks: Sequence[int], draws: int
) -> dict[str, float]:
    """The share of studies that gave each verdict at any look, by name; "resolved": any of the
    three that find a difference.
    """
    draw = np.random.default_rng(7)
    given: list[set[str]] = []
    for _ in range(draws):
        losses = noise(draw, (2, looks[-1]))
        losses[1] += delta
        given.append({verdict_at(losses, pairs, margin)["verdict"] for pairs in looks})
    shares = {name: float(np.mean([name in one for one in given])) for name in MARKERS}
    found = [bool(one & {"better", "worse", *SMALL}) for one in given]
    return {**shares, "resolved": float(np.mean(found))}


FEW = (5, 6, 7, 8, 10, 12, 16, 24, 36, 50)


@pytest.mark.usefixtures("without_plans")
@pytest.mark.parametrize(
    ("looks", "draws"), [(FEW, 60), pytest.param(range(5, 51), 200, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("noise", NOISES)
def test_adding_seeds_until_something_is_resolved_finds_nothing(
    noise: str, looks: Sequence[int], draws: int
) -> None:
    share = claims(NOISES[noise], 0.0, 0.02, looks, draws)
    assert share["resolved"] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / draws)


@pytest.mark.slow
@pytest.mark.usefixtures("without_plans")
def test_adding_seeds_until_arms_are_equivalent_rarely_errs_at_the_margin() -> None:
    draws = 1000
    share = claims(NOISES["normal"], 0.8, 0.8, FEW, draws)
    assert share[EQUIVALENT] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / draws)


@pytest.mark.usefixtures("without_plans")
def test_intervals_of_one_declared_look_and_of_all_looks() -> None:
    draw, draws = np.random.default_rng(1), 200
    at_first = at_all = 0
    for _ in range(draws):
        losses = draw.normal(size=(2, 16))
        losses[1] += 1.0
        covered = []
        for pairs in (5, 6, 8, 16):
            low, high = verdict_at(losses, pairs, 0.5)["ci95"]
            covered.append(low <= 1.0 <= high)
        at_first, at_all = at_first + covered[0], at_all + all(covered)
    assert 0.93 <= at_first / draws <= 0.98 and at_all / draws >= 0.92


BASE = np.array([3.0, 3.1, 3.2, 3.05, 3.1])
NOISE = np.array([0.001, -0.001, 0.002, -0.002, 0.0])


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        (-0.1, "better"),
        (0.1, "worse"),
        (-0.0105, SMALL_BETTER),
        (0.0105, SMALL_WORSE),
        (0.006, EQUIVALENT),
        (0.0, EQUIVALENT),
    ],
)
def test_better_and_worse_are_clear_of_the_margin(delta: float, expected: str) -> None:
    (one,) = make_report(study(BASE, BASE + delta + NOISE, margin=0.01))["comparisons"]
    assert one["verdict"] == expected and expected in MARKERS
    if expected in SMALL:
        assert expected.startswith("better" if delta < 0 else "worse")
        assert one["ci95"][0] * one["ci95"][1] > 0 and min(map(abs, one["ci95"])) < 0.01


def test_two_pairs_that_agree_are_no_evidence() -> None:
    losses = np.array([3.0, 3.1])
    (one,) = make_report(study(losses, losses + np.array([0.5, 0.5001]), margin=0.01))[
        "comparisons"
    ]
    assert one["p_holm"] < 0.01 and one["verdict"] == UNRESOLVED and "3 pairs" in one["why"]


def test_plans_know_holm_and_what_is_not_known() -> None:
    clear, unclear = BASE - 0.1 + 9 * NOISE, BASE - 0.01 + 9 * NOISE
    (alone,) = make_report(study(BASE, clear, margin=0.01))["comparisons"]
    one, two = make_report(study(BASE, clear, unclear, margin=0.01))["comparisons"]
    assert alone["verdict"] == one["verdict"] == "better" and two["verdict"] == UNRESOLVED
    assert one["alpha"] == alone["alpha"] / 2 and two["alpha"] == alone["alpha"] == 0.05
    assert one["margin_seeds"] > alone["margin_seeds"], "Holm's level is lower with two arms"
    assert one["seeds_needed"] == seeds_needed(one["delta"], one["std"], 0.8 * 0.025)
    assert one["seeds_needed"] <= one["seeds_needed_at_most"] < one["margin_seeds"]
    assert two["seeds_needed"] is two["seeds_needed_at_most"] is None, "its interval contains 0"
    for key in ("margin_seeds", "equivalence_seeds"):
        assert two[key] < two[f"{key}_at_most"]


def test_a_text_of_few_documents_is_warned_of() -> None:
    def report(documents: int, largest: int) -> dict[str, Any]:
        tokens = [largest] + [100] * (documents - 1)
        draw = np.random.default_rng(0)

        def measured(name: str) -> ArmResult:
            outcomes = []
            for seed in range(5):
                text = [(f"{i}.py", draw.normal(3, 0.1) * n, n) for i, n in enumerate(tokens)]
                loss = sum(nll for _, nll, _ in text) / sum(tokens)
                outcomes.append(Outcome(seed, loss=loss, documents=text))
            return replace(arm(name, BASE), outcomes=outcomes)

        one = study(BASE, BASE, margin=0.01)
        return make_report(replace(one, arms=[measured("baseline"), measured("x0")]))

    clean = report(30, 100)
    assert clean["text"]["warnings"] == [] and clean["text"]["documents"] == 30
    assert clean["comparisons"][0]["kind_of_text_ci95"] and "this kind" in render_markdown(clean)
    few, large = report(9, 100), report(30, 500)
    assert "fewer than 30" in few["text"]["warnings"][0]
    assert few["comparisons"][0]["kind_of_text_ci95"] is None
    assert large["text"]["largest"] == {"name": "0.py", "share": pytest.approx(500 / 3400)}
    assert "0.py, has 15% of the evaluated tokens" in render_markdown(large)


# ---------- what the store remembers


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shallow_recipe(tmp_path_factory.mktemp("looks"))


@pytest.fixture
def ablate(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """``ablate(delta, words)``: an ablation whose arms differ by ``delta``; its report."""
    for picture in ("plot_differences", "plot_curves"):
        monkeypatch.setattr(f"lswt_core.ablation.report.publish.{picture}", lambda *_: b"")
    monkeypatch.setattr(CacheKeys, "of", lambda self, recipe, backends: recipe.fingerprint())
    monkeypatch.setattr("lswt_core.ablation.build_arms.budget", same_budget)

    def run(delta: float, *words: str) -> dict[str, Any]:
        noise = np.random.default_rng(0).normal(0, 0.01, 60)

        def made(job: Job) -> Outcome:
            arm = 0.0 if job.arm == "baseline" else delta + noise[job.seed]
            return Outcome(job.seed, loss=3.0 + job.seed / 10 + arm)

        monkeypatch.setattr(Runner, "run", lambda self: {job.key: made(job) for job in self.jobs})
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        places = ["--store", str(tmp_path / "store"), "--out", str(out)]
        assert main(["ablate", str(recipe), *words, *places]) == 0
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        assert "NaN" not in render_markdown(report)
        return report

    return run


@cache
def a_budget() -> list[Budget]:
    return []


def same_budget(*arguments: Any) -> Budget:
    """The budget of the first recipe: costs are not what is tested here."""
    if not a_budget():
        a_budget().append(budget(*arguments))
    return a_budget()[0]


GELU = ("--swap", "ffn=gelu")


def test_looks_are_remembered_wherever_the_report_goes(
    ablate: Callable[..., dict[str, Any]],
) -> None:
    one = ablate(0.02, *GELU, "--seeds", "4")["comparisons"][0]
    assert one["looks"] == {"declared": [4], "taken": [4], "last": 50}
    (more,) = ablate(0.02, *GELU, "--seeds", "7")["comparisons"]
    assert more["looks"] == {"declared": [4], "taken": [4, 7], "last": 50}
    assert more["p_looks"] > 2 * more["p"] and more["level"] < 0.01
    assert more["p"] == pytest.approx(paired_test(more["values"]).p)
    (fewer,) = ablate(0.02, *GELU, "--seeds", "3")["comparisons"]
    assert fewer["verdict"] == UNRESOLVED and "declared at 4 pairs" in fewer["why"]
    other = ablate(0.02, *GELU, "--seeds", "7", "--margin", "0.02")
    assert other["comparisons"][0]["looks"]["declared"] == [7]
    assert other["family"]["size"] == 2, "another margin is another question"


ASKED = Comparison("baseline", "arm", "x", "study", 0, 0.01, 0.95)


def test_a_declaration_stands_once_there_are_data(tmp_path: Path) -> None:
    records = ComparisonRecords(tmp_path)
    records.declare(ASKED, [5], is_seen=False)
    records.declare(ASKED, [8], is_seen=False)
    assert records.looks(ASKED) == ((8,), ())
    records.declare(ASKED, [20], is_seen=True)
    records.take_look(ASKED, 8, [0.1] * 7)
    records.declare(ASKED, [20], is_seen=False)
    assert records.looks(ASKED) == ((7, 8), (7,)), "one run failed: a look at fewer pairs"
    records.take_look(ASKED, 8, [0.1] * 8)
    records.take_look(ASKED, 12, [0.1] * 12)
    assert records.looks(ASKED) == ((7, 8), (7, 8, 12))
    (other,) = records.others([ASKED._replace(arm="other")])
    assert (other.arm, len(other.differences)) == ("x", 12) and not records.others([ASKED])


def test_two_studies_that_declare_at_once_agree(tmp_path: Path) -> None:
    directory = ComparisonRecords(tmp_path).directory(ASKED)
    create_directory(directory, {**ASKED._asdict(), "looks": [5]})
    create_directory(directory, {**ASKED._asdict(), "looks": [8]})
    assert ComparisonRecords(tmp_path).looks(ASKED).declared == (5,)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


@pytest.mark.parametrize("name", ["declared.json", "look-5-5.json"])
@pytest.mark.parametrize("content", ['{"look', "{}", "[]"])
def test_a_damaged_record_is_no_fresh_start(tmp_path: Path, name: str, content: str) -> None:
    records = ComparisonRecords(tmp_path)
    records.declare(ASKED, [5], is_seen=True)
    records.take_look(ASKED, 5, [0.1] * 5)
    (records.directory(ASKED) / name).write_text(content)
    with pytest.raises(UsageError, match=f"(?s){name}.*fix: restore it"):
        records.declare(ASKED, [5], is_seen=True)


def test_every_arm_compared_with_a_baseline_is_in_the_family(
    ablate: Callable[..., dict[str, Any]],
) -> None:
    first = ablate(0.02, *GELU, "--seeds", "5")
    assert first["family"] == {"size": 1, "others": []}
    second = ablate(0.02, "--swap", "ffn=geglu", "--swap", "norm=rmsnorm", "--seeds", "5")
    assert second["family"]["size"] == 3
    assert [one["arm"] for one in second["family"]["others"]] == ["ffn=gelu"]
    p_values = [one["p_looks"] for one in second["comparisons"]]
    assert min(one["p_holm"] for one in second["comparisons"]) == pytest.approx(3 * min(p_values))
    again = ablate(0.02, *GELU, "--seeds", "5")
    assert again["family"]["size"] == 3
    assert again["comparisons"][0]["p_holm"] > first["comparisons"][0]["p_holm"]
    assert "over 3 comparisons" in render_markdown(again)
    assert "ffn=geglu, norm=rmsnorm" in render_markdown(again)


@pytest.mark.parametrize(
    ("delta", "seeds", "told"),
    [(0.2, 5, "ffn=gelu worse"), (0.012, 10, None)],
)
def test_a_sequential_study_stops_when_it_is_decided(
    delta: float,
    seeds: int,
    told: str | None,
    ablate: Callable[..., dict[str, Any]],
) -> None:
    report = ablate(delta, *GELU, "--sequential", "--looks", "5,8,10", "--margin", "0.015")
    assert len(report["settings"]["seeds"]) == seeds
    (one,) = report["comparisons"]
    assert one["looks"]["declared"] == [5, 8, 10]
    assert one["looks"]["taken"] == [look for look in (5, 8, 10) if look <= seeds]
    stopped = "".join(report["settings"]["notes"])
    assert (told or "") in stopped and bool(told) == ("Stopped at" in stopped)
    assert "--sequential" in report["command"] and "--looks 5,8,10" in report["command"]


def test_a_hopeless_study_stops(ablate: Callable[..., dict[str, Any]]) -> None:
    report = ablate(0.0, *GELU, "--sequential", "--looks", "3,4,5", "--margin", "0.001")
    assert "hopeless" in "".join(report["settings"]["notes"])
    assert report["comparisons"][0]["verdict"] == UNRESOLVED


@pytest.mark.parametrize(
    "words", [("--looks", "5,5"), ("--looks", "1,5"), ("--sequential", "--seeds", "5")]
)
def test_wrong_looks_are_refused(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "quickstart", *GELU, *words]) == 2
    assert "--looks" in capsys.readouterr().err
