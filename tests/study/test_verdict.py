"""The rule of the verdict: t intervals over seeds, words from the interval alone, none below three seeds."""

import math
import random

import pytest

from nengram.study.verdict import paired, prediction_interval, t_quantile

# standard tables of Student's t
PUBLISHED = {(0.975, 2): 4.302653, (0.975, 4): 2.776445, (0.975, 30): 2.042272, (0.8, 2): 1.060660, (0.95, 9): 1.833113}


@pytest.mark.parametrize("probability, degrees", PUBLISHED)
def test_t_quantiles_equal_the_published_table(probability, degrees):
    assert t_quantile(probability, degrees) == pytest.approx(PUBLISHED[probability, degrees], abs=2e-6)


@pytest.mark.parametrize(
    "differences, words",
    [
        ([-0.08, -0.10, -0.09], "memory wins"),
        ([0.08, 0.10, 0.09], "memory loses"),
        ([-0.08, 0.10, -0.09], "no difference shown"),
        ([-0.5, -0.5], "no verdict (2 of 3 seeds)"),
        ([-0.5], "no verdict (1 of 3 seeds)"),
    ],
)
def test_the_words_follow_from_the_interval(differences, words):
    assert paired(differences).verdict == words


def test_the_interval_is_the_textbook_one():
    found = paired([1.0, 2.0, 4.0])
    deviation = math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2)
    half = 4.302653 * deviation / math.sqrt(3)
    assert (found.low, found.mean, found.high) == pytest.approx((7 / 3 - half, 7 / 3, 7 / 3 + half), abs=1e-5)
    assert found.detectable == pytest.approx((4.302653 + 1.060660) * deviation / math.sqrt(3), abs=1e-5)


def test_intervals_cover_what_they_promise():
    rng = random.Random(0)
    covered = predicted = 0
    for _ in range(600):
        sample = [rng.gauss(0.3, 0.1) for _ in range(4)]
        found = paired(sample[:3])
        covered += found.low < 0.3 < found.high
        low, high = prediction_interval(sample[:3])
        predicted += low < sample[3] < high
    assert 0.92 < covered / 600 < 0.98 and 0.92 < predicted / 600 < 0.98
