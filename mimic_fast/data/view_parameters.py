"""What is random about a view, drawn apart from the pixels: any backend can then apply it.

Distributions are torchvision's (RandomResizedCrop, ColorJitter with a random order per image); the
random numbers come from ``counter.py``.
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mimic_fast.config import DataSettings
from mimic_fast.data.counter import uniforms

_TRIES = 10  # crops drawn before falling back to the central one, as in torchvision
_NUMBERS = 4 * _TRIES + 12


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewParameters:
    """How each image of a batch is seen.

    Args:
        box: Top, left, height and width of the crop, ``[B, 4]``, whole pixels of the stored square.
        flip: Whether the crop is mirrored, ``[B]``.
        jittered: Whether its colors change, ``[B]``.
        amounts: Changes of brightness, contrast and saturation (factors minus 1) and of hue
            (turns), ``[B, 4]``.
        order: In which order they are made, ``[B, 4]``.
        gray: Whether it ends up gray, ``[B]``.
    """

    box: Float[Tensor, "batch 4"]
    flip: Bool[Tensor, " batch"]
    jittered: Bool[Tensor, " batch"]
    amounts: Float[Tensor, "batch 4"]
    order: Int[Tensor, "batch 4"]
    gray: Bool[Tensor, " batch"]

    def row(self, index: int) -> "ViewParameters":
        """The parameters of one image, as a batch of one."""
        return ViewParameters(
            **{entry.name: getattr(self, entry.name)[index : index + 1] for entry in fields(self)}
        )


def draw_view(
    ids: Int[Tensor, " batch"],
    *,
    side: int,
    settings: DataSettings,
    seed: int,
    epoch: int | Int[Tensor, " batch"],
    view: int,
) -> ViewParameters:
    """Draws one view of each image: a function of seed, epoch, item id and view alone.

    Args:
        ids: Item ids.
        side: Height and width of the stored images, pixels.
        settings: Strengths and probabilities.
        seed: Seed of the run.
        epoch: Pass over the data, of all items or of each.
        view: 1 or 2.
    """
    u = uniforms(ids, _NUMBERS, seed=seed, epoch=epoch, stream=view)
    box = crop_boxes(u[:, : 4 * _TRIES], side, settings)
    u = u[:, 4 * _TRIES :]
    return ViewParameters(
        box=box,
        flip=u[:, 0] < settings.flip,
        jittered=u[:, 1] < settings.jitter_probability,
        amounts=(2 * u[:, 2:6] - 1) * u.new_tensor(settings.jitter),
        order=u[:, 6:10].argsort(dim=1),
        gray=u[:, 10] < settings.grayscale,
    )


def crop_boxes(
    u: Float[Tensor, "batch numbers"], side: int, settings: DataSettings
) -> Float[Tensor, "batch 4"]:
    """Crops as RandomResizedCrop draws them: the first of ten tries that fits, else the center.

    Args:
        u: Uniform in [0, 1): ten each for area, shape, top and left.
        side: Height and width of the stored images, pixels.
        settings: Ranges of area and shape.

    Returns:
        Top, left, height and width in whole pixels.
    """
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
