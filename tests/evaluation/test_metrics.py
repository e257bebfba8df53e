"""Intervals against independent computations and published figures."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar as oracle

from mimic_fast.errors import UsageError
from mimic_fast.evaluation.metrics import (
    Measure,
    mcnemar,
    mean_measure,
    measure_json,
    paired_difference,
    share_of,
    t_quantile,
    wilson,
)


def paired(both: int, only_a: int, only_b: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return torch.tensor(a), torch.tensor(b)


@given(n=st.integers(1, 20_000), data=st.data())
def test_wilson_ends_solve_the_score_equation(n, data):
    successes = data.draw(st.integers(0, n))

    measure = wilson(successes, n)

    # Wilson's ends are the shares p from which the observed one is 1.96 standard errors away.
    for end in (measure.low, measure.high):
        distance = (measure.value - end) ** 2
        assert distance == pytest.approx(1.959963985**2 * end * (1 - end) / n, abs=1e-9)
    assert 0 <= measure.low <= measure.value <= measure.high <= 1
    assert measure.n == n


def test_wilson_matches_published_figures():
    # Newcombe, Statistics in Medicine 17:857 (1998), table I
    for (successes, n), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0000, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        measure = wilson(successes, n)
        assert (round(measure.low, 4), round(measure.high, 4)) == (low, high)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_share(successes, n):
    with pytest.raises(UsageError, match="successes"):
        wilson(successes, n)


def test_share_of_counts_true_flags():
    assert share_of(torch.tensor([True, False, True, True])) == wilson(3, 4)


def test_paired_difference_matches_newcombes_published_interval():
    # Newcombe, Statistics in Medicine 17:2635 (1998), method 10 for the pairs 36, 12, 2, 0.
    measure = paired_difference(*paired(36, 12, 2, 0))

    assert measure.value == pytest.approx(0.2)
    assert (round(measure.low, 4), round(measure.high, 4)) == (0.0569, 0.3404)
    assert measure.n == 50


CELLS = st.tuples(*[st.integers(0, 60)] * 4).filter(lambda cells: sum(cells) > 0)


@given(cells=CELLS)
def test_mcnemar_is_the_exact_test_of_statsmodels_in_either_order(cells):
    a, b = paired(*cells)
    both, only_a, only_b, neither = cells

    p = mcnemar(a, b)

    expected: Any = oracle([[both, only_a], [only_b, neither]], exact=True)
    assert p == pytest.approx(float(expected.pvalue), rel=1e-9)
    assert mcnemar(b, a) == p
    assert 0 < p <= 1
    assert p == 1 or abs(only_a - only_b) > 1


@pytest.mark.parametrize(
    "cells", [(700, 4600, 4900, 9), (0, 9000, 8000, 0), (5, 30_000, 29_400, 2)]
)
def test_mcnemar_stays_exact_for_many_pairs(cells):
    both, only_a, only_b, neither = cells

    p = mcnemar(*paired(*cells))

    expected: Any = oracle([[both, only_a], [only_b, neither]], exact=True)
    assert p == pytest.approx(float(expected.pvalue), rel=1e-8)


def test_mcnemar_at_its_ends():
    flags = torch.tensor([True, False, True])

    assert mcnemar(flags, flags) == 1
    assert mcnemar(*paired(0, 5, 0, 0)) == pytest.approx(2 / 2**5)
    assert 0 < mcnemar(*paired(0, 5000, 0, 0)) < 1e-300


def test_mcnemar_needs_the_same_images():
    flags = torch.tensor([True, False])
    with pytest.raises(UsageError, match="same images, got 2 and 1"):
        mcnemar(flags, flags[:1])
    with pytest.raises(UsageError, match="same images, got 0 and 0"):
        mcnemar(flags[:0], flags[:0])


@given(cells=CELLS)
def test_paired_difference_is_antisymmetric_and_bounded(cells):
    a, b = paired(*cells)

    forward, backward = paired_difference(a, b), paired_difference(b, a)

    assert forward.value == pytest.approx(-backward.value)
    assert forward.low == pytest.approx(-backward.high)
    assert -1 - 1e-9 <= forward.low <= forward.value <= forward.high <= 1 + 1e-9
    assert forward.high > forward.low


def test_paired_interval_is_tighter_than_the_unpaired_one_where_outcomes_agree():
    a, b = paired(700, 60, 20, 220)

    measure = paired_difference(a, b)

    first, second = share_of(a), share_of(b)
    unpaired = math.hypot(first.value - first.low, second.high - second.value)
    assert measure.value - measure.low < 0.7 * unpaired


def test_paired_interval_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(0)
    cells = generator.multinomial(300, [0.6, 0.15, 0.08, 0.17], size=400)

    measures = [paired_difference(*paired(*row.tolist())) for row in cells]

    covered = sum(measure.low <= 0.07 <= measure.high for measure in measures) / len(measures)
    assert 0.92 <= covered <= 0.985


def test_paired_difference_refuses_different_images():
    with pytest.raises(UsageError, match="same images, got 3 and 4"):
        paired_difference(torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 11, 12, 19, 60, 2000])
def test_t_quantile_leaves_2_5_percent_above(degrees):
    # The density integrated over the angle: with t = sqrt(v) tan(u) it is cos(u)^(v-1) up to scale.
    angles = np.linspace(0, math.pi / 2, 400_001)
    density = np.cos(angles) ** (degrees - 1)
    end = math.atan(t_quantile(degrees) / math.sqrt(degrees))
    inside = np.trapezoid(np.where(angles <= end, density, 0.0), angles)

    assert inside / np.trapezoid(density, angles) == pytest.approx(0.95, abs=2e-5)


def test_mean_measure_is_students_interval():
    measure = mean_measure(torch.tensor([0.91, 0.94, 0.95]))

    # mean 0.93333, standard deviation 0.0208167, t(2) = 4.302653
    half = 4.302653 * 0.0208167 / math.sqrt(3)
    assert measure.value == pytest.approx(0.9333333, abs=1e-6)
    assert measure.low == pytest.approx(0.9333333 - half, abs=1e-5)
    assert measure.high == pytest.approx(0.9333333 + half, abs=1e-5)
    assert measure.n == 3


def test_mean_measure_needs_two_values():
    with pytest.raises(UsageError, match="at least 2 values, got 1"):
        mean_measure(torch.ones(1))


def test_measure_json_has_the_four_keys_of_the_schema():
    assert measure_json(Measure(value=0.5, low=0.4, high=0.6, n=7)) == {
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n": 7,
    }
