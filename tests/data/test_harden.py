import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mimic_fast.config import HardenSettings
from mimic_fast.data.harden import hardened

CANVAS = -1.0  # no content lies there, so that a pasted pixel shows


def canvas(count: int, *, channels: int = 3, side: int = 32) -> Tensor:
    return torch.full((count, channels, side, side), CANVAS)


def donors(count: int = 50, *, channels: int = 3, side: int = 32) -> Tensor:
    shape = (count, channels, side, side)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def one_rectangle(probability: float = 1.0, **changes: Any) -> HardenSettings:
    values: dict[str, Any] = {"probability": probability, "rectangles": 1} | changes
    return HardenSettings(**values)


def pasted(views: Tensor, settings: HardenSettings, **changes: Any) -> Tensor:
    key: dict[str, Any] = {"seed": 0, "epoch": 0} | changes
    ids = key.pop("ids", torch.arange(len(views)))
    pool = key.pop("pool", donors(channels=views.shape[1], side=views.shape[2]))
    return hardened(views, ids, pool, settings=settings, **key)


def masks(result: Tensor) -> Tensor:
    """Where something was pasted, ``[B, H, W]``; all channels of a pixel change together."""
    changed = result != CANVAS
    assert torch.equal(changed.any(1), changed.all(1))
    return changed.any(1)


