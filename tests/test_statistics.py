"""The statistics of ablations against their definitions, and against thousands of simulated
studies.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, special, stats

from lswt_core.ablation.report.verdict import SMALL, add_verdicts, adjust_family
from lswt_core.ablation.statistics.crossed import crossed_interval
from lswt_core.ablation.statistics.looks import valid_p
from lswt_core.ablation.statistics.paired_runs import (
    adjust_holm,
    bootstrap_documents,
    clear_p,
    correlation,
    equivalence_power,
    equivalence_seeds,
    equivalence_test,
    paired_test,
    power,
    seeds_needed,
    std_upper_limit,
)

DRAWS = 4000


def simulated(
    seeds: int, *, delta: float = 0.0, noise: float = 0.01, draws: int = DRAWS, seed: int = 1
) -> np.ndarray:
    """Differences of pairs [draws, seeds]."""
    return np.random.default_rng(seed).normal(delta, noise, (draws, seeds))


def test_the_paired_test_is_students() -> None:
    one, other = np.array([3.1, 3.0, 3.2, 3.15]), np.array([3.0, 2.95, 3.15, 3.2])
    actual, expected = paired_test(other - one), stats.ttest_rel(other, one)
    assert actual.p == pytest.approx(expected.pvalue)
    assert actual.delta == pytest.approx((other - one).mean())
    assert actual.ci == pytest.approx(tuple(expected.confidence_interval()))


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_intervals_cover_what_they_promise(seeds: int) -> None:
    paired = [paired_test(row) for row in simulated(seeds, delta=0.02)]
    covered = np.mean([one.ci[0] <= 0.02 <= one.ci[1] for one in paired if one.ci])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(
    ("seeds", "arms"), [(3, 1), (3, 4), (5, 4), pytest.param(10, 8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("shared", [0.0, 0.8], ids=["own noise", "shared noise"])
def test_nothing_is_found_where_there_is_nothing(seeds: int, arms: int, shared: float) -> None:
    draw = np.random.default_rng(seeds * arms)
    baseline = draw.normal(0, 0.01, (1000, 1, seeds))  # what all arms of a study are compared with
    own = draw.normal(0, 0.01, (1000, arms, seeds))
    differences = shared * baseline + np.sqrt(1 - shared**2) * own - baseline
    wrong = 0
    for study in differences:
        comparisons = [comparison(row, margin=0.002) for row in study]
        adjust_family(comparisons)
        add_verdicts(comparisons, margin=0.002)
        wrong += any(one["verdict"] in ("better", "worse", *SMALL) for one in comparisons)
    assert wrong / len(differences) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / len(differences))


def comparison(differences: np.ndarray, margin: float) -> dict[str, object]:
    paired = paired_test(differences)
    whole = {
        "seeds": len(differences),
        "lost": 0,
        "failed": {"arm": 0, "baseline": 0},
        "unknown": {},
    }
    return whole | {
        "delta": paired.delta,
        "level": 0.04,
        "p": paired.p,
        "p_looks": valid_p(paired.p, (len(differences),), len(differences)),
        "p_equivalent": equivalence_test(differences, margin).p,
        "p_clear": clear_p(differences, margin),
        "margin_seeds": 3,
        "margin_seeds_at_most": None,
        "power": 0.5,
    }


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_equivalence_is_rarely_claimed_at_the_edge_of_the_margin(seeds: int) -> None:
    claimed = np.mean(
        [(equivalence_test(row, 0.02).p or 0) <= 0.05 for row in simulated(seeds, delta=0.02)]
    )
    assert claimed <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / DRAWS)


def test_equivalence_is_found_well_inside_of_the_margin() -> None:
    assert np.mean([(equivalence_test(row, 0.03).p or 0) <= 0.05 for row in simulated(8)]) > 0.99


@pytest.mark.parametrize(("delta", "noise"), [(0.02, 0.01), (0.01, 0.01), (0.005, 0.01)])
def test_as_many_seeds_as_planned_find_the_difference(delta: float, noise: float) -> None:
    seeds = seeds_needed(delta, noise)
    assert seeds is not None and power(delta, noise, seeds - 1) < 0.8 <= power(delta, noise, seeds)
    paired = np.mean(
        [(paired_test(row).p or 0) <= 0.05 for row in simulated(seeds, delta=delta, noise=noise)]
    )
    assert paired == pytest.approx(power(delta, noise, seeds), abs=0.03)


def test_power_is_finite_and_grows_with_the_effect_and_with_the_pairs() -> None:
    ratios = np.geomspace(0.01, 1000, 61)
    pairs = [2, 3, 4, 5, 6, 7, 8, 10, 15, 20, 50, 100, 1000, 10_000]
    powers = np.array([[power(ratio, 1.0, count) for count in pairs] for ratio in ratios])
    assert np.isfinite(powers).all() and powers.min() >= 0.05 - 1e-12 and powers.max() <= 1.0
    assert np.diff(powers, axis=0).min() >= -1e-12 and np.diff(powers, axis=1).min() >= -1e-12


@pytest.mark.parametrize("pairs", [2, 3, 5, 20, 1000, 10_000])
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 2.0, 8.0, 20.0, 1000.0])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_power_is_the_chance_that_a_t_statistic_is_critical(
    pairs: int, ratio: float, alpha: float
) -> None:
    degrees, shift = pairs - 1, ratio * np.sqrt(pairs)
    critical = stats.t.isf(alpha / 2, degrees)

    # of a numerator z with a chi small enough for |t| to be critical
    def density(z: float) -> float:
        return (
            np.exp(-((z - shift) ** 2) / 2)
            / np.sqrt(2 * np.pi)
            * special.gammainc(degrees / 2, degrees * z**2 / critical**2 / 2)
        )

    edges = np.unique(
        np.clip(
            [-critical, 0, 0.9 * critical, critical, 1.1 * critical, shift], shift - 9, shift + 9
        )
    )
    edges = [shift - 9, *edges, shift + 9]
    expected = sum(
        integrate.quad(density, *ends, epsabs=1e-13, limit=200)[0] for ends in pairwise(edges)
    )
    assert power(ratio, 1.0, pairs, alpha) == pytest.approx(expected, abs=1e-9)


def test_large_effects_need_few_seeds_and_no_fewer_where_the_effect_is_smaller() -> None:
    assert seeds_needed(8.0, 1.0) == 3
    needed = [seeds_needed(ratio, 1.0) for ratio in np.geomspace(0.03, 1000, 60)]
    assert needed == sorted(needed, reverse=True) and needed[-1] == 2
    assert 8700 < seeds_needed(0.03, 1.0) < 8750  # (1.96 + 0.84)^2 / 0.03^2


def test_holm_is_step_down() -> None:
    assert adjust_holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert adjust_holm([0.9, 0.8]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def test_what_one_pair_tells() -> None:
    paired = paired_test([0.5])
    assert (paired.delta, paired.std, paired.ci, paired.p) == (0.5, None, None, None)
    assert equivalence_test([0.5], 1.0).p is None and seeds_needed(0.5, None) is None


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.1, 0.0)])
def test_runs_that_agree_leave_no_doubt(value: float, p: float) -> None:
    paired = paired_test([value] * 3)
    assert (paired.std, paired.ci, paired.p) == (
        0.0,
        (pytest.approx(value), pytest.approx(value)),
        p,
    )
    assert equivalence_test([value] * 3, 0.05).p == (0.0 if value == 0 else 1.0)


def test_no_number_of_seeds_finds_nothing() -> None:
    assert seeds_needed(0.0, 0.1) is None
    assert seeds_needed(1e-9, 1.0) is None


@pytest.mark.slow
def test_resampled_documents_cover_the_mean_of_their_kind() -> None:
    draw, covered = np.random.default_rng(3), 0
    for _ in range(100):
        tokens = draw.integers(50, 500, 60).astype(float)
        baseline = draw.normal(3, 0.3, (2, 60)) * tokens
        # documents differ in how much the arm helps
        arm = baseline + (0.1 + draw.normal(0, 0.1, 60)) * tokens
        low, high = bootstrap_documents(baseline, arm, tokens)
        covered += low <= 0.1 <= high
    assert 0.88 <= covered / 100 <= 0.99
    assert bootstrap_documents(baseline, arm, tokens) == (low, high), "the same draws every time"


def test_shared_noise_is_told() -> None:
    base = np.random.default_rng(0).normal(size=50)
    assert correlation(base, base + 1) == pytest.approx(1)
    assert correlation(base[:2], base[:2]) is None and correlation([1.0] * 5, base[:5]) is None


# ---------- seeds and documents


@pytest.mark.parametrize(
    "effects",
    [(0.02, 0.0, 0.06), (0.002, 0.1, 0.05), (0.02, 0.1, 0.1), (0.01, 0.02, 0.1)],
    ids=["seeds", "documents", "both", "each with the other"],
)
@pytest.mark.parametrize(
    ("seeds", "documents", "draws"),
    [(5, 30, 500), *(pytest.param(*s, 2000, marks=pytest.mark.slow) for s in [(5, 60), (10, 30)])],
)
def test_intervals_over_seeds_and_documents_cover_both(
    seeds: int, documents: int, draws: int, effects: tuple[float, float, float]
) -> None:
    draw, covered = np.random.default_rng(5), 0
    for _ in range(draws):
        of_seed, of_document, of_both = (
            scale * draw.normal(size=shape)
            for scale, shape in zip(
                effects, [(seeds, 1), (1, documents), (seeds, documents)], strict=True
            )
        )
        tokens = np.exp(draw.normal(6, 0.8, documents))
        differences = tokens * (0.1 + of_seed + of_document + of_both)
        low, high = crossed_interval(differences, tokens)
        covered += low <= 0.1 <= high
    error = 2 * np.sqrt(0.05 * 0.95 / draws)
    assert 0.94 - error <= covered / draws <= 0.97 + error


def test_seeds_or_documents_alone_are_too_narrow_where_both_vary() -> None:
    draw = np.random.default_rng(5)
    tokens = np.full(30, 300.0)
    effects = draw.normal(0, 0.02, (5, 1)) + draw.normal(0, 0.1, (1, 30))
    low, high = crossed_interval(tokens * effects, tokens)
    both = high - low
    low, high = paired_test(effects.mean(1)).ci or (0.0, 0.0)
    of_documents = bootstrap_documents(np.zeros((5, 30)), tokens * effects, tokens)
    assert both > high - low and both > of_documents[1] - of_documents[0]


# ---------- seeds that a study needs


def test_equivalence_needs_as_many_seeds_as_planned() -> None:
    seeds = equivalence_seeds(0.01, 0.01, alpha=0.04)
    assert seeds is not None
    assert equivalence_power(0.01, 0.01, seeds - 1, 0.04) < 0.8
    expected = equivalence_power(0.01, 0.01, seeds, 0.04)
    assert expected >= 0.8
    found = np.mean([(equivalence_test(row, 0.01).p or 0) <= 0.04 for row in simulated(seeds)])
    assert found == pytest.approx(expected, abs=0.02)


def test_power_of_equivalence_is_finite_and_grows() -> None:
    ratios = np.geomspace(0.01, 1000, 31)
    pairs = [2, 3, 4, 5, 8, 20, 100, 1000, 10_000]
    powers = np.array([[equivalence_power(ratio, 1.0, n) for n in pairs] for ratio in ratios])
    assert np.isfinite(powers).all() and powers.min() >= 0.0 and powers.max() <= 1.0
    assert np.diff(powers, axis=0).min() >= -1e-12
    # two pairs may be equivalent by the luck of a tiny spread
    assert np.diff(np.maximum(powers, 0.1), axis=1).min() >= -1e-12


def test_the_noise_is_rarely_above_its_upper_limit() -> None:
    limits = [std_upper_limit(row.std(ddof=1), 5) for row in simulated(5)]
    assert np.mean(np.array(limits) >= 0.01) == pytest.approx(0.95, abs=0.015)
