import math

import pytest
import torch
from torch.testing import assert_close

from mimic_fast.distributed import SINGLE
from mimic_fast.mutual_information.counting import bin_codes, count_matched, jackknife_group
from mimic_fast.mutual_information.gaussian_table import gaussian_table, normal_scores
from mimic_fast.mutual_information.pairs import (
    pair_information,
    score_correlations,
    shuffled_information,
)


def count_pairs(x, y, *, bins, **settings):
    codes = bin_codes((x, y), bins=bins, processes=SINGLE)
    return count_matched(*codes, bins=bins, processes=SINGLE, **settings)


def information(x, y, *, bins, num_groups=20):
    images = x.shape[1]
    counts = count_pairs(x, y, bins=bins, num_groups=num_groups, shuffles=2)
    groups = jackknife_group(images, num_groups=num_groups)
    r = score_correlations(x, y, groups, num_groups=num_groups)
    return pair_information(counts.groups, r, gaussian_table(bins, images)), r


def test_correlations_without_a_group_are_those_of_the_remaining_images():
    x, y = torch.randn(2, 3, 60)
    y = y + 2 * x
    groups = jackknife_group(60, num_groups=4)

    found = score_correlations(x, y, groups, num_groups=4)

    scores = normal_scores(x), normal_scores(y)
    for row, keep in enumerate([groups >= 0, *(groups != g for g in range(4))]):
        for pair in range(3):
            r = torch.stack([s[pair][keep] for s in scores]).corrcoef()[0, 1]
            assert_close(found[row, pair], (r.square() - 1 / 60).clamp(min=0).sqrt())


def test_a_side_without_variation_has_no_correlation_and_no_information():
    x, y = torch.ones(1, 80), torch.rand(1, 80)

    nats, r = information(x, y, bins=4)

    assert float(r.abs().max()) == 0
    assert_close(nats, torch.zeros_like(nats))


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_gaussian_pairs_have_no_bias(r):
    generator = torch.Generator().manual_seed(11)
    x, noise = torch.randn(2, 400, 200, generator=generator)

    nats, _ = information(x, r * x + math.sqrt(1 - r * r) * noise, bins=8)

    error = float(nats[0].std()) / 20
    assert float(nats[0].mean()) == pytest.approx(-0.5 * math.log(1 - r * r), abs=3 * error + 2e-3)


def test_what_is_not_gaussian_is_added_by_the_histogram():
    # y tells |x| and nothing of its sign: r = 0, and half of what y = x would tell in K bins
    half = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([half, -half], dim=1)

    nats, r = information(x, x.abs(), bins=16)

    assert float(r[0]) < 0.05
    assert float(nats[0]) == pytest.approx(math.log(8), abs=0.05)


@pytest.mark.parametrize("bins", [4, 16])
def test_no_pair_exceeds_log_k(bins):
    x = torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 1600, generator=torch.Generator().manual_seed(1))

    equal, _ = information(x, -x, bins=bins)
    nearly, r = information(x, x + 0.16 * noise, bins=bins)

    assert float(equal[0]) == pytest.approx(math.log(bins))
    assert 0.97 < float(r[0]) < 0.99
    assert float(nearly[0]) <= math.log(bins) + 1e-12


def test_two_values_hold_one_bit_however_strongly_they_agree():
    x = (torch.arange(400) % 2).float()[None]

    nats, _ = information(x, x, bins=8)

    assert float(nats[0]) == pytest.approx(math.log(2))


def test_shuffled_pairings_of_dependent_pairs_show_nothing():
    x = torch.randn(8, 1000, generator=torch.Generator().manual_seed(3))
    counts = count_pairs(x, x, bins=16, num_groups=2, shuffles=40)

    nats = shuffled_information(counts.shuffled)

    error = float(nats.std()) / math.sqrt(40)
    assert abs(float(nats.mean())) < 4 * error
    assert float(nats.std()) < 0.1
