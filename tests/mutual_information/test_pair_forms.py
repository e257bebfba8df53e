"""Crossed and sliced pairs: against plain loops, and against what Gaussians have of them."""

from statistics import fmean

import numpy as np
import pytest
import torch
from torch import Tensor

from mimic_fast.config import MutualInformationSettings
from mimic_fast.distributed import SINGLE
from mimic_fast.mutual_information import estimate as estimate_module
from mimic_fast.mutual_information.canonical import Fold, cross_fit_folds, whiten
from mimic_fast.mutual_information.counting import count_crossed, count_matched, jackknife_group
from mimic_fast.mutual_information.estimate import estimate_histogram
from mimic_fast.mutual_information.gaussian_table import gaussian_table
from mimic_fast.mutual_information.pair_forms import principal_sides, sliced_sides
from mimic_fast.mutual_information.pairs import pair_information, score_correlations
from mimic_fast.mutual_information.result import LayerEstimate
from mimic_fast.ops import equal_mass_codes

CROSS = MutualInformationSettings(pairs="cross")
SLICED = MutualInformationSettings(pairs="sliced", slices=100)
CHEAP = {"shuffles": 2, "jackknife_groups": 2}


def estimate(
    layer: Tensor, features: Tensor, *, settings: MutualInformationSettings, seed: int = 0
) -> LayerEstimate:
    (result,) = estimate_histogram([layer], features, settings, names=["layer"], seed=seed)
    return result


def sliced(layer: Tensor, features: Tensor, fold: Fold, *, slices: int = 50, seed: int = 0):
    whitening = whiten(features[fold.fit], components=64)
    return sliced_sides(
        layer,
        features,
        fold,
        features_whitening=whitening,
        components=64,
        slices=slices,
        seed=seed,
    )


def test_crossed_counts_are_those_of_plain_loops():
    x, y = torch.rand(3, 45), torch.rand(2, 45)
    codes = equal_mass_codes(x, bins=4), equal_mass_codes(y, bins=4)
    groups = jackknife_group(45, num_groups=4)

    counts = count_crossed(*codes, bins=4, num_groups=4, shuffles=2, processes=SINGLE)

    def table(i, j, roll, keep):
        rolled = codes[1][j].roll(roll)
        found = np.histogram2d(codes[0][i][keep], rolled[keep], bins=np.arange(5))[0]
        return torch.from_numpy(found).int()

    for i in range(3):
        for j in range(2):
            for g in range(4):
                assert torch.equal(counts.groups[g, 2 * i + j], table(i, j, 0, groups == g))
            for turn, roll in enumerate((1, 23)):
                assert torch.equal(counts.shuffled[turn, 2 * i + j], table(i, j, roll, groups >= 0))


def test_crossed_counts_of_one_direction_are_the_matched_ones():
    codes = [equal_mass_codes(torch.rand(1, 60), bins=4) for _ in "xy"]
    settings = {"bins": 4, "num_groups": 3, "shuffles": 5, "processes": SINGLE}

    crossed, matched = count_crossed(*codes, **settings), count_matched(*codes, **settings)

    assert torch.equal(crossed.groups, matched.groups)
    assert torch.equal(crossed.shuffled, matched.shuffled)


def test_cross_is_the_sum_over_every_pair_of_principal_directions(gaussian, monkeypatch):
    layer, features = gaussian(400, dims=3, correlation=0.7, seed=0)
    features = features[:, :2]
    expected = 0.0
    for fold in cross_fit_folds(400, seed=0):
        x, y = principal_sides(
            layer,
            features,
            fold,
            features_whitening=whiten(features[fold.fit], components=64),
            components=64,
        )
        groups = jackknife_group(200, num_groups=20)
        for i in range(3):
            for j in range(2):
                pair = x[i : i + 1], y[j : j + 1]
                codes = [equal_mass_codes(side, bins=8) for side in pair]
                counts = count_matched(*codes, bins=8, num_groups=20, shuffles=2, processes=SINGLE)
                r = score_correlations(*pair, groups, num_groups=20)
                expected += float(pair_information(counts.groups, r, gaussian_table(8, 200))[0]) / 2

    found = estimate(layer, features, settings=CROSS)
    monkeypatch.setattr(estimate_module, "_BLOCK", 4)
    in_blocks = estimate(layer, features, settings=CROSS)

    assert (found.pairs, found.bins) == (6, 8)
    assert found.raw == pytest.approx(expected, abs=1e-10)
    assert in_blocks.raw == pytest.approx(found.raw, abs=1e-10)
    assert in_blocks.noise_floor == pytest.approx(found.noise_floor, abs=1e-10)
    assert in_blocks.high == pytest.approx(found.high, abs=1e-10)


