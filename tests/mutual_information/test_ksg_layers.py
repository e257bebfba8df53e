"""Nearest neighbors on canonical directions: closed forms, coverage, degenerate layers."""

import math
from statistics import fmean

import pytest
import torch
from torch import Tensor

from mimic_fast.config import MutualInformationSettings
from mimic_fast.errors import SelfTestError
from mimic_fast.mutual_information.ksg_layers import estimate_ksg
from mimic_fast.mutual_information.result import LayerEstimate

FEW = MutualInformationSettings(estimator="ksg", shuffles=2, jackknife_groups=2)


def estimate(
    layer: Tensor, features: Tensor, *, settings: MutualInformationSettings = FEW, seed: int = 0
) -> LayerEstimate:
    (result,) = estimate_ksg([layer], features, settings, names=["layer"], seed=seed)
    return result


@pytest.mark.parametrize("correlation", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("dims", [1, 2])
def test_gaussians_in_few_dimensions_give_their_closed_form(gaussian, dims, correlation):
    truth = -dims * math.log(1 - correlation**2) / 2

    found = [
        estimate(*gaussian(1000, dims=dims, correlation=correlation, seed=seed)).raw
        for seed in range(3)
    ]

    assert abs(fmean(found) - truth) <= max(0.07, 0.1 * truth)


def test_interval_of_independent_data_contains_zero(gaussian):
    settings = FEW.model_copy(update={"jackknife_groups": 5})
    found = [
        estimate(*gaussian(80, dims=2, correlation=0.0, seed=seed), settings=settings, seed=seed)
        for seed in range(100)
    ]

    assert sum(one.low <= 0 <= one.high for one in found) >= 90


def test_dependence_that_no_pair_of_directions_shows_is_seen():
    # the sign of the product of three is fixed: any two of them are independent
    signs = torch.randint(0, 2, (600, 2), generator=torch.Generator().manual_seed(0)) * 2 - 1
    third = signs.prod(dim=1, keepdim=True)
    noise = 0.3 * torch.randn(600, 4, generator=torch.Generator().manual_seed(1))
    features = torch.cat([third, 0 * third], dim=1) + noise[:, 2:]
    settings = MutualInformationSettings(estimator="ksg")

    found = estimate(signs + noise[:, :2], features, settings=settings)

    assert found.low > 0.1
    assert found.noise_floor is not None
    assert found.raw > found.noise_floor


def test_at_most_eight_directions_are_measured(gaussian):
    found = estimate(*gaussian(200, dims=12, correlation=0.5, seed=0))

    assert (found.pairs, found.bins) == (8, None)


def test_a_layer_from_which_features_follow_is_marked():
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))

    found = estimate(features @ torch.randn(4, 9), features)

    assert found.determines_features
    ceiling = float(torch.tensor([100.0, 3.0]).digamma().diff().abs())
    assert found.raw == pytest.approx(ceiling, rel=0.1)
    assert not estimate(torch.randn(200, 4), features).determines_features


def test_a_dead_layer_has_no_information():
    found = estimate(torch.zeros(100, 7), torch.randn(100, 5))

    assert (found.pairs, found.raw, found.low, found.high) == (0, 0, 0, 0)
    assert not found.determines_features


def test_tied_values_give_what_they_tell():
    one = (torch.arange(400) % 2).float()[:, None]

    assert estimate(one, one).raw == pytest.approx(math.log(2), abs=0.1)
    other = torch.randint(0, 2, (400, 1), generator=torch.Generator().manual_seed(0)).float()
    assert abs(estimate(one, other).raw) < 0.1


def test_layers_are_estimated_apart_and_the_global_random_state_plays_no_part(gaussian):
    layer, features = gaussian(200, dims=3, correlation=0.7, seed=0)
    other = torch.randn(200, 2)
    torch.manual_seed(1)
    before = torch.get_rng_state()

    first, second = estimate_ksg([layer, other], features, FEW, names=["a", "b"], seed=0)

    assert torch.equal(torch.get_rng_state(), before)
    assert (first.tap, second.tap) == ("a", "b")
    assert first.raw == estimate(layer, features).raw
    assert second.raw == estimate(other, features).raw
    assert estimate(layer, features, seed=1).raw != first.raw


def test_bad_input_is_named():
    rows = torch.randn(100, 4)
    bad = rows.clone()
    bad[7, 2] = math.nan

    with pytest.raises(SelfTestError, match="'layer' must be finite"):
        estimate(bad, rows)
    with pytest.raises(SelfTestError, match="'ksg' needs 8 clean images, got 7"):
        estimate(rows[:7], rows[:7])