def sides(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Heights and widths of the bounding boxes of ``[B, H, W]`` masks."""
    return mask.any(2).sum(1), mask.any(1).sum(1)


def test_input_is_left_as_it_was():
    views = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    kept, pool = views.clone(), donors()

    result = pasted(views, one_rectangle(0.9), pool=pool)

    assert torch.equal(views, kept)
    assert torch.equal(pool, donors())
    assert not torch.equal(result, views)
    assert (result.dtype, result.shape) == (views.dtype, views.shape)


def test_probability_zero_changes_nothing():
    views = canvas(8)

    assert torch.equal(pasted(views, one_rectangle(0.0)), views)


@pytest.mark.parametrize("rectangles", [1, 3])
@pytest.mark.parametrize("probability", [0.1, 0.75, 1.0])
def test_the_stated_share_of_images_is_changed(probability, rectangles):
    settings = one_rectangle(probability, rectangles=rectangles)

    changed = masks(pasted(canvas(4000, side=8), settings)).flatten(1).any(1)

    spread = 4 * math.sqrt(probability * (1 - probability) / 4000)
    assert abs(changed.double().mean().item() - probability) <= spread


def test_a_changed_image_is_changed_in_one_rectangle():
    mask = masks(pasted(canvas(500), one_rectangle()))

    height, width = sides(mask)

    assert torch.equal(mask.sum((1, 2)), height * width)


def test_more_rectangles_cover_more_of_every_image():
    one = one_rectangle(area=(0.05, 0.06))
    three = one.model_copy(update={"rectangles": 3})

    alone, together = masks(pasted(canvas(300), one)), masks(pasted(canvas(300), three))

    assert (alone <= together).all()  # the first of three is the one
    assert together.sum() > 2.5 * alone.sum()


@pytest.mark.parametrize("area", [(0.02, 0.25), (0.1, 0.1), (0.5, 0.9), (0.97, 0.99)], ids=str)
@pytest.mark.parametrize("side", [28, 32, 64])
def test_rectangles_keep_to_the_range_of_areas(area, side):
    settings = one_rectangle(area=area, kinds=("constant",))

    height, width = sides(masks(pasted(canvas(2000, channels=1, side=side), settings)))

    # Each side is rounded to a whole pixel, so the area moves by at most half of height + width.
    pixels = side * side
    slack = (height + width) / 2 + 0.25
    assert (height * width + slack >= area[0] * pixels).all()
    assert (height * width - slack <= area[1] * pixels).all()


def test_areas_and_shapes_are_log_uniform():
    settings = one_rectangle(area=(0.02, 0.25), kinds=("constant",))

    height, width = sides(masks(pasted(canvas(4000, channels=1, side=64), settings)))

    area = (height * width / 64**2).log()
    share = (area - math.log(0.02)) / math.log(0.25 / 0.02)
    aspect = ((height / width).log() / math.log(3) + 1) / 2
    for values in (share, aspect):
        counts = torch.histc(values, 4, 0, 1) / 4000
        assert (counts - 0.25).abs().max() < 0.03  # 4 standard errors, and rounding at the edges


def test_rectangles_lie_anywhere():
    settings = one_rectangle(area=(0.05, 0.06), kinds=("constant",))

    covered = masks(pasted(canvas(6000, channels=1), settings)).double().mean(0)

    assert covered.min() > 0  # corners included
    assert (covered - covered.flip(0)).abs().max() < 0.02
    assert (covered - covered.flip(1)).abs().max() < 0.02
    assert (covered - covered.T).abs().max() < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_constant_rectangles_have_one_color_each_of_all_colors(channels):
    settings = one_rectangle(kinds=("constant",))

    result = pasted(canvas(400, channels=channels), settings)

    inside = masks(result)
    colors = torch.stack([image[:, mask][:, 0] for image, mask in zip(result, inside, strict=True)])
    expected = torch.where(inside[:, None], colors[:, :, None, None], CANVAS)
    assert torch.equal(result, expected)
    assert len(colors.unique(dim=0)) == 400
    # Arcsine-distributed: a share of 2 asin(sqrt(0.1)) / pi lies within 0.1 of black, as of white.
    share = 2 / math.pi * math.asin(math.sqrt(0.1))
    for near in (colors < 0.1, colors > 0.9):
        spread = 4 * math.sqrt(share * (1 - share) / colors.numel())
        assert abs(near.double().mean().item() - share) < spread
    if channels == 3:
        assert torch.corrcoef(colors.T).fill_diagonal_(0).abs().max() < 0.2


def test_noise_rectangles_are_uniform_and_fresh_in_every_pixel():
    settings = one_rectangle(area=(0.2, 0.25), kinds=("noise",))

    result = pasted(canvas(100), settings)

    values = result[result != CANVAS]
    assert len(values.unique()) > 0.99 * len(values)  # 24 bits: few meet
    counts = torch.histc(values, 10, 0, 1) / len(values)
    assert (counts - 0.1).abs().max() < 4 * math.sqrt(0.09 / len(values))


@pytest.mark.parametrize("margin", [0, 5])
def test_image_rectangles_show_the_same_place_of_some_training_image(margin):
    pool = donors(20, side=32 + margin)
    settings = one_rectangle(area=(0.1, 0.2), kinds=("image",))

    result = pasted(canvas(200), settings, pool=pool)

    cut = slice(margin // 2, margin // 2 + 32)
    plain = pool[:, :, cut, cut].float() / 255
    used = set()
    for image, mask in zip(result, masks(result), strict=True):
        same = (plain[:, :, mask] == image[:, mask]).flatten(1).all(1)
        assert same.sum() == 1
        used.add(int(same.nonzero()))
    assert used == set(range(20))


def test_every_training_image_is_shown_also_beside_the_other_kinds():
    pool = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 16, 16)
    settings = one_rectangle(area=(0.1, 0.2), kinds=("noise", "image"))

    result = pasted(canvas(2000, channels=1, side=16), settings, pool=pool)

    values = [image[image != CANVAS] for image in result]
    shown = {round(v[0].item() * 255) for v in values if bool((v == v[0]).all())}
    assert shown == set(range(60))


def test_kinds_are_drawn_alike_often():
    pool = torch.full((2, 1, 16, 16), 255, dtype=torch.uint8)
    settings = one_rectangle(area=(0.1, 0.2))

    result = pasted(canvas(3000, channels=1, side=16), settings, pool=pool)

    values = [image[image != CANVAS] for image in result]
    white = sum(bool((v == 1).all()) for v in values)
    flat = sum(bool((v == v[0]).all()) for v in values) - white
    for count in (white, flat, 3000 - white - flat):
        assert abs(count - 1000) < 4 * math.sqrt(3000 * 2 / 9)


@pytest.mark.parametrize("kinds", [("image", "constant"), ("noise",)], ids="-".join)
def test_only_the_named_kinds_are_pasted(kinds):
    pool = torch.full((2, 1, 16, 16), 255, dtype=torch.uint8)
    settings = one_rectangle(area=(0.1, 0.2), kinds=kinds)

    result = pasted(canvas(300, channels=1, side=16), settings, pool=pool)

    values = [image[image != CANVAS] for image in result]
    assert any(bool((v == 1).all()) for v in values) == ("image" in kinds)
    assert any(bool((v == v[0]).all() and v[0] != 1) for v in values) == ("constant" in kinds)
    assert any(bool((v != v[0]).any()) for v in values) == ("noise" in kinds)


@pytest.mark.parametrize("batch", [1, 3, 24])
def test_an_image_is_perturbed_alike_in_any_batch(batch):
    views = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = one_rectangle(0.7, rectangles=2)
    pool = donors(side=16)
    expected = pasted(views, settings, pool=pool)

    for ids in torch.randperm(24, generator=torch.Generator().manual_seed(1)).split(batch):
        assert torch.equal(pasted(views[ids], settings, ids=ids, pool=pool), expected[ids])


@pytest.mark.parametrize("changes", [{"seed": 1}, {"epoch": 1}], ids=["seed", "epoch"])
def test_seeds_and_epochs_perturb_differently(changes):
    settings = one_rectangle()

    first, other = pasted(canvas(32), settings), pasted(canvas(32), settings, **changes)

    assert (first != other).flatten(1).any(1).all()
