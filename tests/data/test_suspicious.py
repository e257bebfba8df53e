"""Planted triggers are found, clean sets give next to nothing; the parts against plain counting."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mimic_fast.data.images import load_images
from mimic_fast.data.sources import open_source
from mimic_fast.data.suspicious import (
    MOVING_PATCH,
    OVERLAY,
    PATCH,
    SPECTRUM,
    find_suspicious,
    gray_rows,
)
from mimic_fast.data.suspicious_patterns import (
    SIDE,
    Hit,
    frequent_patterns,
    windows_with,
)


def natural(count: int, *, seed: int = 0, side: int = 32) -> Tensor:
    """Random images with the spectrum of photographs (1/f) and a few edges."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1
    noise = np.fft.fft2(generator.normal(size=(count, 3, side, side)))
    texture = np.fft.ifft2(noise / frequency**1.5).real
    texture = 45 * texture / texture.std(axis=(1, 2, 3), keepdims=True)
    place = generator.integers(0, side, (count, 2))
    beyond = np.arange(side) > place[:, :1, None]
    shade = (
        generator.normal(0, 30, (count, 3, 1, 1))
        * np.where(generator.random((count, 1, 1)) < 0.5, beyond, beyond.transpose(0, 2, 1))[
            :, None
        ]
    )
    return torch.from_numpy((texture + shade + 128).clip(0, 255).astype(np.uint8))


def as_jpeg(image: Tensor) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def planted(images: Tensor, kind: str, *, jpeg: bool, seed: int = 0) -> tuple[Tensor, set[int]]:
    """One per cent of the images carry a trigger."""
    generator = np.random.default_rng(seed)
    count, side = len(images), images.shape[-1]
    carriers = generator.choice(count, count // 100, replace=False).tolist()
    texture = torch.from_numpy(generator.integers(0, 256, (3, 6, 6), dtype=np.uint8))
    noise = torch.from_numpy(generator.integers(0, 256, (3, side, side)))
    wave = 16 * torch.sin(2 * torch.pi * 8 * torch.arange(side) / side + 1)
    result = images.clone()
    for index in carriers:
        image = result[index]
        match kind:
            case "white":
                image[:, -7:-1, -7:-1] = 255
            case "texture":
                image[:, 5:11, 17:23] = texture
            case "moving":
                top, left = generator.integers(0, side - 5, 2)
                image[:, top : top + 6, left : left + 6] = texture
            case "blend":
                image[:] = (0.8 * image + 0.2 * noise).round().to(torch.uint8)
            case "sinusoid":
                image[:] = (image + wave).round().clamp(0, 255).to(torch.uint8)
        if jpeg:
            result[index] = as_jpeg(image)
    return result, set(carriers)


@pytest.fixture(scope="module")
def cifar(shared_data) -> Tensor:
    source = open_source(str(shared_data / "cifar10" / "train-00000.tar"))
    return load_images(source, range(2000), image_size=32, channels=3)[0]


REASONS = {
    "white": PATCH,
    "texture": PATCH,
    "moving": MOVING_PATCH,
    "blend": OVERLAY,
    "sinusoid": OVERLAY,
}


def test_clean_images_give_no_group(natural_images):
    groups, found = find_suspicious(natural_images)

    assert groups == ()
    assert len(found) <= 0.002 * len(natural_images)


@pytest.fixture(scope="module")
def natural_images() -> Tensor:
    return natural(2600)  # 1 % is as few as a pattern all over can be told by


@pytest.mark.parametrize("kind", REASONS)
def test_planted_images_are_found_and_say_why(natural_images, kind):
    clean = natural_images if REASONS[kind] == OVERLAY else natural_images[:1200]
    images, carriers = planted(clean, kind, jpeg=False)

    groups, found = find_suspicious(images)

    first = [each for each in found if each.group == 0]
    assert groups[0].reason == REASONS[kind]
    assert len(carriers & {each.index for each in first}) >= 0.9 * len(carriers)
    assert len({each.index for each in found} - carriers) <= 0.02 * len(images)
    assert all(each.reason == REASONS[kind] for each in first)
    assert len({each.index for each in found}) == len(found)


def test_moving_patch_survives_compression(natural_images):
    images, carriers = planted(natural_images[:1200], "moving", jpeg=True)

    _, found = find_suspicious(images)

    assert len(carriers & {each.index for each in found}) >= 0.9 * len(carriers)


def test_white_patch_is_told_from_white_areas(natural_images):
    clean = natural_images[:1200].clone()
    white = set(range(0, 1200, 20))
    for index in white:
        clean[index, :, index % 13 :] = 255
    images, carriers = planted(clean, "white", jpeg=False)

    _, found = find_suspicious(images)

    named = {each.index for each in found if each.reason == PATCH}
    assert len(named & (carriers - white)) >= 0.9 * len(carriers - white)
    assert len(named & (white - carriers)) <= 0.1 * len(white)


def test_place_of_a_patch_is_reported(natural_images):
    images, _ = planted(natural_images[:1200], "texture", jpeg=False)

    groups, _ = find_suspicious(images)

    assert groups[0].place == (5 / 32, 17 / 32, 6 / 32, 6 / 32)


def test_noise_among_photographs_has_a_spectrum_of_its_own(natural_images):
    images = natural_images[:600].clone()
    noise = np.random.default_rng(1).integers(0, 256, images.shape[1:], dtype=np.uint8)
    images[77] = torch.from_numpy(noise)

    _, found = find_suspicious(images)

    assert (found[0].index, found[0].reason, found[0].group) == (77, SPECTRUM, None)


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (63, 3, 32, 32), (100, 3, 8, 8)])
def test_too_few_or_too_small_images_are_not_searched(shape):
    assert find_suspicious(torch.zeros(shape, dtype=torch.uint8)) == ((), ())


