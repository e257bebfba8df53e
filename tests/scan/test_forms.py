import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimic_fast.scan.forms import ADDITIVE, PATCH, from_probe, grey_square, mask_of_size, noise
from mimic_fast.scan.probing import patch_probes


@given(
    size=st.floats(1e-4, 0.9),
    spread=st.floats(0, 20),
    side=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_mask_has_the_size_asked_for(size, spread, side, seed):
    draw = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(1, side, side, generator=draw, dtype=torch.float64)

    mask = mask_of_size(logits, size)

    assert float(mask.mean()) == pytest.approx(size, rel=1e-6)
    assert float(mask.min()) >= 0
    assert float(mask.max()) <= 1


def test_mask_gradient_follows_the_shift():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 4, 5, generator=draw, dtype=torch.float64)

    (mask_of_size(logits, 0.2) * weights).sum().backward()

    assert logits.grad is not None
    step = 1e-4  # the shift is found to 1e-10
    for index in ((0, 0, 0), (0, 2, 3), (0, 3, 4)):
        near = [logits.detach().clone() for _ in range(2)]
        near[0][index] += step
        near[1][index] -= step
        high, low = ((mask_of_size(point, 0.2) * weights).sum() for point in near)
        assert float(logits.grad[index]) == pytest.approx(float(high - low) / (2 * step), abs=1e-5)


def test_additive_pattern_has_the_size_asked_for():
    start = noise(image_size=8, channels=3, generator=torch.Generator().manual_seed(0))

    mask, pattern = ADDITIVE.build(start, 0.03)

    assert float(pattern.square().mean().sqrt()) == pytest.approx(0.03, rel=1e-5)
    assert bool((mask == 1).all())


def test_stamps_keep_pixels_in_range_and_paste_or_add():
    images = torch.full((2, 3, 4, 4), 0.9)
    mask, pattern = torch.full((1, 4, 4), 0.5), torch.full((3, 4, 4), 0.4)

    assert torch.allclose(PATCH.stamp(images, mask, pattern), torch.tensor(0.65))
    assert torch.equal(ADDITIVE.stamp(images, mask, pattern), torch.ones_like(images))


def test_start_from_a_probe_shows_it():
    draw = torch.Generator().manual_seed(0)
    probe = next(patch_probes(image_size=16, channels=3, seed=0))  # white

    mask, pattern = PATCH.build(from_probe(probe, draw), float(probe.mask.mean()))

    inside = probe.mask[0] > 0
    assert float(mask[0][inside].min()) > 5 * float(mask[0][~inside].max())
    assert float(pattern[:, inside].mean()) > 0.8


@pytest.mark.parametrize(("top", "left"), [(0.0, 0.0), (1.0, 1.0), (0.5, 0.25)])
def test_grey_square_lies_inside(top, left):
    draw = torch.Generator().manual_seed(0)

    logits, colors = grey_square(image_size=16, channels=1, top=top, left=left, generator=draw)

    assert int((logits > 2).sum()) == 25
    assert colors.shape == (1, 16, 16)
