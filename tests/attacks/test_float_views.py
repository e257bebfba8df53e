"""Views with gradients equal the training views, and pass gradients to the image."""

import torch

from mimic_fast.attacks.float_views import float_views
from mimic_fast.config import DataSettings
from mimic_fast.data.augment import apply_view
from mimic_fast.data.view_parameters import draw_view


def test_views_equal_those_of_training():
    # Smooth pictures: the two differ by whether a crop's edge sees beyond itself.
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(16, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)
    squares = (smooth * 255).round().to(torch.uint8)
    drawn = draw_view(torch.arange(16), side=32, settings=DataSettings(), seed=1, epoch=2, view=5)

    expected = apply_view(squares, drawn, image_size=32)
    found = float_views(squares.float() / 255, drawn)

    assert drawn.flip.any()
    assert drawn.gray.any()
    assert (found - expected).abs().mean() < 2e-3
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    assert (found[inner] - expected[inner]).abs().mean() < 1e-3


def test_gradients_reach_every_image():
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    drawn = draw_view(torch.arange(8), side=16, settings=DataSettings(), seed=0, epoch=0, view=5)

    float_views(images, drawn).square().sum().backward()

    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
