"""Laws, speedups and their intervals on ladders that follow a known law."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lswt_core.ablation.statistics.ladder_pair import (
    Pair,
    analyse_pair,
    describe_next,
    describe_speedup,
    describe_trend,
    estimate,
)
from lswt_core.ablation.statistics.scaling_fit import fit_law
from lswt_core.ablation.statistics.seed_draws import draw_means, interval, two_sided_p

Floats = NDArray[np.float64]
L_INF, A, ALPHA, RATIO = 1.8, 3.2, 0.12, 7.0  # nats, nats, -, compute between two sizes


def compute(rungs: int, cost: float = 1.0) -> Floats:
    """Training FLOPs [2, rungs]; the arm's are ``cost`` times the baseline's."""
    baseline = 1e12 * RATIO ** np.arange(rungs)
    return np.stack([baseline, cost * baseline])


def law(flops: Floats, factor: float = 1.0, alpha: float = ALPHA) -> Floats:
    return L_INF + A * factor * (flops / 1e12) ** -alpha


def pair_of(
    losses: Floats, flops: Floats, seeds: int = 5, noise: float = 0.0, seed: int = 0
) -> Pair:
    """Runs whose noise the arms share mostly, as paired runs do."""
    draw = np.random.default_rng(seed)
    shared = 2.5 * noise * draw.standard_normal((seeds, 1, losses.shape[1]))
    runs = losses + shared + noise * draw.standard_normal((seeds, *losses.shape))
    return Pair(runs, flops, np.full((seeds, losses.shape[1]), np.nan))


def both(flops: Floats, factor: float, alpha: float = ALPHA) -> Floats:
    return np.stack([law(flops[0]), law(flops[1], factor, alpha)])


def test_the_law_behind_losses_is_recovered() -> None:
    flops = compute(4)
    found = fit_law(both(flops, 0.97), flops)
    assert found.l_inf == pytest.approx(L_INF, abs=1e-3)
    assert found.alpha == pytest.approx(ALPHA, rel=1e-4)
    assert found.a[1] / found.a[0] == pytest.approx(0.97, rel=1e-6)
    assert found.predict(flops * RATIO) == pytest.approx(both(flops * RATIO, 0.97), abs=1e-4)


def test_many_fits_are_those_of_one_after_the_other() -> None:
    flops = compute(3)
    noisy = both(flops, 0.95) + 0.01 * np.random.default_rng(0).standard_normal((7, 2, 3))
    at_once = fit_law(noisy, flops)
    alone = [fit_law(one, flops) for one in noisy]
    for name in ("l_inf", "alpha", "a"):
        np.testing.assert_array_equal(getattr(at_once, name), [getattr(one, name) for one in alone])


def test_losses_that_rise_with_compute_have_no_law() -> None:
    flops = compute(3)
    found = fit_law(both(flops, 1.0)[:, ::-1], flops)
    assert np.isnan(found.alpha) and np.isnan(found.l_inf) and np.isnan(found.a).all()


def test_the_irreducible_loss_is_not_negative() -> None:
    flops = compute(3)
    straight = np.stack([6.0 - 0.7 * np.arange(3), 5.9 - 0.7 * np.arange(3)])  # concave in log L
    assert fit_law(straight, flops).l_inf == 0.0


def test_two_sizes_cannot_fit_an_irreducible_loss() -> None:
    flops = compute(2)
    with pytest.raises(ValueError, match="3 sizes"):
        fit_law(both(flops, 0.9), flops)
    found = fit_law(both(flops, 0.9), flops, L_INF)
    assert found.alpha == pytest.approx(ALPHA, rel=1e-4)


def test_draws_have_the_t_distribution_of_a_mean() -> None:
    values = np.array([1.0, 2.0, 4.0])
    low, high = interval(draw_means(values, 200_000)) or (0.0, 0.0)
    half = 4.302653 * values.std(ddof=1) / np.sqrt(3)  # t, 2 degrees of freedom
    assert (low, high) == pytest.approx((7 / 3 - half, 7 / 3 + half), abs=0.06)
    paired = draw_means(np.stack([values, values + 1.0], axis=1), 100)
    assert paired[:, 1] - paired[:, 0] == pytest.approx(np.ones(100))
    with pytest.raises(ValueError, match="two seeds"):
        draw_means(values[:1])


def test_undefined_draws_widen_intervals_and_prove_nothing() -> None:
    draws = np.linspace(1.0, 2.0, 1000)
    assert two_sided_p(draws) == 2 / 1000
    draws[:10] = np.nan
    low, high = interval(draws) or (0.0, 0.0)
    assert low < 1.025 and high > 1.975
    assert two_sided_p(draws) == pytest.approx(0.02)
    draws[:30] = np.nan
    assert interval(draws) is None


@pytest.mark.parametrize("factor, cost", [(0.97, 1.0), (1.05, 0.8), (2**ALPHA, 2.0)])
def test_a_speedup_is_the_compute_for_the_same_loss(factor: float, cost: float) -> None:
    flops = compute(3, cost)
    true = factor ** (-1 / ALPHA)  # of compute, at any size: the arm's own cost is in its law
    found = analyse_pair(pair_of(both(flops, factor), flops))
    assert found["speedup"]["compute"]["value"] == pytest.approx(true, rel=1e-3)
    for one in found["speedup"]["by_rung"]:
        assert one["value"] == pytest.approx(true, rel=1e-3)
    assert found["trend"]["factor_per_decade"]["value"] == pytest.approx(1.0, abs=1e-3)


def test_equal_losses_for_twice_the_compute_are_worth_half() -> None:
    flops = compute(3, 2.0)
    losses = np.stack([law(flops[0]), law(flops[0])])
    found = analyse_pair(pair_of(losses, flops, noise=1e-4))
    assert found["speedup"]["compute"]["value"] == pytest.approx(0.5, rel=0.02)
    low, high = found["speedup"]["compute"]["ci95"]
    assert 0.45 < low < 0.5 < high < 0.55


def test_noise_that_arms_share_is_not_in_what_one_is_worth() -> None:
    flops = compute(3)
    shared = 0.02 * np.random.default_rng(0).standard_normal((4, 1, 3))
    pair = pair_of(both(flops, 1.0), flops, seeds=4, noise=1e-5)
    low, high = analyse_pair(pair._replace(losses=pair.losses + shared))["speedup"]["compute"][
        "ci95"
    ]
    assert 0.999 < low < high < 1.001


def test_speed_is_part_of_what_an_arm_is_worth_in_time() -> None:
    flops = compute(3)
    pair = pair_of(both(flops, 0.97), flops)._replace(speeds=np.full((5, 3), np.log(0.5)))
    found = analyse_pair(pair)["speedup"]
    assert found["time"]["value"] == pytest.approx(found["compute"]["value"] / 2)
    assert analyse_pair(pair_of(both(flops, 0.97), flops))["speedup"]["time"] is None


def test_the_next_size_and_the_largest_are_predicted() -> None:
    flops = compute(4)
    found = analyse_pair(pair_of(both(flops, 0.97), flops, noise=1e-4))
    beyond = both(flops * RATIO, 0.97)[:, -1]
    assert found["next"]["flops"] == pytest.approx(1e12 * RATIO**4)
    assert found["next"]["baseline"]["value"] == pytest.approx(beyond[0], abs=2e-3)
    assert found["next"]["difference"]["value"] == pytest.approx(beyond[1] - beyond[0], abs=1e-3)
    assert found["back_test"]["l_inf"] == []
    assert all(abs(found["back_test"][name]["error"]) < 2e-3 for name in ("baseline", "difference"))


def test_a_back_test_that_fails_says_so() -> None:
    flops = compute(4)
    losses = both(flops, 0.97)
    losses[1, -1] = losses[0, -1] + 0.05  # better at three sizes, worse at the fourth
    before = analyse_pair(pair_of(losses, flops, noise=1e-3))["back_test"]
    assert before["difference"]["covered"] is False
    expected = (law(flops[1], 0.97) - law(flops[0]))[-1] - 0.05
    assert before["difference"]["error"] == pytest.approx(expected, abs=0.01)


def test_with_three_sizes_the_back_test_is_for_any_irreducible_loss() -> None:
    flops = compute(3)
    before = analyse_pair(pair_of(both(flops, 0.97), flops, noise=1e-4))["back_test"]
    assert len(before["l_inf"]) == 3 and before["baseline"]["covered"]
    flops = compute(2)
    found = analyse_pair(pair_of(both(flops, 0.97), flops))
    assert found["back_test"] is None and found["law"]["l_inf_fixed"] is not None


def test_one_seed_has_values_and_no_intervals() -> None:
    flops = compute(3)
    found = analyse_pair(pair_of(both(flops, 0.97), flops, seeds=1))
    assert found["speedup"]["compute"]["ci95"] is None and found["trend"]["p"] is None
    assert found["speedup"]["compute"]["value"] == pytest.approx(0.97 ** (-1 / ALPHA), rel=1e-3)


def simulate(studies: int, seeds: int, factor: float = 0.97, cost: float = 1.0) -> dict[str, float]:
    """Return how often 95 % intervals cover the truth, over simulated ladders of three sizes."""
    flops = compute(3, cost)
    losses, true = both(flops, factor), factor ** (-1 / ALPHA)
    covered: dict[str, list[bool]] = {"speedup": [], "trend": [], "next": []}
    beyond = both(flops * RATIO, factor)[:, -1]
    for study in range(studies):
        pair = pair_of(losses, flops, seeds, 0.004, seed=study)
        found = estimate(pair)
        trend, later = describe_trend(pair, found), describe_next(pair, found)
        covered["speedup"].append(holds(describe_speedup(pair, found)["compute"], true))
        covered["trend"].append(holds(trend["factor_per_decade"], 1.0))
        covered["next"].append(holds(later["difference"], beyond[1] - beyond[0]))
    return {name: float(np.mean(values)) for name, values in covered.items()}


def holds(number: dict[str, Any], true: float) -> bool:
    """Whether an interval, whose ends may be unbounded (None), has the truth in it."""
    assert number["ci95"] is not None
    low, high = number["ci95"]
    return (low is None or low <= true) and (high is None or true <= high)


def test_intervals_cover_the_truth_at_three_seeds() -> None:
    assert all(share >= 0.8 for share in simulate(10, 3).values())


@pytest.mark.slow
@pytest.mark.parametrize("seeds, factor, cost", [(3, 0.97, 1.0), (5, 1.0, 2.0)])
def test_intervals_cover_the_truth_19_in_20_times(seeds: int, factor: float, cost: float) -> None:
    shares = simulate(150, seeds, factor, cost)
    # 150 studies: the standard error of a share of .95 is .018
    assert all(0.9 <= share <= 0.995 for share in shares.values()), shares
