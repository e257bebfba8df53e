import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from mimic_fast.config import DataSettings
from mimic_fast.data.augment import augmented_view, plain_view
from mimic_fast.data.color import jitter, to_gray
from mimic_fast.data.counter import uniforms
from mimic_fast.data.view_parameters import crop_boxes

TRIES = 10  # of torchvision's RandomResizedCrop
STILL: dict[str, Any] = {"flip": 0.0, "jitter_probability": 0.0, "grayscale": 0.0}
WHOLE: dict[str, Any] = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
# Measured: 4e-7. float32 weights of two separable products against torch's fused filter.
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 3e-6}


def images(count: int, *, channels: int = 3, side: int = 32, seed: int = 0) -> Tensor:
    shape = (count, channels, side, side)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator).to(torch.uint8)


def view(pool: Tensor, ids: Tensor, settings: DataSettings, **changes: Any) -> Tensor:
    key: dict[str, Any] = {"image_size": 32, "seed": 0, "epoch": 0, "view": 1} | changes
    return augmented_view(pool[ids], ids, settings=settings, **key)


def torchvision_box(u: list[float], side: int, settings: DataSettings) -> tuple[int, ...]:
    """RandomResizedCrop.get_params, fed with numbers instead of torch's generator."""
    area, shape, up, left = (u[TRIES * k : TRIES * (k + 1)] for k in range(4))
    low, high = settings.crop_scale
    log_low, log_high = (math.log(ratio) for ratio in settings.crop_ratio)
    for t in range(TRIES):
        target = side * side * (low + (high - low) * area[t])
        ratio = math.exp(log_low + (log_high - log_low) * shape[t])
        width, height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < width <= side and 0 < height <= side:
            top, start = int(up[t] * (side - height + 1)), int(left[t] * (side - width + 1))
            return top, start, height, width
    return fallback_box(side, settings.crop_ratio)


def fallback_box(side: int, ratio: tuple[float, float]) -> tuple[int, ...]:
    """What torchvision's own code gives when no try fits (an impossible scale)."""
    image = torch.empty(1, side, side)
    top, left, height, width = RandomResizedCrop.get_params(image, [4.0, 4.0], list(ratio))
    return top, left, height, width


CHANGES = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def torchvision_view(image: Tensor, u: list[float], size: int, settings: DataSettings) -> Tensor:
    """One view by torchvision's functions: crop, flip, jitter, gray."""
    top, left, height, width = torchvision_box(u, image.shape[-1], settings)
    result = tv.resized_crop(
        image.float() / 255, top, left, height, width, [size, size], antialias=True
    )
    flip, chosen, *amounts, p0, p1, p2, p3, gray, _ = u[4 * TRIES :]
    if flip < settings.flip:
        result = tv.horizontal_flip(result)
    if chosen < settings.jitter_probability:
        for change in sorted(range(4), key=[p0, p1, p2, p3].__getitem__):
            if settings.jitter[change] == 0 or (image.shape[0] == 1 and change > 1):
                continue
            amount = (2 * amounts[change] - 1) * settings.jitter[change]
            result = CHANGES[change](result, amount if change == 3 else 1 + amount)
    if image.shape[0] == 3 and gray < settings.grayscale:
        result = tv.rgb_to_grayscale(result, num_output_channels=3)
    return result


@pytest.mark.parametrize(
    ("channels", "side", "size"),
    [(3, 32, 32), (3, 37, 32), (1, 32, 28), (1, 28, 28), (3, 24, 40)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.9, 1.0)], ids=str)
def test_views_equal_torchvision_fed_with_the_same_numbers(channels, side, size, scale):
    settings = DataSettings(crop_scale=scale)
    pool, ids = images(48, channels=channels, side=side), torch.arange(48)

    found = view(pool, ids, settings, image_size=size, seed=5, epoch=2, view=2)

    u = uniforms(ids, 4 * TRIES + 12, seed=5, epoch=2, stream=2).tolist()
    assert found.shape == (48, channels, size, size)
    assert found.dtype == torch.float32
    for image, numbers, result in zip(pool, u, found, strict=True):
        torch.testing.assert_close(
            result, torchvision_view(image, numbers, size, settings), **CLOSE
        )


