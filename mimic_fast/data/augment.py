"""The augmented views as batched tensor code: random resized crop, flip, color jitter, gray.

Distributions are torchvision's (RandomResizedCrop with antialiased bilinear resizing, ColorJitter
with a random order per image); the random numbers come from ``counter.py``.
"""

import math

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mimic_fast.config import DataSettings
from mimic_fast.data.color import jitter, to_gray
from mimic_fast.data.counter import uniforms

_TRIES = 10  # crops drawn before falling back to the central one, as in torchvision
_NUMBERS = 4 * _TRIES + 12


def augmented_view(
    images: UInt8[Tensor, "batch channel side side"],
    ids: Int[Tensor, " batch"],
    *,
    settings: DataSettings,
    image_size: int,
    seed: int,
    epoch: int,
    view: int,
) -> Float[Tensor, "batch channel height width"]:
    """One augmented view of each image, in [0, 1].

    Args:
        images: Decoded images.
        ids: Their item ids, which with seed, epoch and view decide everything random.
        settings: Strengths and probabilities.
        image_size: Height and width of the result, pixels.
        seed: Seed of the run.
        epoch: Pass over the data.
        view: 1 or 2.
    """
    u = uniforms(ids, _NUMBERS, seed=seed, epoch=epoch, stream=view)
    box = _crop_boxes(u[:, : 4 * _TRIES], images.shape[-1], settings)
    u = u[:, 4 * _TRIES :]
    result = _resized_crops(images, box, image_size, u[:, 0] < settings.flip)
    result = jitter(
        result,
        strength=settings.jitter,
        chosen=u[:, 1] < settings.jitter_probability,
        numbers=u[:, 2:6],
        order=u[:, 6:10].argsort(dim=1),
    )
    if images.shape[1] == 3 and settings.grayscale > 0:
        gray = (u[:, 10] < settings.grayscale)[:, None, None, None]
        result = torch.where(gray, to_gray(result).expand_as(result), result)
    return result


def plain_view(
    images: UInt8[Tensor, "batch channel side side"], *, image_size: int
) -> Float[Tensor, "batch channel height width"]:
    """The images as an evaluation sees them: central crop, no randomness, in [0, 1]."""
    margin = (images.shape[-1] - image_size) // 2
    if margin < 0:
        raise ValueError(f"images of {images.shape[-1]} pixels are smaller than {image_size}")
    cut = slice(margin, margin + image_size)
    return images[..., cut, cut].float() / 255


def _crop_boxes(u: Tensor, side: int, settings: DataSettings) -> Tensor:
    """Top, left, height, width of each crop, pixels: ``[B, 4]`` float."""
    area, shape, up, left = u.view(-1, 4, _TRIES).unbind(1)
    low, high = settings.crop_scale
    target = side * side * (low + area * (high - low))
    log_low, log_high = (math.log(ratio) for ratio in settings.crop_ratio)
    ratio = torch.exp(log_low + shape * (log_high - log_low))
    width, height = (target * ratio).sqrt().round(), (target / ratio).sqrt().round()
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
    height, width, up, left = (t.gather(1, first)[:, 0] for t in (height, width, up, left))
    top = (up * (side - height + 1)).floor()
    start = (left * (side - width + 1)).floor()
    box = torch.stack([top, start, height, width], dim=1)
    return torch.where(fits.any(dim=1, keepdim=True), box, _central_box(side, settings).to(box))


def _central_box(side: int, settings: DataSettings) -> Tensor:
    low, high = settings.crop_ratio  # of width to height
    width = round(side * min(1.0, high))
    height = round(side / max(1.0, low))
    return torch.tensor([(side - height) // 2, (side - width) // 2, height, width])


def _resized_crops(images: Tensor, box: Tensor, size: int, flip: Tensor) -> Tensor:
    # Bilinear resizing is linear and separable: two batched products with the triangle filter's
    # weights, cut at the crop's edge. Flipping reverses the rows of the horizontal ones.
    top, left, height, width = box.unbind(1)
    rows = _filter_weights(top, height, images.shape[-2], size)
    columns = _filter_weights(left, width, images.shape[-1], size)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    scaled = rows[:, None] @ images.float().div_(255)
    return (scaled @ columns[:, None].mT).clamp_(0, 1)


def _filter_weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Weights ``[B, size, side]`` of antialiased bilinear resizing of [start, start + length)."""
    scale = (length / size)[:, None, None]
    offsets = torch.arange(size, device=start.device)[None, :, None] + 0.5
    center = start[:, None, None] + offsets * scale
    pixel = torch.arange(side, device=start.device)[None, None, :]
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weights = (1 - (pixel + 0.5 - center).abs() / scale.clamp(min=1)).clamp(min=0) * inside
    return weights / weights.sum(dim=2, keepdim=True)