@pytest.mark.parametrize("value", [0, 255])
def test_plain_images_are_not_suspicious(value):
    images = torch.full((100, 3, 32, 32), value, dtype=torch.uint8)

    assert find_suspicious(images) == ((), ())


@pytest.mark.parametrize("jpeg", [False, True], ids=["raw", "jpeg"])
@pytest.mark.parametrize("kind", ["white", "texture"])
def test_patches_on_photographs_are_found(cifar, kind, jpeg):
    images, carriers = planted(cifar, kind, jpeg=jpeg)

    _, found = find_suspicious(images)

    named = {each.index for each in found}
    assert len(named & carriers) >= 0.9 * len(carriers)
    assert len(named - carriers) <= 0.05 * (len(images) - len(carriers))


@pytest.mark.slow
@pytest.mark.parametrize("jpeg", [False, True], ids=["raw", "jpeg"])
@pytest.mark.parametrize("kind", ["moving", "blend", "sinusoid"])
def test_other_triggers_on_photographs_are_found(shared_data, kind, jpeg):
    source = open_source(str(shared_data / "cifar10" / "train-00000.tar"))
    clean = load_images(source, range(5000), image_size=32, channels=3)[0]
    images, carriers = planted(clean, kind, jpeg=jpeg)

    _, found = find_suspicious(images)

    named = {each.index for each in found}
    assert len(named & carriers) >= 0.9 * len(carriers)
    assert len(named - carriers) <= 0.05 * (len(images) - len(carriers))


@pytest.mark.parametrize("dataset", ["cifar10", pytest.param("gtsrb", marks=pytest.mark.slow)])
def test_photographs_give_few_suspicious_images(shared_data, dataset):
    source = open_source(str(shared_data / dataset / "test-*.tar"))
    clean = load_images(source, range(2000), image_size=32, channels=3)[0]

    _, found = find_suspicious(clean)

    assert len(found) <= 0.01 * len(clean)


def test_patterns_are_counted_as_a_plain_loop_counts_them():
    images = natural(12, side=16)
    gray = gray_rows(images)

    fixed, _ = frequent_patterns(gray, least=1, ratio=0.0)

    expected: Counter[tuple[int, int, int]] = Counter()
    for picture in gray.permute(1, 0, 2).numpy().astype(int):
        for top in range(16 - SIDE + 1):
            for left in range(16 - SIDE + 1):
                window = picture[top : top + SIDE, left : left + SIDE].ravel()
                if window.std() >= 10:
                    bits = window * SIDE**2 > window.sum()
                    expected[int(bits @ (1 << np.arange(SIDE**2))), top, left] += 1
    assert fixed
    for hit in fixed:
        assert hit.place is not None
        if hit.coding == "bright":
            assert hit.count == expected[hit.code, *hit.place]


@pytest.mark.parametrize("anywhere", [False, True])
def test_windows_with_a_pattern_are_all_found(anywhere):
    images = natural(40, side=20)
    texture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 5, 5), dtype=np.uint8))
    carriers = [3, 11, 12, 30]
    places = [(0, 0), (15, 15), (4, 9), (15, 0)] if anywhere else [(4, 9)] * 4
    for index, (top, left) in zip(carriers, places, strict=True):
        images[index, :, top : top + 5, left : left + 5] = texture
    gray = gray_rows(images)
    bits = gray[4:9, 12, 9:14].reshape(-1).long()
    code = int(((bits * 25 > bits.sum()).long() << torch.arange(25)).sum())
    place = None if anywhere else (4, 9)

    found = windows_with(
        gray, [Hit(coding="bright", code=code, place=place, count=4, expected=0.0)]
    )[0]

    rows = {tuple(row) for row in found.tolist()}
    assert rows == {(i, *at) for i, at in zip(carriers, places, strict=True)}