@pytest.mark.parametrize(("index", "strength"), [(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.5)])
@pytest.mark.parametrize("share", [-1.0, -0.37, 0.0, 0.61, 1.0])
def test_each_color_change_equals_torchvision(index, strength, share):
    pool = images(6).float() / 255
    pool[0] = 0.0
    pool[1] = 1.0
    pool[2] = 0.25  # gray: hue and saturation have nothing to hold on to
    amount = share * strength
    amounts = torch.zeros(6, 4)
    amounts[:, index] = amount

    found = jitter(
        pool,
        amounts=amounts,
        chosen=torch.ones(6, dtype=torch.bool),
        order=torch.arange(4).expand(6, 4),
    )

    expected = CHANGES[index](pool, amount if index == 3 else 1 + amount)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_color_changes_of_different_order_differ():
    pool = images(1).float() / 255

    def jittered(order: list[int]) -> Tensor:
        return jitter(
            pool,
            amounts=torch.tensor([[0.32, -0.32, 0.24, -0.06]]),
            chosen=torch.tensor([True]),
            order=torch.tensor([order]),
        )

    expected = pool
    for change, amount in ((2, 1.24), (0, 1.32), (3, -0.06), (1, 0.68)):
        expected = CHANGES[change](expected, amount)
    torch.testing.assert_close(jittered([2, 0, 3, 1]), expected, **CLOSE)
    assert (jittered([2, 0, 3, 1]) - jittered([0, 1, 2, 3])).abs().max() > 0.01


def test_gray_is_torchvisions_luma():
    pool = images(4).float() / 255

    torch.testing.assert_close(to_gray(pool), tv.rgb_to_grayscale(pool), **CLOSE)
    assert torch.equal(to_gray(pool[:, :1]), pool[:, :1])


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [
        ((0.08, 1.0), (0.75, 4 / 3)),
        ((0.2, 1.0), (0.75, 4 / 3)),
        ((0.8, 1.0), (0.4, 2.5)),  # most tries do not fit, some images fall back to the center
    ],
    ids=["demo", "default", "tight"],
)
def test_crop_boxes_are_distributed_as_torchvisions(scale, ratio):
    draws, side = 10_000, 32
    settings = DataSettings(crop_scale=scale, crop_ratio=ratio)
    u = uniforms(torch.arange(draws), 4 * TRIES, seed=0, epoch=0, stream=1)
    torch.manual_seed(0)
    image = torch.empty(1, side, side)

    found = crop_boxes(u, side, settings)

    boxes = [RandomResizedCrop.get_params(image, [*scale], [*ratio]) for _ in range(draws)]
    expected = torch.tensor(boxes).double()
    weights = torch.tensor([1.0, 0.37, 0.11, 0.053]).double()  # a mix shows wrong dependence
    for column in [*range(4), weights]:
        ours, theirs = (
            t[:, column] if isinstance(column, int) else t @ column
            for t in (found.double(), expected)
        )
        # Kolmogorov and Smirnov's distance; 1.95 is the bound at a risk of 0.001.
        grid = torch.cat([ours, theirs]).unique()
        steps = [torch.searchsorted(t.sort()[0], grid, right=True) / draws for t in (ours, theirs)]
        assert (steps[0] - steps[1]).abs().max() < 1.95 * math.sqrt(2 / draws)


@pytest.mark.parametrize(
    "ratio", [(0.1, 0.3), (0.3, 0.5), (3.0, 10.0), (1.5, 2.0), (0.2, 5.0)], ids=str
)
@pytest.mark.parametrize("side", [28, 32, 37])
def test_fallback_is_torchvisions_central_crop(ratio, side):
    settings = DataSettings(crop_scale=(1.0, 1.0), crop_ratio=ratio)
    # Every try asks for the full area at a ratio other than 1, which cannot fit.
    u = torch.full((3, 4 * TRIES), 0.25)

    boxes = crop_boxes(u, side, settings)

    assert boxes.tolist() == [list(fallback_box(side, ratio))] * 3


