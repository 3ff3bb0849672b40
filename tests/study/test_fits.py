"""Fits recover what was planted, refuse shapes that are wrong, and claims are made as seldom without cause as they promise."""

import math
from functools import cache

import numpy as np
import pytest

from nengram.errors import NengramError
from nengram.study import verdict
from nengram.study.claims import Kept, beats, equal_cpu, interior_claim, kept_share, power, tokens_to_show
from nengram.study.fits import (
    blocks_of,
    bootstrap_optimum,
    fit_log_rows,
    fit_monotone,
    fit_quadratic,
    half_width,
)
from nengram.study.verdict import paired

RHO = np.array([0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0])
U, FALLING, FLAT = 0.3 * (RHO - 0.65) ** 2, -0.08 * RHO, 0 * RHO
W = 0.02 * np.cos(4 * np.pi * RHO)
ROWS = 2000 * 4.0 ** np.arange(5)


@pytest.fixture(autouse=True)
def quick_quantiles(monkeypatch):
    """Many small studies ask for the same few quantiles."""
    monkeypatch.setattr(verdict, "t_quantile", cache(verdict.t_quantile))


def studies(shape_P: np.ndarray, count: int, *, seeds: int = 3, noise: float = 0.006) -> list[np.ndarray]:
    """Losses [S, P] of many studies: the shape, a common shift of each seed several times the noise, and noise."""
    rng = np.random.default_rng(0)
    size = (count, seeds, len(shape_P))
    return list(4.9 + shape_P + rng.normal(0, 0.03, (count, seeds, 1)) + rng.normal(0, noise, size))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("shape_P, optimum", [(U, 0.65), (FALLING, 1.0), (-FALLING, 0.0)])
def test_intervals_of_the_optimum_hold_the_planted_one(shape_P, optimum, seeds):
    found = [bootstrap_optimum(RHO, losses_SP, draws=400) for losses_SP in studies(shape_P, 150, seeds=seeds)]
    assert np.mean([one.low <= optimum <= one.high for one in found]) >= 0.9
    assert np.mean([one.high - one.low for one in found]) < 0.12  # nor does it hold everything


def test_an_optimum_at_the_end_is_told_as_one():
    for losses_SP in studies(FALLING, 20):
        found = bootstrap_optimum(RHO, losses_SP, draws=400)
        assert fit_quadratic(RHO, losses_SP).edge == "high" and found.value == 1
        assert found.share_high_edge > 0.9 and found.share_low_edge == 0
    assert bootstrap_optimum(RHO, studies(-FALLING, 1)[0], draws=400).share_low_edge > 0.9
    assert bootstrap_optimum(RHO, studies(U, 1)[0], draws=400).share_high_edge == 0


def test_resampling_three_seeds_promises_too_much():
    found = [bootstrap_optimum(RHO, losses_SP, draws=400) for losses_SP in studies(U, 150)]
    assert found[0].distinct == 10
    assert np.mean([one.by_seeds[0] <= 0.65 <= one.by_seeds[1] for one in found]) < 0.85


def test_the_lowest_point_is_found_whatever_the_shape():
    cliff_P = np.where(RHO == 0.7, -0.03, 0.0)
    for losses_SP in studies(cliff_P, 20):
        assert bootstrap_optimum(RHO, losses_SP, draws=400).grid == (0.7, 0.7)
    low, high = bootstrap_optimum(RHO, studies(FLAT, 1)[0], draws=400).grid
    assert high - low > 0.5


@pytest.mark.parametrize(
    "shape_P, quadratic, monotone",
    [(U, 0, 1), (FALLING, 0, 0), (FLAT, 0, 0), (W, 1, 1)],
    ids=["U", "falling", "flat", "W"],
)
def test_wrong_shapes_are_refused_and_right_ones_are_not(shape_P, quadratic, monotone):
    """A true parabola is refused about 5 times in 100, a true monotone curve at most so often, a wrong shape nearly always."""
    tried = studies(shape_P, 150, noise=0.004)
    for fit, wrong in ((fit_quadratic, quadratic), (fit_monotone, monotone)):
        refused = np.mean([fit(RHO, losses_SP).lack_of_fit.refused for losses_SP in tried])
        assert refused > 0.95 if wrong else refused < 0.12
        assert refused > 0.01 or fit is fit_monotone


