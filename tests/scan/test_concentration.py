import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.scan.concentration import clean_center, concentration


def by_pairs(features: Tensor, center: Tensor) -> float:
    """The definition, pair by pair, in float64."""
    moved = (features - center).double()
    cosines = [
        float(moved[i] @ moved[j] / (moved[i].norm() * moved[j].norm()))
        for i in range(len(moved))
        for j in range(len(moved))
        if i != j
    ]
    return sum(cosines) / len(cosines)


@given(count=st.integers(2, 9), width=st.integers(1, 7), seed=st.integers(0, 99))
def test_is_the_mean_cosine_over_pairs(count, width, seed):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=draw, dtype=torch.float64)
    center = torch.randn(width, generator=draw, dtype=torch.float64)

    value = concentration(features, center)

    assert float(value) == pytest.approx(by_pairs(features, center), abs=1e-12)


def test_collapsed_features_have_one_and_scattered_ones_none():
    draw = torch.Generator().manual_seed(0)
    scattered = torch.randn(2000, 16, generator=draw)
    point = torch.full((50, 16), 3.0) + 1e-4 * torch.randn(50, 16, generator=draw)

    assert float(concentration(point, scattered.mean(0))) == pytest.approx(1, abs=1e-5)
    assert abs(float(concentration(scattered, scattered.mean(0)))) < 1e-3


def test_gradient_is_autograd_checked():
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    center = torch.randn(4, generator=draw, dtype=torch.float64)

    assert torch.autograd.gradcheck(lambda x: concentration(x, center), (features,))


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, images: Tensor) -> Tensor:
        return self.value.expand(len(images), 48)


def test_encoder_that_tells_nothing_apart_is_refused(wrapped, pixels):
    with pytest.raises(UsageError, match="same features"):
        clean_center(wrapped(Constant(1.0)), pixels, batch_size=32)


def test_features_that_are_not_finite_are_refused(wrapped, pixels):
    with pytest.raises(UnsafeInputError, match="not finite"):
        clean_center(wrapped(Constant(float("nan"))), pixels, batch_size=32)
