import math

import pytest

from mimic_fast.errors import SelfTestError
from mimic_fast.mutual_information.result import LayerEstimate
from mimic_fast.mutual_information.weights import (
    layer_shares,
    layer_weights,
    weighted_by,
    weighted_layers,
)


def estimate(tap, raw, **changes):
    fields = {"low": raw - 1, "high": raw + 1, "noise_floor": 0.1, "pairs": 3, "bins": 8}
    return LayerEstimate(tap=tap, raw=raw, determines_features=False, **(fields | changes))


def test_weights_are_those_of_the_authors_demo():
    # 1000 + 10000 * p with p = I / sum I (github.com/wssun/MIMIC, models/scheduler.py)
    shares = layer_shares([1.0, 2.0, 5.0])

    assert shares == (0.125, 0.25, 0.625)
    assert layer_weights(shares, base=1000.0, gain=10000.0) == (2250, 3500, 7250)


def test_no_information_anywhere_gives_uniform_shares_and_a_warning():
    with pytest.warns(UserWarning, match="no layer shows mutual information"):
        assert layer_shares([0.0, 0.0, 0.0, 0.0]) == (0.25,) * 4


def test_a_total_is_clamped_here_and_kept_as_it_came():
    first, second = weighted_layers([estimate("a", -0.2), estimate("b", 3.0)], base=10.0, gain=1.0)

    assert (first.value, first.raw, first.share, first.weight) == (0, -0.2, 0, 10)
    assert (second.value, second.share, second.weight) == (3, 1, 11)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_names_its_layer(value):
    with pytest.raises(SelfTestError, match=r"layer 'layer3' is (nan|inf)"):
        weighted_layers([estimate("layer1", 1.0), estimate("layer3", value)], base=1.0, gain=1.0)


def test_other_weightings_spread_the_same_sum():
    shares = (0.5, 0.3, 0.2)
    assert weighted_by(shares, "information") == shares
    assert weighted_by(shares, "uniform") == (1 / 3,) * 3
    assert weighted_by(shares, "inverse") == pytest.approx((0.25, 0.35, 0.4))
    assert weighted_by((1.0,), "inverse") == (1.0,)

    estimates = [estimate("a", 1.0), estimate("b", 3.0)]
    first, second = weighted_layers(estimates, base=10.0, gain=8.0, weighting="inverse")
    assert (first.share, second.share) == (0.25, 0.75)
    assert (first.weight, second.weight) == (16.0, 12.0)