def test_cross_of_a_gaussian_is_the_sum_over_its_correlations():
    # y = A x + noise; the variances along principal directions differ, so that these are known
    variances = torch.tensor([9.0, 1.0]).double()
    mixing = torch.tensor([[0.6, 1.5], [0.1, 0.9]]).double()
    of_y, axes = torch.linalg.eigh(mixing @ variances.diag() @ mixing.T + torch.eye(2).double())
    correlations = variances.sqrt()[:, None] * (mixing.T @ axes) / of_y.sqrt()
    truth = float(-0.5 * torch.log1p(-correlations.square()).sum())
    found = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, noise = torch.randn(2, 2000, 2, generator=generator, dtype=torch.float64)
        x = x * variances.sqrt()
        found.append(estimate(x.float(), (x @ mixing.T + noise).float(), settings=CROSS).raw)

    assert fmean(found) == pytest.approx(truth, rel=0.05)


def test_crossed_layers_that_hold_the_features_are_marked_and_dead_ones_are_empty():
    features = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [8.0, 4.0, 2.0, 1.0]
    )

    assert estimate(3 * features, features, settings=CROSS).determines_features
    assert not estimate(torch.randn(400, 3), features, settings=CROSS).determines_features
    dead = estimate(torch.zeros(400, 3), features, settings=CROSS)
    assert (dead.pairs, dead.raw, dead.determines_features) == (0, 0, False)


@pytest.mark.parametrize("dims", [2, 4])
def test_sliced_gaussian_has_its_mean_over_directions(gaussian, dims):
    # correlation 0.9 t between slices, t the cosine of two random directions
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 10_000 - 1
    density = (1 - t * t).pow((dims - 3) / 2)
    density /= density.sum()
    truth = float((-0.5 * torch.log1p(-0.81 * t * t) * density).sum())

    settings = SLICED.model_copy(update={"slices": 200, **CHEAP})
    found = [
        estimate(
            *gaussian(1000, dims=dims, correlation=0.9, seed=seed), settings=settings, seed=seed
        ).raw
        for seed in range(2)
    ]

    assert fmean(found) == pytest.approx(truth, rel=0.15)


def test_slices_have_unit_variance_and_depend_on_the_seed_alone(gaussian):
    layer, features = gaussian(800, dims=5, correlation=0.5, seed=0)
    fold = cross_fit_folds(800, seed=0)[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()

    x, y = sliced(layer, features, fold)

    assert torch.equal(torch.get_rng_state(), before)
    assert x.shape == y.shape == (50, 400)
    assert float((x.std(dim=1) - 1).abs().max()) < 0.25
    assert all(map(torch.equal, sliced(layer, features, fold), (x, y)))
    assert not torch.equal(sliced(layer, features, fold, seed=1)[0], x)
    assert not torch.allclose(x, y, atol=0.1)


def test_sliced_is_a_mean_reproducible_and_the_same_in_blocks(gaussian, monkeypatch):
    data = gaussian(400, dims=3, correlation=0.9, seed=0)

    found = estimate(*data, settings=SLICED)
    again = estimate(*data, settings=SLICED)
    monkeypatch.setattr(estimate_module, "_BLOCK", 30)
    in_blocks = estimate(*data, settings=SLICED)

    assert again == found
    assert found.pairs == in_blocks.pairs == 100
    assert in_blocks.raw == pytest.approx(found.raw, abs=1e-12)
    assert in_blocks.high == pytest.approx(found.high, abs=1e-12)
    assert in_blocks.noise_floor == pytest.approx(found.noise_floor, abs=1e-12)
    assert 0.02 < found.raw < 0.4
    assert estimate(*data, settings=SLICED, seed=1).raw != found.raw


@pytest.mark.parametrize("settings", [CROSS, SLICED], ids=["cross", "sliced"])
def test_one_direction_a_side_leaves_nothing_to_choose(gaussian, settings):
    data = gaussian(1000, dims=1, correlation=0.8, seed=0)

    expected = estimate(*data, settings=MutualInformationSettings()).raw

    assert estimate(*data, settings=settings).raw == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("settings", [CROSS, SLICED], ids=["cross", "sliced"])
def test_interval_of_independent_data_contains_zero(gaussian, settings):
    found = [
        estimate(*gaussian(120, dims=3, correlation=0.0, seed=seed), settings=settings, seed=seed)
        for seed in range(10)
    ]

    assert sum(one.low <= 0 <= one.high for one in found) >= 8
    dead = estimate(torch.zeros(200, 3), torch.randn(200, 2), settings=settings)
    assert (dead.raw, dead.determines_features) == (0, False)
