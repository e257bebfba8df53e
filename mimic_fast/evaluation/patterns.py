"""Triggers made from a formula and a seed, at any input size."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mimic_fast.errors import UsageError
from mimic_fast.evaluation.stamping import Trigger

_WINDOW = 32  # pixels, CTRL's block of the cosine transform
_FREQUENCIES = (15, 31)  # CTRL's places on the diagonal of a block
_COLORS = 4  # a random patch is 4x4 colors, enlarged
_BLOCKS = 8  # per side of a random blend
# What one unit of U and V each adds to R, G, B: the inverse of Y = .299 R + .587 G + .114 B,
# U = .492 (B - Y), V = .877 (R - Y).
_UV_TO_RGB = (1 / 0.877, -0.114 / 0.587 / 0.492 - 0.299 / 0.587 / 0.877, 1 / 0.492)


def white_patch(*, image_size: int, channels: int) -> Trigger:
    """BadEncoder's white square near the lower right corner (Jia et al., S&P 2022).

    Its geometry is 10x10 at rows and columns 21-30 of 32x32 and 50x50 at 173-222 of 224x224: the
    side is 10/32 of the image up to 32 pixels and 50/224 from 224 pixels on, linear in between; the
    margin is 1 pixel, scaled up from 224 pixels on.
    """
    mask = _corner(image_size, _patch_side(image_size))
    return Trigger(name="white_patch", mask=mask, pattern=mask.repeat(channels, 1, 1))


def random_patch(
    *, image_size: int, channels: int, side: int | None = None, seed: int = 0
) -> Trigger:
    """A square of 4x4 random colors, enlarged bilinearly, where the white patch lies.

    So are made the patches of hidden-trigger attacks (Saha et al., AAAI 2020, arXiv:1910.00033),
    which SSLBKD uses. The colors depend on the seed alone, not on the size.

    Args:
        image_size: Side of the image, pixels.
        channels: 1 or 3.
        side: Side of the patch, pixels; None: that of the white patch.
        seed: Which colors.

    Raises:
        UsageError: If the patch does not fit into the image.
    """
    side = _patch_side(image_size) if side is None else side
    if not 1 <= side <= image_size - _margin(image_size):
        raise UsageError(f"a patch of {side} pixels does not fit an image of {image_size}")
    colors = _random_colors(_COLORS, channels, seed)
    patch = F.interpolate(colors[None], (side, side), mode="bilinear")[0]
    mask = _corner(image_size, side)
    pattern = torch.zeros(channels, image_size, image_size)
    stop = image_size - _margin(image_size)
    pattern[:, stop - side : stop, stop - side : stop] = patch
    return Trigger(name=_with_seed("random_patch", seed), mask=mask, pattern=pattern)


def blended(
    pattern: Float[Tensor, "channel height width"] | None,
    *,
    image_size: int,
    channels: int,
    alpha: float = 0.2,
    seed: int = 0,
) -> Trigger:
    """A picture blended over the whole image (Chen et al., arXiv:1712.05526).

    Args:
        pattern: Pixel values in [0, 1] of the image's size; None: 8x8 blocks of random color.
        image_size: Side of the image, pixels.
        channels: Of the image.
        alpha: Opacity in (0, 1].
        seed: Of the random blocks.

    Raises:
        UsageError: If the opacity or the picture's size does not fit.
    """
    if not 0 < alpha <= 1:
        raise UsageError(f"a blend's opacity must lie in (0, 1], got {alpha}")
    name = "blended" if pattern is not None else _with_seed("blended", seed)
    shape = (channels, image_size, image_size)
    if pattern is None:
        pattern = F.interpolate(
            _random_colors(_BLOCKS, channels, seed)[None], (image_size, image_size), mode="nearest"
        )[0]
    if pattern.shape != shape:
        raise UsageError(f"a blend of {tuple(pattern.shape)} does not fit images of {shape}")
    return Trigger(name=name, mask=torch.full((1, *shape[1:]), alpha), pattern=pattern)


def frequency(*, image_size: int, channels: int, magnitude: float = 100.0) -> Trigger:
    """CTRL's trigger (Li et al., ICCV 2023, arXiv:2210.07346) as the fixed pattern that it is.

    The attack adds ``magnitude`` to the coefficients (15, 15) and (31, 31) of U and V in the
    orthonormal cosine transform of every 32x32 block. Color conversion and transform are linear, so
    this adds ``magnitude * b b^T`` of the two basis vectors, seen through the inverse color
    conversion: one pattern for all images, up to the clipping at black and white. A gray image has
    no U and V; its only channel gets the addition. Images that are no multiple of 32 pixels see the
    last blocks cut off.

    Args:
        image_size: Side of the image, pixels.
        channels: 1 or 3.
        magnitude: Coefficient added, for pixel values in 0..255.

    Raises:
        UsageError: If there are neither 1 nor 3 channels, or the magnitude is out of range.
    """
    if channels not in (1, 3):
        raise UsageError(f"a frequency trigger needs 1 or 3 channels, got {channels}")
    if not 0 < magnitude <= 1000:
        raise UsageError(f"a frequency trigger's magnitude must lie in (0, 1000], got {magnitude}")
    position = torch.arange(image_size, dtype=torch.float64) % _WINDOW + 0.5
    plane = torch.zeros(image_size, image_size, dtype=torch.float64)
    for k in _FREQUENCIES:
        basis = math.sqrt(2 / _WINDOW) * torch.cos(math.pi * k * position / _WINDOW)
        plane += basis[:, None] * basis
    share = torch.tensor(_UV_TO_RGB if channels == 3 else (1.0,), dtype=torch.float64)
    pattern = share[:, None, None] * plane * (magnitude / 255)
    return Trigger(
        name="frequency" if magnitude == 100 else f"frequency:{magnitude:.12g}",
        mask=torch.ones(1, image_size, image_size),
        pattern=pattern.float(),
        add=True,
    )


def sinusoid(
    *, image_size: int, channels: int, periods: int = 6, amplitude: float = 16 / 255
) -> Trigger:
    """Vertical stripes ``amplitude * sin(2 pi x periods / width)``, added (SIG).

    Barni et al., ICIP 2019, arXiv:1902.11237; x counts columns from 0.

    Args:
        image_size: Side of the image, pixels.
        channels: Of the image; all get the same stripes.
        periods: Waves over the image's width.
        amplitude: In pixel values of [0, 1].

    Raises:
        UsageError: If the amplitude is out of range.
    """
    if not 0 < amplitude <= 1:
        raise UsageError(f"a sinusoid's amplitude must lie in (0, 1], got {amplitude}")
    columns = torch.arange(image_size)
    wave = amplitude * torch.sin(2 * math.pi * periods * columns.double() / image_size)
    wave[2 * periods * columns % image_size == 0] = 0  # where sin gives 1e-16 and nothing is meant
    return Trigger(
        name="sinusoid",
        mask=torch.ones(1, image_size, image_size),
        pattern=wave.float().expand(channels, image_size, image_size).contiguous(),
        add=True,
    )


def _with_seed(name: str, seed: int) -> str:
    return f"{name}:{seed}" if seed else name


def _patch_side(image_size: int) -> int:
    small, large = 10 / 32, 50 / 224
    between = min(max((image_size - 32) / (224 - 32), 0.0), 1.0)
    return max(1, round(image_size * (small + (large - small) * between)))


def _margin(image_size: int) -> int:
    return max(1, round(image_size / 224))


def _corner(image_size: int, side: int) -> Tensor:
    mask = torch.zeros(1, image_size, image_size)
    stop = image_size - _margin(image_size)
    mask[:, stop - side : stop, stop - side : stop] = 1
    return mask


def _random_colors(count: int, channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, count, count, generator=generator)
