"""The augmented views as batched tensor code: random resized crop, flip, color jitter, gray.

The reference of every faster way. What is random is drawn in ``view_parameters.py``; results equal
torchvision's functions fed with the same numbers (antialiased bilinear resizing).
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mimic_fast.config import DataSettings
from mimic_fast.data.color import jitter, to_gray
from mimic_fast.data.view_parameters import ViewParameters, draw_view


def augmented_view(
    images: UInt8[Tensor, "batch channel side side"],
    ids: Int[Tensor, " batch"],
    *,
    settings: DataSettings,
    image_size: int,
    seed: int,
    epoch: int | Int[Tensor, " batch"],
    view: int,
) -> Float[Tensor, "batch channel height width"]:
    """One augmented view of each image, in [0, 1].

    Args:
        images: Decoded images.
        ids: Their item ids, which with seed, epoch and view decide everything random.
        settings: Strengths and probabilities.
        image_size: Height and width of the result, pixels.
        seed: Seed of the run.
        epoch: Pass over the data, of all items or of each.
        view: 1 or 2.
    """
    drawn = draw_view(
        ids, side=images.shape[-1], settings=settings, seed=seed, epoch=epoch, view=view
    )
    return apply_view(images, drawn, image_size=image_size)


def apply_view(
    images: UInt8[Tensor, "batch channel side side"], drawn: ViewParameters, *, image_size: int
) -> Float[Tensor, "batch channel height width"]:
    """The views that were drawn, in [0, 1]."""
    crops = _resized_crops(images, drawn.box, image_size, drawn.flip)
    return apply_colors(crops, drawn)


def apply_colors(
    crops: Float[Tensor, "batch channel height width"], drawn: ViewParameters
) -> Float[Tensor, "batch channel height width"]:
    """The color changes that were drawn, on crops in [0, 1]; the input stays as it is."""
    result = jitter(crops, amounts=drawn.amounts, chosen=drawn.jittered, order=drawn.order)
    if crops.shape[1] == 3:
        gray = drawn.gray[:, None, None, None]
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
