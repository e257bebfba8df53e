import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mimic_fast.errors import SelfTestError
from mimic_fast.mutual_information.histogram import (
    chance_information,
    choose_bins,
    margin_entropy,
)
from mimic_fast.ops import counted_information, equal_mass_codes


@pytest.mark.parametrize(
    ("images", "bins"),
    [
        (36, 4),
        (195, 4),
        (196, 8),
        (483, 8),
        (484, 12),
        (899, 12),
        (900, 16),
        (2115, 16),
        (2116, 24),
    ],
)
def test_auto_takes_the_largest_bins_within_an_eighth_of_a_nat(images, bins):
    assert choose_bins("auto", images, force=False) == bins
    assert [choose_bins("auto", n, force=False) for n in (3843, 3844, 10**6)] == [24, 32, 32]


def test_too_few_images_for_any_bins_are_refused():
    with pytest.raises(SelfTestError, match=r"needs 72 clean images, got about 70.*mi.force"):
        choose_bins("auto", 35, force=False)

    assert choose_bins("auto", 35, force=True) == 4


def test_explicit_bins_over_the_limit_are_refused_unless_forced():
    assert choose_bins(16, 900, force=False) == 16
    with pytest.raises(SelfTestError, match=r"mi.bins = 16 needs 1800 clean images.*1798"):
        choose_bins(16, 899, force=False)

    assert choose_bins(16, 899, force=True) == 16


@given(st.integers(1, 200), st.integers(2, 40), st.integers(0, 10**6))
def test_untied_values_fill_the_bins_evenly_in_order(images, bins, seed):
    values = torch.rand(2, images, generator=torch.Generator().manual_seed(seed)).double()
    values += torch.arange(images) * 1e-9  # no ties

    codes = equal_mass_codes(values, bins=bins)

    for row, code in zip(values, codes, strict=True):
        masses = torch.bincount(code.long(), minlength=bins)
        assert int(masses.max() - masses.min()) <= 1
        assert bool((code[row.argsort()].diff() >= 0).all()), "codes must rise with the values"


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.integers(2, 12))
def test_ties_share_a_bin_and_order_is_kept(values, bins):
    row = torch.tensor([values], dtype=torch.float32)

    code = equal_mass_codes(row, bins=bins)[0].tolist()

    by_value = dict(zip(values, code, strict=True))
    assert [by_value[value] for value in values] == code
    assert sorted(by_value.values()) == [by_value[value] for value in sorted(by_value)]
    assert 0 <= min(code) <= max(code) < bins


def test_edges_inside_a_run_of_ties_move_to_its_nearer_end():
    row = torch.tensor([[0.0] * 3 + [1.0] * 5])  # the middle, 4, lies 1 from the start of the ones

    assert equal_mass_codes(row, bins=2)[0].tolist() == [0] * 3 + [1] * 5


def test_dead_units_give_the_same_bins_whatever_the_order_of_images():
    row = torch.rand(1, 300).clamp(min=0.5) - 0.5  # half of it zero
    order = torch.randperm(300)

    codes = equal_mass_codes(row, bins=8)

    assert torch.equal(codes[:, order], equal_mass_codes(row[:, order], bins=8))
    assert len(set(codes[row == 0].tolist())) == 1


def test_plug_in_equals_the_sum_over_cells():
    counts = torch.randint(0, 9, (3, 5, 5), generator=torch.Generator().manual_seed(0))

    found = counted_information(counts)

    for table, value in zip(counts.numpy(), found.tolist(), strict=True):
        p = table / table.sum()
        independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
        expected = sum(
            a * math.log(a / b)
            for a, b in zip(p.ravel(), independent.ravel(), strict=True)
            if a > 0
        )
        assert value == pytest.approx(expected, abs=1e-12)


def test_plug_in_is_symmetric_and_zero_for_a_product_table():
    counts = torch.randint(0, 9, (4, 6, 6))
    product = torch.outer(torch.tensor([1, 2, 3]), torch.tensor([2, 0, 5]))

    assert_close(counted_information(counts), counted_information(counts.mT))
    assert float(counted_information(product)) == pytest.approx(0, abs=1e-12)


def test_a_diagonal_table_holds_log_k_and_no_table_more_than_a_margin():
    diagonal = 7 * torch.eye(16, dtype=torch.int32)
    counts = torch.randint(0, 3, (50, 8, 8))

    assert float(counted_information(diagonal)) == pytest.approx(math.log(16))
    assert float(margin_entropy(diagonal.sum(dim=1))) == pytest.approx(math.log(16))
    margins = torch.minimum(margin_entropy(counts.sum(dim=1)), margin_entropy(counts.sum(dim=2)))
    assert bool((counted_information(counts) <= margins + 1e-12).all())


@pytest.mark.parametrize(
    ("x", "y"),
    [([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]), ([0, 0, 0, 0, 1, 2], [1, 1, 1, 0, 0, 2])],
    ids=["equal-mass", "tied"],
)
def test_chance_is_the_mean_over_all_pairings(x, y):
    tables = []
    for shuffled in itertools.permutations(y):
        table = torch.zeros(3, 3, dtype=torch.int64)
        for pair in zip(x, shuffled, strict=True):
            table[pair] += 1
        tables.append(table)
    counts = torch.stack(tables)

    chance = chance_information(counts[:1].sum(dim=2), counts[:1].sum(dim=1))

    assert float(chance) == pytest.approx(float(counted_information(counts).mean()), abs=1e-12)


def test_chance_stays_exact_for_many_images():
    generator = np.random.default_rng(0)
    codes = np.arange(5000) * 16 // 5000
    tables = [np.histogram2d(codes, generator.permutation(codes), bins=16)[0] for _ in range(300)]
    shuffled = counted_information(torch.tensor(np.array(tables)).long())
    margin = torch.bincount(torch.tensor(codes), minlength=16)[None]

    chance = float(chance_information(margin, margin))

    error = float(shuffled.std()) / math.sqrt(len(shuffled))
    assert abs(chance - float(shuffled.mean())) < 4 * error
