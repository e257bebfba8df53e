"""Whole-image perturbations of the student's view."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mimic_fast.config import HardenSettings
from mimic_fast.data.harden import hardened

SIDE = 32


def only(**changes: Any) -> HardenSettings:
    return HardenSettings(**({"probability": 1.0, "rectangles": 0} | changes))


def perturbed(views: Tensor, pool: Tensor, settings: HardenSettings, **changes: Any) -> Tensor:
    key: dict[str, Any] = {"seed": 0, "epoch": 0, "ids": torch.arange(len(views))} | changes
    return hardened(views, key.pop("ids"), pool, settings=settings, **key)


@pytest.fixture
def views() -> Tensor:
    return torch.rand(200, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3


def white(count: int = 5) -> Tensor:
    return torch.full((count, 3, SIDE, SIDE), 255, dtype=torch.uint8)


def test_a_blend_lies_between_the_view_and_the_donor_at_opacities_up_to_the_most(views):
    result = perturbed(views, white(), only(blend=0.4))

    opacity = ((result - views) / (1 - views)).flatten(1)
    assert (opacity.amax(1) - opacity.amin(1)).max() < 1e-5  # one opacity an image
    assert 0 <= opacity.min() < 0.02
    assert 0.38 < opacity.max() < 0.4
    assert abs(opacity.mean().item() - 0.2) < 4 * 0.4 / math.sqrt(12 * 200)


def test_donors_are_images_of_the_pool_uncropped(views):
    donor = torch.randint(256, (1, 3, SIDE + 8, SIDE + 8), dtype=torch.uint8)
    result = perturbed(torch.zeros_like(views), donor, only(blend=1.0))

    middle = donor[0, :, 4:-4, 4:-4].float() / 255
    scale = result.flatten(1).amax(1) / middle.max()
    torch.testing.assert_close(result, scale[:, None, None, None] * middle)


def test_a_wave_is_one_sinusoid_of_an_amplitude_for_each_channel(views):
    middle = torch.full_like(views, 0.5)

    change = (perturbed(middle, white(), only(waves=0.1)) - 0.5).double()

    assert change.abs().max() <= 0.1
    assert change.abs().amax((1, 2, 3)).max() > 0.09
    # Channels hold the same wave: all are multiples of one pattern.
    flat = change.flatten(2)
    values = torch.linalg.svdvals(flat)
    assert (values[:, 1] < 1e-5).all()
    # On a line of pixels a sinusoid obeys w[n+1] + w[n-1] = c w[n] with |c| <= 2.
    for lines in (flat.view(-1, 3, SIDE, SIDE), flat.view(-1, 3, SIDE, SIDE).mT):
        inner = lines[..., 1:-1]
        both = lines[..., 2:] + lines[..., :-2]
        factor = (both * inner).sum((1, 2, 3)) / inner.square().sum((1, 2, 3))
        rest = both - factor[:, None, None, None] * inner
        assert rest.abs().max() < 1e-5
        assert factor.abs().max() <= 2 + 1e-6


def test_waves_stay_within_the_range_of_images(views):
    result = perturbed(views.round(), white(), only(waves=1.0))

    assert result.min() == 0
    assert result.max() == 1


@pytest.mark.parametrize("settings", [only(blend=0.3), only(waves=0.2)], ids=["blend", "waves"])
def test_an_image_is_perturbed_alike_in_any_batch_and_anew_in_every_pass(views, settings):
    pool = torch.randint(256, (30, 3, SIDE, SIDE), dtype=torch.uint8)
    ids = torch.randperm(200)[:50]

    whole = perturbed(views, pool, settings)

    assert torch.equal(perturbed(views[ids], pool, settings, ids=ids), whole[ids])
    passes = torch.full((200,), 3)
    other = perturbed(views, pool, settings, epoch=passes)
    assert torch.equal(other, perturbed(views, pool, settings, epoch=3))
    assert (other != whole).flatten(1).any(1).all()
    assert (perturbed(views, pool, settings, seed=1) != whole).flatten(1).any(1).all()


def test_the_stated_share_is_perturbed_and_the_input_stays(views):
    kept = views.clone()
    settings = only(probability=0.5, blend=0.3, waves=0.2)

    changed = (perturbed(views, white(), settings) != views).flatten(1).any(1)

    assert torch.equal(views, kept)
    assert abs(changed.double().mean().item() - 0.5) <= 4 * math.sqrt(0.25 / 200)


def test_rectangles_come_on_top(views):
    plain = perturbed(views, white(), only(blend=0.3))
    pasted = perturbed(views, white(), only(blend=0.3, rectangles=1))

    inside = (pasted != plain).any(1)
    share = inside.double().mean((1, 2))
    assert ((share > 0) & (share < 0.4)).all()


def test_a_probability_without_anything_to_do_is_refused():
    with pytest.raises(ValidationError, match="rectangles, blend and waves are all 0"):
        only()
