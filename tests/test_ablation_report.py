"""What the report of an ablation says beside its verdicts: scales of loss, limits, origins."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from runs import write_recipe

from lswt_core.ablation.comparison import Comparison
from lswt_core.ablation.document_split import judged_on
from lswt_core.ablation.horizons import AtHorizon
from lswt_core.ablation.report.compare import make_report
from lswt_core.ablation.report.comparison_report import headline_report, make_comparison_report
from lswt_core.ablation.report.findings import list_alarms
from lswt_core.ablation.report.limits import list_limits
from lswt_core.ablation.report.page import render_markdown, render_page, render_terminal
from lswt_core.ablation.report.publish import publish
from lswt_core.ablation.report.worth import worth_of_compute
from lswt_core.ablation.runs.outcome import ArmResult, Outcome, Study
from lswt_core.ablation.study import list_values
from lswt_core.recipe import Recipe

DOCUMENTS, TOKENS = 12, 100
UNIGRAM = 3.5  # nats per token


def run(seed: int, loss: float, by_document: float = 0.0) -> Outcome:
    """A run whose difference to others is larger by ``by_document`` on every other document."""
    means = [loss + by_document * (-1) ** i for i in range(DOCUMENTS)]
    return Outcome(
        seed,
        loss=loss,
        documents=[(f"{i}.py", mean * TOKENS, TOKENS) for i, mean in enumerate(means)],
        curve=[(64, loss + 1), (128, loss)],
        evaluations=[(128, loss + 0.5)],
        positions=[(0, loss + 0.1, 7)],
        tokens_per_second=1000.0 + seed,
        unigram=[(UNIGRAM + i / 100) * TOKENS for i in range(DOCUMENTS)],
        evaluated_bytes=2 * TOKENS * DOCUMENTS,
        text="of the source",
        evaluated_text="of the tokens",
        code={"ffn/gelu": {"distribution": "plugin", "version": "9", "sha256": "abc"}},
        core={"version": "1", "commit": "c0ffee", "sha256": "def"},
    )


def arm(name: str, losses: list[float | None], spread: float = 0.0, flops: int = 6000) -> ArmResult:
    outcomes = [
        Outcome.failed(seed, "lost") if loss is None else run(seed, loss, spread)
        for seed, loss in enumerate(losses)
    ]
    stored = {seed: (f"key-{name}-{seed}", f"/a/store/key-{name}-{seed}") for seed in range(5)}
    return ArmResult(name, name, [], 1000, 1000, flops, 1280, {}, [], outcomes, stored)


def study(*arms: ArmResult, margin: float = 0.01, steps: int = 20) -> Study:
    settings = {"seeds": list(range(len(arms[0].outcomes))), "confidence": 0.95}
    settings |= {"margin": margin, "steps": steps, "tokens": 1280}
    environment = {"machine": {"cpu": "a slow one"}}
    return Study("x", list(arms), settings, [], environment, "[model]\n", "ablate x")


BASE: list[float | None] = [3.0, 3.1, 3.2, 3.05, 3.1]


def shifted(by: float) -> list[float | None]:
    return [loss and loss + by + 0.0005 * seed for seed, loss in enumerate(BASE)]


def forms(report: dict[str, Any]) -> tuple[str, str]:
    return render_markdown(report), render_page(report, {})


def test_every_loss_stands_beside_its_perplexity_and_the_unigram_models() -> None:
    report = make_report(study(arm("baseline", BASE), arm("x", shifted(0.1))))
    baseline, _ = report["arms"]
    mean = baseline["final_loss"]["mean"]
    assert baseline["perplexity"] == pytest.approx(math.exp(mean))
    assert baseline["bits_per_byte"] == pytest.approx(mean / math.log(2) / 2)
    unigram = UNIGRAM + (DOCUMENTS - 1) / 200
    assert baseline["unigram"]["loss"] == pytest.approx(unigram)
    for text in (*forms(report), render_terminal(report)):
        shown = (f"{math.exp(mean):.2f}", f"{mean / math.log(4):.4f}", f"{math.exp(unigram):.2f}")
        assert all(number in text for number in shown)
        assert "WORSE THAN UNIGRAM" not in text


def test_losses_on_some_documents_are_compared_with_the_unigram_model_on_these() -> None:
    names = frozenset(f"{i}.py" for i in range(4, 8))
    (baseline,) = make_report(judged_on(study(arm("baseline", BASE)), names))["arms"]
    assert baseline["unigram"]["loss"] == pytest.approx(UNIGRAM + 0.055)
    assert baseline["evaluated"] == {"tokens": 400, "documents": 4, "bytes": 800}


def test_page_and_markdown_have_the_same_sections() -> None:
    markdown, page = forms(make_report(study(arm("baseline", BASE), arm("x", shifted(0.1)))))
    titles = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert list(map(unescape, re.findall(r"<h2>(.*?)</h2>", page))) == titles
    unfolded = page.partition("<details>")[0]
    assert "What this cannot tell" in unfolded and "What it costs" not in unfolded
    assert titles.index("Losses") < titles.index("What this cannot tell") < titles.index("Runs")


def test_every_number_is_traceable() -> None:
    study_ = study(arm("baseline", BASE), arm("x", [*shifted(0.1)[:4], None]))
    horizons = (AtHorizon(0.5, 10, study(arm("baseline", BASE), arm("short", BASE), steps=10)),)
    comparison = Comparison(study_, horizons=(*horizons, AtHorizon(1.0, 20, study_)))
    for text in forms(headline_report(make_comparison_report(comparison))):
        keys = [f"key-{name}-{seed}" for name in ("baseline", "x", "short") for seed in range(5)]
        assert all(key in text for key in keys)
        facts = ("/a/store", "of the source", "of the tokens", "c0ffee", "abc", "a slow one")
        assert all(fact in text for fact in facts)
        assert "1,000 .. 1,004" in text, "the spread of tokens/s"


def test_curves_are_data_and_pictures_are_described(tmp_path: Path) -> None:
    publish(Comparison(study(arm("baseline", BASE), arm("x", shifted(0.1)))), tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    (alt,) = re.findall(r"!\[(.*)\]\(report\.png\)", markdown)
    assert "x: worse, +0.1010 (+" in alt and "resolved at the 5 % level" not in alt
    assert "bands reach from the lowest to the highest seed" in markdown
    rows = list(csv.DictReader((tmp_path / "report-curves.csv").read_text().splitlines()))
    assert len(rows) == 2 * 5 * 4
    own = [row for row in rows if (row["arm"], row["seed"]) == ("baseline", "1")]
    points = [(row["curve"], float(row["at"]), float(row["loss"]), row["tokens"]) for row in own]
    training = [("training", 64, 4.1, ""), ("training", 128, 3.1, "")]
    assert points == [*training, ("held-out", 128, 3.6, ""), ("position", 0, 3.2, "7")]


def test_values_say_who_wrote_them(tmp_path: Path) -> None:
    recipe = Recipe.load(write_recipe(tmp_path))
    values = {one["key"]: one for one in list_values(recipe)}
    assert values["ffn.bias"]["where"] == "default" and '"swiglu"' in values["ffn.bias"]["owner"]
    assert "nano.toml:" in values["model.d_model"]["where"]
    for key, one in values.items():
        assert recipe.explain(key)[-1][0] == one["value"]
    one = replace(study(arm("baseline", BASE)), values=list_values(recipe))
    defaults = sum(value["where"] == "default" for value in values.values())
    for text in forms(make_report(one)):
        assert f"{defaults} are defaults" in text


def test_means_of_arms_that_lost_seeds_are_over_the_same_ones() -> None:
    report = make_report(study(arm("baseline", BASE), arm("x", [None, *shifted(0.1)[1:]])))
    (one,) = report["comparisons"]
    assert one["means"]["baseline"] == pytest.approx((3.1 + 3.2 + 3.05 + 3.1) / 4)
    assert one["delta"] == pytest.approx(one["means"]["arm"] - one["means"]["baseline"])
    assert f"{one['means']['baseline']:.4f}" in render_terminal(report)


# ---------- what it does not say


@pytest.mark.parametrize(
    ("by", "spread", "told"),
    [
        (0.1, 0.0, None),
        (0.1, 1.0, "worse on this text; on other documents"),
        (0.0, 1.0, "equivalent on this text; on other documents"),
    ],
)
def test_verdicts_that_other_documents_may_change_say_so(
    by: float, spread: float, told: str | None
) -> None:
    report = make_report(study(arm("baseline", BASE), arm("x", shifted(by), spread)))
    limits = " ".join(list_limits(report))
    assert ("on other documents" in limits) == (told is not None) and (told or "") in limits
    assert "UNTUNED" in limits and "one size of model" in limits and "one length" in limits


def test_few_seeds_and_unknown_documents_are_limits() -> None:
    report = make_report(study(arm("baseline", BASE[:2]), arm("x", shifted(0.1)[:2])))
    assert "2 seeds" in " ".join(list_limits(report))
    alone = study(arm("baseline", BASE[:3]), arm("x", shifted(0.1)[:3]))
    for one in alone.arms:
        one.outcomes[:] = [
            replace(o, documents=[("a", (o.loss or 0) * 9, 9)], unigram=[]) for o in one.outcomes
        ]
    limits = " ".join(list_limits(make_report(alone)))
    assert "Whether it holds on other documents is not known: x" in limits


def test_an_arm_that_varies_more_than_the_baseline_is_pointed_at() -> None:
    wild: list[float | None] = [3.0, 3.1, 9.0, 3.05, 3.1]
    limits = " ".join(list_limits(make_report(study(arm("baseline", BASE), arm("x", wild)))))
    assert re.search(r"x: its losses vary \d+ times as much", limits)
    level = list_limits(make_report(study(arm("baseline", BASE), arm("x", shifted(0.1)))))
    assert "times as much" not in " ".join(level)


def test_another_budget_stands_beside_the_verdict() -> None:
    more = arm("x", shifted(-0.1), flops=9000)
    printed = render_terminal(make_report(study(arm("baseline", BASE), more)))
    assert "x: better (untuned)" in printed and "training FLOPs +50.0%" in printed.split("\n")[0]
    level = arm("x", shifted(-0.1))
    assert "budget" not in render_terminal(make_report(study(arm("baseline", BASE), level)))


def test_what_was_allowed_is_no_footnote() -> None:
    flaws = [{"about": "train.steps", "text": "train.steps is 40"}]
    allowed = {"arm": "x", "status": "allowed", "axes": [], "runs": [], "matched": None}
    one = study(arm("baseline", BASE), arm("x", shifted(-0.1)))
    printed = render_terminal(make_report(replace(one, certificate=[allowed | {"flaws": flaws}])))
    assert printed.startswith("ALLOWED: x differs in more than its swap: train.steps is 40.")
    tuned = make_report(replace(one, certificate=[allowed | {"flaws": flaws}]))
    tuned["tuning"] = {"options": [{"key": "train.steps"}]}
    assert list_alarms(tuned) == [], "what was tuned for every arm is no other difference"


# ---------- worth of compute


@pytest.mark.parametrize(
    ("delta", "cost", "worth"),
    [
        (0.1, 1.0, 0.5**0.5),
        (0.2, 1.0, 0.5),
        (-0.3, 1.5, 2 / 1.5),
        (0.3, 1.0, None),
        (-0.4, 1, None),
    ],
)
def test_a_difference_is_worth_the_compute_that_the_baseline_takes_for_it(
    delta: float, cost: float, worth: float | None
) -> None:
    lengths = [(0.5, 3.2), (1.0, 3.0), (2.0, 2.7)]
    found = worth_of_compute(delta, cost, lengths)
    assert found == (None if worth is None else pytest.approx(worth))


def test_lengths_of_training_say_what_a_difference_is_worth() -> None:
    short = [loss and loss + 0.2 for loss in BASE]
    half = AtHorizon(0.5, 10, study(arm("baseline", short), arm("x", short), steps=10))
    own = study(arm("baseline", BASE), arm("x", shifted(0.1)))
    at_own = AtHorizon(1.0, 20, own)
    report = make_comparison_report(Comparison(own, horizons=(half, at_own)))
    (worth,) = report["horizons"]["worth"]
    assert worth["value"] == pytest.approx(2 ** (-0.101 / 0.2))
    assert worth["ci95"][0] < worth["value"] < worth["ci95"][1]
    printed = render_terminal(headline_report(report))
    assert "x is worth -30% of compute" in printed
    assert "x: its difference is resolved at 1 times the steps alone" in printed
    again = make_comparison_report(Comparison(own, horizons=(half._replace(study=own), at_own)))
    assert "x: its difference has the same sign at 0.5, 1" in render_markdown(
        headline_report(again)
    )


# ---------- intervals, verdicts and costs say no more than they are


def varied(documents: float) -> dict[str, Any]:
    """The comparison of an arm whose difference varies between seeds, and between documents."""
    noise = [0.0, 0.03, -0.02, 0.01, -0.02]
    losses = [loss + 0.1 + by for loss, by in zip(map(float, BASE), noise, strict=True)]
    report = make_report(study(arm("baseline", BASE), arm("x", list(losses), documents)))
    return report | {"printed": render_terminal(report)}


@pytest.mark.parametrize("documents", [0.0, 0.01, 0.5])
def test_other_documents_never_make_a_difference_more_certain(documents: float) -> None:
    report = varied(documents)
    (one,) = report["comparisons"]
    (low, high), (lower, higher) = one["ci95"], one["kind_of_text_ci95"]
    assert lower <= low < high <= higher
    is_wider = higher - lower > 1.001 * (high - low)
    assert is_wider == (documents == 0.5)
    assert ("on other documents of this kind too" in report["printed"]) != is_wider


# of five seeds of recipes/quickstart.toml: held-out losses less two nats
MEASURED: dict[str, list[float | None]] = {
    "baseline": [3.0843, 3.0003, 2.8816, 2.9069, 2.9137],
    "memory.xl=false": [2.9126, 2.9168, 2.8141, 2.8595, 2.8085],
    "memory.registers=false": [3.0315, 3.0088, 2.9071, 2.9121, 2.9238],
    "ffn=gelu": [3.1518, 3.1387, 3.0126, 3.1234, 3.0576],
}


def measured(flops: int = 6000) -> dict[str, Any]:
    baseline, *others = (arm(name, losses) for name, losses in MEASURED.items())
    others[0] = replace(others[0], flops_per_token=flops)
    return make_report(study(baseline, *others, margin=0.02))


def test_an_interval_beyond_the_margin_explains_a_weaker_verdict() -> None:
    report = measured()
    one = report["comparisons"][0]
    assert one["verdict"] == "better, maybe by less than the margin" and one["ci95"][1] < -0.02
    first = render_terminal(report).split("\n")[0]
    assert first.startswith("memory.xl=false: better, maybe by less than the margin (untuned)")
    assert "verdicts are corrected for all comparisons" in first


def test_the_level_of_intervals_is_said() -> None:
    for text in forms(measured()):
        assert "each for one arm alone" in text and "confidence of 96.00%" in text
        assert re.search(r"\b6 \.\. 13\d\b", text), "seeds needed, and their limit"


@pytest.mark.parametrize(("flops", "told"), [(6050, False), (5950, False), (6100, True)])
def test_a_budget_that_counts_as_matched_is_no_headline(flops: int, told: bool) -> None:
    first = render_terminal(measured(flops)).split("\n")[0]
    assert ("budget" in first) == told
    assert ("budget differs: training FLOPs +1.7%" in first) == told


def test_seeds_that_are_needed_stand_beside_their_limit() -> None:
    report = make_report(study(arm("baseline", BASE), arm("x", [3.05, 3.02, 3.3, 3.0, 3.1])))
    (one,) = report["comparisons"]
    least, most = one["margin_seeds"], one["margin_seeds_at_most"]
    first = render_terminal(report).split("\n")[0]
    assert f"needs {least:,} seeds ({most:,} at the most)" in first


def test_results_say_on_which_size_length_and_text() -> None:
    values = [{"key": "data.use", "value": "stdlib", "where": "x.toml:1", "owner": ""}]
    one = replace(study(arm("baseline", BASE), arm("x", shifted(0.1))), values=values)
    printed = render_terminal(make_report(one))
    assert (
        "1,000 parameters; losses are on held-out text (source stdlib, 1,200 tokens of" in printed
    )
    assert "one text (stdlib)" in printed
    assert "1.3 tokens per parameter where about 20 are compute-optimal" in printed


def test_memory_is_not_said_to_be_the_models() -> None:
    def with_memory(name: str, times: int) -> ArmResult:
        one = arm(name, BASE)
        outcomes = [replace(o, peak_bytes=times * (10**9 + o.seed)) for o in one.outcomes]
        return replace(one, outcomes=[replace(o, runs_at_once=2) for o in outcomes])

    arms = with_memory("baseline", 1), with_memory("x", 2), with_memory("y", 2)
    report = make_report(study(*arms))
    printed = render_terminal(report)
    assert "the peak of the run's process" in printed and "not that of the model alone" in printed
    assert printed.count("shared the machine") == 1 and "x, y: runs" in printed
    report["environment"]["device"] = "cuda"
    assert "the peak allocated on the accelerator" in render_terminal(report)
