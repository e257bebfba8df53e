"""The estimator against closed forms, the coverage of its interval, and degenerate layers."""

import math
from statistics import fmean

import pytest
import torch
from torch import Tensor

from mimic_fast.config import MutualInformationSettings
from mimic_fast.errors import SelfTestError
from mimic_fast.mutual_information.estimate import estimate_histogram
from mimic_fast.mutual_information.result import LayerEstimate

DEFAULT = MutualInformationSettings()


def estimate(
    layer: Tensor, features: Tensor, *, settings: MutualInformationSettings = DEFAULT, seed: int = 0
) -> LayerEstimate:
    (result,) = estimate_histogram([layer], features, settings, names=["layer"], seed=seed)
    return result


@pytest.mark.parametrize("correlation", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("dims", [1, 4, 8])
def test_gaussians_under_random_linear_maps_give_their_closed_form(gaussian, dims, correlation):
    truth = -dims * math.log(1 - correlation**2) / 2

    found = [
        estimate(*gaussian(2000, dims=dims, correlation=correlation, seed=seed)).raw
        for seed in range(5)
    ]

    assert abs(fmean(found) - truth) <= max(0.05, 0.1 * truth)


@pytest.mark.parametrize(("images", "dims"), [(2000, 4), (400, 2)])
def test_interval_of_independent_data_contains_zero(gaussian, images, dims):
    found = [
        estimate(*gaussian(images, dims=dims, correlation=0.0, seed=seed), seed=seed)
        for seed in range(100)
    ]

    assert sum(one.low <= 0 <= one.high for one in found) >= 90
    # unbiased without clamping: the mean of 100 is 0 but for its own error
    values = torch.tensor([one.raw for one in found])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 10
    assert sum(one.raw > (one.noise_floor or 0) for one in found) <= 15


def test_interval_of_dependent_data_contains_the_closed_form(gaussian):
    truth = -2 * math.log(1 - 0.6**2) / 2

    found = [
        estimate(*gaussian(1000, dims=2, correlation=0.6, seed=seed), seed=seed)
        for seed in range(40)
    ]

    assert sum(one.low <= truth <= one.high for one in found) >= 35
    width = fmean(one.high - one.low for one in found)
    spread = float(torch.tensor([one.raw for one in found]).std())
    assert 2 * 1.4 * spread < width < 2 * 4 * spread


def test_independent_layer_of_a_real_size_stays_at_zero(gaussian):
    # 64 pairs: an error of 0.002 nats a pair would show
    found = estimate(*gaussian(2000, dims=64, correlation=0.0, seed=1))

    assert found.pairs == 64
    assert abs(found.raw) < 0.25
    assert found.low < 0 < found.high


def test_a_layer_from_which_features_follow_is_capped_and_marked():
    features = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    layer = features @ torch.randn(5, 9, generator=torch.Generator().manual_seed(1))

    found = estimate(layer, features)

    assert (found.pairs, found.bins) == (5, 8)
    assert found.raw == pytest.approx(5 * math.log(8))
    assert found.determines_features


def test_noise_beside_the_features_is_not_marked(gaussian):
    assert not estimate(*gaussian(400, dims=4, correlation=0.9, seed=0)).determines_features


def test_a_dead_layer_has_no_pairs_and_no_information():
    features = torch.randn(100, 5)

    found = estimate(torch.zeros(100, 7), features)

    assert (found.pairs, found.raw, found.low, found.high) == (0, 0, 0, 0)
    assert not found.determines_features


def test_half_dead_units_are_measured_the_same_in_any_order_of_units():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(800, 6, generator=generator)
    noise = torch.randn(800, 6, generator=generator)
    layer = (features + 0.5 * noise).relu()  # half of every unit's values are exactly 0
    one = layer[:, :1]

    found = estimate(layer, features)

    assert found.raw > 6 * 0.3
    assert estimate(layer.flip(1), features).raw == pytest.approx(found.raw, abs=0.05)
    assert estimate(one, one).raw <= math.log(8)


def test_components_limit_the_pairs(gaussian):
    settings = MutualInformationSettings(components=3)

    assert estimate(*gaussian(400, dims=8, correlation=0.5, seed=0), settings=settings).pairs == 3


def test_layers_are_estimated_apart_and_keep_their_names(gaussian):
    layer, features = gaussian(400, dims=3, correlation=0.7, seed=0)
    other = torch.randn(400, 2)

    first, second = estimate_histogram([layer, other], features, DEFAULT, names=["a", "b"], seed=0)

    assert (first.tap, second.tap) == ("a", "b")
    assert first.raw == estimate(layer, features).raw
    assert second.raw == estimate(other, features).raw


def test_the_global_random_state_plays_no_part(gaussian):
    data = gaussian(300, dims=3, correlation=0.7, seed=0)
    torch.manual_seed(1)
    before = torch.get_rng_state()

    first = estimate(*data)

    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert estimate(*data) == first
    assert estimate(*data, seed=1).raw != first.raw


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_name_their_layer(value):
    rows = torch.randn(100, 4)
    bad = rows.clone()
    bad[7, 2] = value

    with pytest.raises(SelfTestError, match="'layer' must be finite"):
        estimate(bad, rows)
    with pytest.raises(SelfTestError, match="'features' must be finite"):
        estimate(rows, bad)


def test_too_many_bins_for_the_images_are_refused_unless_forced(gaussian):
    data = gaussian(1000, dims=2, correlation=0.5, seed=0)

    with pytest.raises(SelfTestError, match=r"mi\.bins = 32"):
        estimate(*data, settings=MutualInformationSettings(bins=32))

    forced = estimate(*data, settings=MutualInformationSettings(bins=32, force=True))
    assert forced.bins == 32
    assert forced.raw == pytest.approx(-math.log(1 - 0.25), abs=0.15)  # corrected all the same
