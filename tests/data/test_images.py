import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mimic_fast.data.images import center_square, load_images, resized, with_channels
from mimic_fast.data.items import Source, decode_image
from mimic_fast.errors import UnsafeInputError, UsageError


def source_of(*images: np.ndarray | bytes) -> Source:
    def encoded(image: np.ndarray | bytes) -> bytes:
        if isinstance(image, bytes):
            return image
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        return file.getvalue()

    data = [encoded(image) for image in images]
    return Source(
        name="memory",
        keys=tuple(str(index) for index in range(len(data))),
        labels=None,
        classes=None,
        read=data.__getitem__,
        decode=decode_image,
    )


def noise(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, *channels), dtype=np.uint8)


def side_of(source: Source, *, image_size: int, evaluation: bool = False) -> int:
    images, _ = load_images(
        source, range(len(source)), image_size=image_size, channels=3, evaluation=evaluation
    )
    assert images.shape[2] == images.shape[3]
    return images.shape[3]


def test_load_images_of_native_size_are_untouched():
    pixels = [noise(32, 32, 3, seed=seed) for seed in range(5)]
    images, kept = load_images(source_of(*pixels), [4, 0, 2], image_size=32, channels=3)
    expected = torch.from_numpy(np.stack([pixels[index] for index in (4, 0, 2)]))
    assert torch.equal(images, expected.permute(0, 3, 1, 2))
    assert kept == (4, 0, 2)


@pytest.mark.parametrize(
    ("sides", "image_size", "expected"),
    [
        ([32, 32], 32, 32),
        ([28], 32, 32),
        ([28, 32], 32, 32),
        ([33, 32], 32, 37),
        ([32, 64, 20], 28, 32),
        ([300], 224, 256),
    ],
)
def test_load_images_side_is_8_sevenths_if_any_is_larger(sides, image_size, expected):
    source = source_of(*(noise(side, side, 3) for side in sides))
    assert side_of(source, image_size=image_size) == expected
    assert side_of(source, image_size=image_size, evaluation=True) == image_size


def test_load_images_long_side_is_cropped_not_counted():
    assert side_of(source_of(noise(32, 90, 3)), image_size=32) == 32
    pixels = noise(32, 91, 3)
    images, _ = load_images(source_of(pixels), [0], image_size=32, channels=3)
    assert torch.equal(images[0], torch.from_numpy(pixels[:, 29:61]).permute(2, 0, 1))


@pytest.mark.parametrize(("side", "image_size"), [(97, 28), (20, 32), (64, 32)])
def test_load_images_resize_agrees_with_pillow(side, image_size):
    pixels = noise(side, side, 3)
    images, _ = load_images(
        source_of(pixels), [0], image_size=image_size, channels=3, evaluation=True
    )
    expected = Image.fromarray(pixels).resize((image_size,) * 2, Image.Resampling.BILINEAR)
    difference = images[0].int() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).int()
    assert difference.abs().max() <= 1  # both round, Pillow once per direction


def test_load_images_each_is_independent_of_the_others():
    source = source_of(*(noise(20 + seed % 3 * 9, 24, 3, seed=seed) for seed in range(12)))
    together, _ = load_images(source, range(12), image_size=16, channels=3)
    for index in range(12):
        alone, _ = load_images(source, [index], image_size=16, channels=3)
        assert torch.equal(alone[0], together[index])


def test_load_images_gray_becomes_rgb_and_back():
    gray, color = noise(8, 8), noise(8, 8, 3)
    images, _ = load_images(source_of(gray, color), [0, 1], image_size=8, channels=3)
    assert torch.equal(images[0], torch.from_numpy(gray).expand(3, 8, 8))
    images, _ = load_images(source_of(gray, color), [0, 1], image_size=8, channels=1)
    assert torch.equal(images[0, 0], torch.from_numpy(gray))
    luma = torch.from_numpy(np.array(Image.fromarray(color).convert("L")))
    assert torch.equal(images[1, 0], luma)


def test_load_images_corrupt_are_left_out_and_named():
    events = []
    source = source_of(noise(8, 8, 3), b"garbage", noise(8, 8, 3, seed=1))
    images, kept = load_images(source, [2, 1, 0], image_size=8, channels=3, report=events.append)
    assert kept == (2, 0)
    assert torch.equal(images[1], decode_image(source.read(0)))
    messages = [event.message for event in events if event.message]
    assert messages == ["left out 1: is not a JPEG, PNG, WebP, BMP or PPM image"]
    assert (events[-1].done, events[-1].total, events[-1].unit) == (3, 3, "images")


def test_load_images_all_corrupt_raises():
    with pytest.raises(UnsafeInputError, match="none of 2 images can be decoded"):
        load_images(source_of(b"x", b"y"), [0, 1], image_size=8, channels=3)


def test_load_images_bad_request_raises():
    source = source_of(noise(8, 8, 3))
    with pytest.raises(UsageError, match="the encoder expects 4"):
        load_images(source, [0], image_size=8, channels=4)
    with pytest.raises(UsageError, match="no image to load"):
        load_images(source, [], image_size=8, channels=3)


@given(st.integers(1, 40), st.integers(1, 40))
def test_center_square_leaves_margins_that_differ_by_at_most_one(height, width):
    rows = torch.arange(height, dtype=torch.uint8)[None, :, None].expand(1, height, width)
    square = center_square(rows)
    side = min(height, width)
    assert square.shape == (1, side, side)
    above, below = int(square[0, 0, 0]), height - 1 - int(square[0, -1, 0])
    assert 0 <= below - above <= 1


def test_resized_of_constant_images_is_constant():
    images = torch.full((2, 3, 50, 50), 201, dtype=torch.uint8)
    for side in (7, 50, 99):
        assert torch.equal(resized(images, side), torch.full((2, 3, side, side), 201).byte())


def test_with_channels_keeps_what_fits():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert with_channels(images, 3) is images