def test_a_flat_line_is_refused_by_one_direction_as_often_as_its_test_says():
    """p of a fixed direction is uniform under a flat line; of two directions the better one is taken, so it is small less often."""
    p = np.array([fit_monotone(RHO, losses_SP).lack_of_fit.p for losses_SP in studies(FLAT, 400, seeds=4)])
    assert 0.0 < (p < 0.2).mean() < 0.2 and (p < 0.8).mean() < 0.8 and (p > 0.99).mean() < 0.2


def test_common_shifts_of_seeds_change_no_fit():
    losses_SP = studies(U, 1)[0]
    shifted_SP = losses_SP + np.array([[0.5], [-0.3], [0.1]])
    assert blocks_of(shifted_SP).error_variance == pytest.approx(blocks_of(losses_SP).error_variance)
    first, second = bootstrap_optimum(RHO, losses_SP, draws=400), bootstrap_optimum(RHO, shifted_SP, draws=400)
    assert (first.low, first.high) == pytest.approx((second.low, second.high))
    assert half_width(losses_SP) == pytest.approx(half_width(shifted_SP))


def test_an_exact_parabola_is_itself():
    found = fit_quadratic(RHO, np.tile(U, (3, 1)))
    assert found.optimum == pytest.approx(0.65) and found.loss == pytest.approx(0, abs=1e-12) and found.edge == ""
    assert found.coefficients == pytest.approx((0.3 * 0.65**2, -0.39, 0.3))
    assert found.lack_of_fit.p is None  # seeds that agree to the last digit give no error to judge by


def test_the_same_draws_give_the_same_digits():
    losses_SP = studies(U, 1)[0]
    assert bootstrap_optimum(RHO, losses_SP) == bootstrap_optimum(RHO, losses_SP)
    assert bootstrap_optimum(RHO, losses_SP) != bootstrap_optimum(RHO, losses_SP, seed=1)


def test_the_slope_over_log_rows_is_recovered():
    found = [fit_log_rows(ROWS, losses_SP) for losses_SP in studies(-0.012 * np.log2(ROWS), 200)]
    assert 0.9 <= np.mean([one.low <= -0.012 <= one.high for one in found]) <= 0.99
    assert 0.01 < np.mean([one.lack_of_fit.refused for one in found]) < 0.12
    assert min(one.r2 for one in found) > 0.9
    bent = fit_log_rows(ROWS, studies(0.05 * np.cos(np.arange(5.0)), 1)[0])
    assert bent.lack_of_fit.refused


def test_a_clear_interior_optimum_is_claimed_and_nothing_else():
    clear = [interior_claim(RHO, losses_SP) for losses_SP in studies(U, 20)]
    assert all(claim.claimed and claim.point in (0.6, 0.7) for claim in clear)
    for shape_P in (FLAT, FALLING, -FALLING):
        claimed = [interior_claim(RHO, losses_SP).claimed for losses_SP in studies(shape_P, 100, noise=0.02)]
        assert np.mean(claimed) <= 0.08
    words = interior_claim(RHO, studies(FALLING, 1)[0]).words
    assert words == "none shown: not better than 100%"


def test_the_bar_is_twice_the_standard_error_of_both_differences():
    error = math.sqrt(1 / 3)
    assert beats(paired([-1 - 2.01 * error, -2.01 * error, 1 - 2.01 * error]))
    assert not beats(paired([-1 - 1.99 * error, -1.99 * error, 1 - 1.99 * error]))


def test_a_held_out_seed_has_no_say_in_its_point():
    """One seed with a wild dip at 0.2 draws the whole study's point; alone it is judged where the others are lowest."""
    losses_SP = np.tile(U, (3, 1)) + np.random.default_rng(0).normal(0, 1e-4, (3, 8))
    losses_SP[0] = 3 * (RHO - 0.2) ** 2
    claim = interior_claim(RHO, losses_SP)
    assert claim.held_out_points[0] in (0.6, 0.7) and claim.point < 0.6
    assert claim.held_out_low.differences[0] == pytest.approx(
        losses_SP[0, list(RHO).index(claim.held_out_points[0])] - losses_SP[0, 0]
    )
    assert not claim.claimed


