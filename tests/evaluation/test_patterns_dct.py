"""CTRL's trigger against the block-wise cosine transform it stands for; what triggers leave alone.

The transform is scipy's and the steps are those of the paper: to YUV, orthonormal DCT of every
32x32 block, +100 at (15, 15) and (31, 31) of U and V, and back.
"""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn, idctn

from mimic_fast.data.sources import open_source
from mimic_fast.evaluation.patterns import frequency
from mimic_fast.evaluation.triggers import apply_trigger, named_trigger, untouched

BLOCK = 32
LUMA = np.array([0.299, 0.587, 0.114])
TO_YUV = np.stack([LUMA, 0.492 * ([0, 0, 1] - LUMA), 0.877 * ([1, 0, 0] - LUMA)])
# The rounded matrices of kornia.color, which the authors call (meet-cjli/CTRL, 4f3a782,
# utils/frequency.py); they are not quite each other's inverses.
KORNIA_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.1]])
KORNIA_TO_RGB = np.array([[1, 0, 1.14], [1, -0.396, -0.581], [1, 2.029, 0]])

EXACT = 1e-7  # of pixel values in [0, 1]; measured 6.1e-8: pattern and sum are in float32
ROUNDED = 0.5 / 255 + EXACT
NAMED = ("white_patch", "random_patch", "random_patch:7", "blended", "blended:3", "sinusoid")
NAMED += ("frequency", "frequency:50")


def through_the_transform(images, *, to_yuv, to_rgb, magnitude: float = 100.0):
    """The paper's steps on ``[B, 3, H, W]`` in 0..255, float64; before clipping."""
    *_, height, width = images.shape
    margins = [(0, 0), (0, 0), (0, -height % BLOCK), (0, -width % BLOCK)]
    yuv = np.einsum("yr,brhw->byhw", to_yuv, np.pad(images.astype(np.float64), margins, "edge"))
    for top in range(0, yuv.shape[2], BLOCK):
        for left in range(0, yuv.shape[3], BLOCK):
            where = np.s_[:, 1:, top : top + BLOCK, left : left + BLOCK]
            coefficients = np.asarray(dctn(yuv[where], axes=(2, 3), norm="ortho"))
            coefficients[..., 15, 15] += magnitude
            coefficients[..., 31, 31] += magnitude
            yuv[where] = idctn(coefficients, axes=(2, 3), norm="ortho")
    return np.einsum("ry,byhw->brhw", to_rgb, yuv)[..., :height, :width]


def agrees(pixels: np.ndarray) -> None:
    """Ours is the transform's, exactly before rounding and within half a step after it."""
    images = torch.from_numpy(pixels).float() / 255
    trigger = frequency(image_size=pixels.shape[-1], channels=3)

    wanted = through_the_transform(pixels, to_yuv=TO_YUV, to_rgb=np.linalg.inv(TO_YUV)) / 255

    added = images.double().numpy() + (trigger.mask * trigger.pattern).double().numpy()
    assert np.abs(added - wanted).max() < EXACT
    stamped = apply_trigger(images, trigger)
    assert np.abs(stamped.numpy() - wanted.clip(0, 1)).max() < EXACT
    in_file = (stamped * 255).round().numpy() / 255
    assert np.abs(in_file - wanted.clip(0, 1)).max() < ROUNDED


@pytest.mark.parametrize("size", [32, 64, 56, 75])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_frequency_is_the_block_transform_of_random_images(size, seed):
    agrees(np.random.default_rng(seed).integers(0, 256, (2, 3, size, size), dtype=np.uint8))


@pytest.mark.parametrize("size", [32, 64, 100])
def test_frequency_is_the_block_transform_of_real_images(shared_data, size):
    agrees(real_images(shared_data, size))


@pytest.mark.parametrize("size", [32, 64])
def test_frequency_is_what_the_authors_code_does(shared_data, size):
    pixels = real_images(shared_data, size)
    trigger = frequency(image_size=size, channels=3)

    steps = {"to_yuv": KORNIA_TO_YUV, "to_rgb": KORNIA_TO_RGB}
    wanted = through_the_transform(pixels, **steps)
    alone = through_the_transform(pixels, **steps, magnitude=0)

    # Their rounded constants change an image by 0.34 steps of 1/255 even without a trigger.
    assert np.abs(alone - pixels).max() < 0.4
    added = wanted - alone
    assert np.abs(added - 255 * trigger.pattern.double().numpy()).max() < 0.04  # measured: 0.0375
    ours = apply_trigger(torch.from_numpy(pixels).float() / 255, trigger).double().numpy()
    assert np.abs(255 * ours - wanted.clip(0, 255)).max() < 0.4  # measured: 0.25


def test_frequency_of_another_magnitude_scales():
    pixels = np.full((1, 3, 32, 32), 128, dtype=np.uint8)
    inverse = np.linalg.inv(TO_YUV)

    wanted = through_the_transform(pixels, to_yuv=TO_YUV, to_rgb=inverse, magnitude=37.5) - 128

    pattern = frequency(image_size=32, channels=3, magnitude=37.5).pattern
    np.testing.assert_allclose(pattern.double().numpy(), wanted[0] / 255, rtol=0, atol=EXACT)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 56, 64, 224])
@pytest.mark.parametrize("name", NAMED)
def test_named_triggers_leave_what_they_do_not_cover(name, size, channels):
    trigger = named_trigger(name, image_size=size, channels=channels)
    generator = torch.Generator().manual_seed(size)
    # Away from black and white, where an addition could be clipped off.
    images = 0.3 + 0.4 * torch.rand(4, channels, size, size, generator=generator)

    stamped = apply_trigger(images, trigger)

    clear = untouched(trigger)
    assert torch.equal(stamped[..., clear], images[..., clear])
    assert torch.equal((stamped != images).any(1).any(0), ~clear)
    assert bool(clear.any()) == (name.split(":")[0] in ("white_patch", "random_patch", "sinusoid"))


@pytest.mark.parametrize("size", [32, 56, 64, 224])
@pytest.mark.parametrize("name", ["white_patch", "random_patch", "random_patch:7"])
def test_patches_cover_a_square_and_nothing_else(name, size):
    clear = untouched(named_trigger(name, image_size=size, channels=3))

    rows, columns = (~clear).any(1), (~clear).any(0)
    side = int(rows.sum())
    assert int(columns.sum()) == side
    assert int((~clear).sum()) == side * side


def real_images(folder, size: int) -> np.ndarray:
    """Eight photographs as ``[B, 3, size, size]``, contrasts and colors as they come."""
    source = open_source(str(folder / "imagenet_samples" / "samples-00000.tar"))
    pictures = []
    for index in range(8):
        with Image.open(io.BytesIO(source.read(index))) as image:
            square = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        pictures.append(np.asarray(square).transpose(2, 0, 1))
    return np.stack(pictures)
