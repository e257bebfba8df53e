"""Steps in a color space: they ascend, stay inside, and leave brightness alone if asked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimic_fast.attacks.colors import color_direction
from mimic_fast.attacks.inactive import take_step

LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


@given(st.integers(0, 2**31), st.sampled_from([1, 3]), st.floats(0, 1))
def test_a_direction_ascends_and_its_largest_change_is_one(seed, channels, luma):
    gradient = torch.randn(channels, 5, 5, generator=torch.Generator().manual_seed(seed))

    direction = color_direction(gradient, luma=luma)

    assert (direction * gradient).sum() > 0
    assert direction.abs().amax() == pytest.approx(1)


def test_no_luma_no_change_of_brightness():
    gradient = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))

    direction = color_direction(gradient, luma=0.0)

    torch.testing.assert_close((direction * LUMA).sum(0), torch.zeros(6, 6), atol=1e-6, rtol=0)


def test_nothing_to_ascend_is_no_direction():
    assert torch.equal(color_direction(torch.zeros(3, 4, 4), luma=0.5), torch.zeros(3, 4, 4))


def test_steps_stay_within_the_bound():
    pattern = torch.full((3, 4, 4), 0.03)

    take_step(pattern, -torch.rand(3, 4, 4), step=0.1, bound=0.05, luma=1.0)

    assert pattern.abs().max() <= 0.05
    assert pattern.max() == pytest.approx(0.05)