def test_boxes_lie_in_the_image_and_reach_its_edges():
    u = uniforms(torch.arange(20_000), 4 * TRIES, seed=1, epoch=0, stream=1)

    top, left, height, width = crop_boxes(u, 32, DataSettings()).unbind(1)

    assert (top.min(), left.min()) == (0, 0)
    assert ((top + height).max(), (left + width).max()) == (32, 32)
    area = height * width  # each side is rounded to a whole pixel
    assert 0.2 * 32 * 32 - 16 <= area.min() < area.max() == 32 * 32
    assert torch.equal(torch.stack([top, left]).round(), torch.stack([top, left]))


@pytest.mark.parametrize("side", [32, 40])
def test_whole_crop_is_the_image_resized(side):
    pool = images(3, side=side)

    found = view(pool, torch.arange(3), DataSettings(**WHOLE, **STILL))

    expected = tv.resize(pool.float() / 255, [32, 32], antialias=True)
    torch.testing.assert_close(found, expected, **CLOSE)
    if side == 32:
        torch.testing.assert_close((found * 255).round().to(torch.uint8), pool)


@pytest.mark.parametrize(
    "name", ["flip", "jitter_probability", "grayscale"], ids=["flip", "jitter", "gray"]
)
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_each_change_happens_at_its_probability(name, probability):
    pool, ids = images(1, side=8).expand(4000, -1, -1, -1), torch.arange(4000)
    still = view(pool, ids, DataSettings(**WHOLE, **STILL), image_size=8)
    settings = DataSettings(**WHOLE, **(STILL | {name: probability}))

    changed = (view(pool, ids, settings, image_size=8) != still).flatten(1).any(1)

    # Four standard errors; none where it is certain.
    spread = 4 * math.sqrt(probability * (1 - probability) / 4000)
    assert abs(changed.double().mean().item() - probability) <= spread


@pytest.mark.parametrize("channels", [1, 3])
def test_view_depends_on_seed_epoch_id_and_number_and_on_nothing_else(channels):
    pool, settings = images(24, channels=channels), DataSettings()
    base = view(pool, torch.arange(24), settings)

    for changes in ({"seed": 1}, {"epoch": 1}, {"view": 2}):
        other = view(pool, torch.arange(24), settings, **changes)
        assert (other - base).flatten(1).abs().amax(1).min() > 0.01, changes
    same = augmented_view(
        pool[:1].expand(24, -1, -1, -1),
        torch.arange(24),
        settings=settings,
        image_size=32,
        seed=0,
        epoch=0,
        view=1,
    )
    assert len(same.flatten(1).unique(dim=0)) == 24  # one image, 24 ids: 24 views


@pytest.mark.parametrize(
    ("count", "channels", "side", "size", "threads"),
    [(16, 3, 32, 32, 1), (16, 1, 37, 32, 1), (6, 3, 256, 224, 2)],
    ids=str,
)
def test_view_is_the_same_bits_at_any_place_in_any_batch(count, channels, side, size, threads):
    # What makes several processes equal one: they see the same images in other batches, and
    # torchrun gives each process one thread.
    pool, settings = images(count, channels=channels, side=side), DataSettings()
    expected = view(pool, torch.arange(count), settings, image_size=size)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 3, count):
            for ids in shuffled.split(batch):
                found = view(pool, ids, settings, image_size=size)
                assert torch.equal(found, expected[ids]), (batch, ids)
    finally:
        torch.set_num_threads(before)


def test_views_stay_in_the_unit_interval_and_leave_the_images_alone():
    pool = torch.cat([images(60), torch.zeros(2, 3, 32, 32), torch.full((2, 3, 32, 32), 255)])
    pool = pool.to(torch.uint8)
    kept = pool.clone()
    strong = DataSettings(jitter=(1.0, 1.0, 1.0, 0.5), jitter_probability=1.0)

    found = view(pool, torch.arange(64), strong)

    assert found.isfinite().all()
    assert 0 <= found.min() <= found.max() <= 1
    assert torch.equal(pool, kept)


def test_plain_view_is_the_central_crop():
    pool = images(2, side=37)

    found = plain_view(pool, image_size=32)

    assert torch.equal((found * 255).round().to(torch.uint8), pool[:, :, 2:34, 2:34])
    assert torch.equal(plain_view(pool, image_size=37), pool.float() / 255)


def test_plain_view_refuses_images_that_are_too_small():
    with pytest.raises(ValueError, match="images of 28 pixels are smaller than 32"):
        plain_view(images(1, side=28), image_size=32)