def test_below_three_seeds_nothing_is_claimed():
    claim = interior_claim(RHO, studies(U, 1, seeds=2)[0])
    assert not claim.claimed and claim.words == "no claim (2 of 3 seeds)"


def test_power_is_what_simulated_studies_show():
    seen = power([-0.010, -0.004, -0.001, -0.009])
    n, rng = seen.seeds_needed, np.random.default_rng(0)
    shown = [paired(rng.normal(seen.seen, seen.spread, n)).high < 0 for _ in range(400)]
    fewer = [paired(rng.normal(seen.seen, seen.spread, n - 2)).high < 0 for _ in range(400)]
    assert 0.74 < np.mean(shown) < 0.92 and np.mean(fewer) < np.mean(shown) - 0.05
    assert seen.detectable[4] == pytest.approx(paired([-0.010, -0.004, -0.001, -0.009]).detectable)
    assert power([0.01, -0.01]).seeds_needed is None


def test_fieller_intervals_hold_the_planted_share():
    rng, held = np.random.default_rng(0), []
    for _ in range(300):
        moe_S = 4.9 + rng.normal(0, 0.02, 3)
        engram_S = moe_S - 0.08 + rng.normal(0, 0.006, 3)
        control_S = moe_S - 0.3 * 0.08 + rng.normal(0, 0.006, 3)
        kept = kept_share(moe_S, engram_S, control_S)
        held.append(kept.low is not None and kept.low <= 0.3 <= kept.high)
    assert 0.92 <= np.mean(held) <= 0.98


def test_without_a_gain_no_share_of_it_has_an_interval():
    kept = kept_share([4.9, 4.91, 4.92], [4.91, 4.9, 4.93], [4.9, 4.9, 4.9])
    assert kept.low is None and kept.high is None
    assert kept_share([4.9, 4.9], [4.8, 4.8], [4.85, 4.85]) == Kept(pytest.approx(0.5), None, None)


def test_equal_cpu_reads_the_baseline_between_its_budgets_only():
    baseline_s, baseline = np.array([[100.0, 100], [400, 400]]), np.array([[5.0, 5.1], [4.0, 4.1]])
    small, large = equal_cpu([[50.0, 90], [200, 200]], [[4.9, 5.0], [4.2, 4.4]], baseline_s, baseline)
    assert small.differences == (None, None) and small.paired is None
    assert large.differences == pytest.approx((4.2 - 4.5, 4.4 - 4.6))  # half way in log seconds
    partly = equal_cpu([[200.0, 401]], [[4.2, 4.4]], baseline_s, baseline)[0]
    assert partly.differences[0] is not None and partly.differences[1] is None and partly.paired is None


def test_tokens_to_show_follow_the_trend():
    differences_BS = np.array([[0.000, -0.002, 0.002], [-0.004, -0.006, -0.002]])
    found = tokens_to_show([1_000_000, 2_000_000], differences_BS)
    at = -0.004 * math.log2(found / 1e6)
    assert -at == pytest.approx(paired(differences_BS[0]).detectable, rel=1e-6)
    assert tokens_to_show([1_000_000, 2_000_000], differences_BS[::-1]) is None
    assert tokens_to_show([1_000_000], differences_BS[:1]) is None


@pytest.mark.parametrize(
    "broken",
    [
        lambda: fit_quadratic([0, 1], [[1.0, 2.0]]),
        lambda: bootstrap_optimum(RHO, U[None]),
        lambda: fit_monotone(RHO, [[math.nan] * 8]),
        lambda: fit_log_rows([0, 10], [[1.0, 2.0]]),
        lambda: power([0.1]),
    ],
)
def test_what_cannot_be_fitted_is_said_in_one_line(broken):
    with pytest.raises(NengramError) as caught:
        broken()
    assert "\n" not in str(caught.value)
