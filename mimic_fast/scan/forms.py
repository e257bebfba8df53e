"""The two forms of trigger that are searched for: something pasted on, something added.

A form turns free parameters and a given size into a change of the image, so that the search can
hold the size where it wants it. Sizes are L1 for masks as in DECREE, RMS for what is added.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mimic_fast.scan.probing import Probe

_FIRM = 4.0  # logit of a mask or color that is there from the start: 98 %
_ROUGH = 0.5  # deviation of the initial colors' logits
_FLAT = 0.1  # deviation of the initial mask's logits
_HALVINGS = 40  # of the interval that holds the mask's shift: to 1e-10
_LARGEST_LOGIT = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How parameters become a trigger.

    Args:
        name: ``patch`` or ``additive``.
        unit: Of its size.
        shown: What the size is multiplied by in that unit.
        first: Size at the start, the sizes' own scale.
        largest: Size at which the search gives up.
        build: Parameters and size to mask and pattern.
        stamp: Images, mask and pattern to triggered images.
    """

    name: str
    unit: str
    shown: float
    first: float
    largest: float
    build: Callable[[Sequence[Tensor], float], tuple[Tensor, Tensor]]
    stamp: Callable[[Tensor, Tensor, Tensor], Tensor]


def mask_of_size(
    logits: Float[Tensor, "1 height width"], size: float
) -> Float[Tensor, "1 height width"]:
    """``sigmoid(logits + shift)`` with the shift that makes its mean ``size``; differentiable.

    The gradient knows that the shift follows the logits: what one pixel gains others lose.
    """
    low, high = -_LARGEST_LOGIT - logits.max(), _LARGEST_LOGIT - logits.min()
    with torch.no_grad():
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            small = torch.sigmoid(logits + middle).mean() < size
            low, high = torch.where(small, middle, low), torch.where(small, high, middle)
    shift = ((low + high) / 2).detach()
    mask = torch.sigmoid(logits + shift)
    slope = (mask * (1 - mask)).mean().detach().clamp_min(1e-8)
    # One Newton step from the solution: of value zero, with the derivative of the implicit shift.
    return torch.sigmoid(logits + shift - (mask.mean() - mask.mean().detach()) / slope)


def _patch(parameters: Sequence[Tensor], size: float) -> tuple[Tensor, Tensor]:
    logits, colors = parameters
    return mask_of_size(logits, size), torch.sigmoid(colors)


def _paste(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    return images * (1 - mask) + pattern * mask


def _perturbation(parameters: Sequence[Tensor], size: float) -> tuple[Tensor, Tensor]:
    (free,) = parameters
    pattern = free * (size / free.square().mean().sqrt())
    return torch.ones_like(free[:1]), pattern


def _add(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    return (images + mask * pattern).clamp(0, 1)


PATCH = Form(
    name="patch",
    unit="share of the image",
    shown=1.0,
    first=0.15,
    largest=0.9,
    build=_patch,
    stamp=_paste,
)
ADDITIVE = Form(
    name="additive",
    unit="RMS in 1/255",
    shown=255.0,
    first=0.1,
    largest=0.5,
    build=_perturbation,
    stamp=_add,
)


def from_probe(probe: Probe, generator: torch.Generator) -> list[Tensor]:
    """Parameters of :data:`PATCH` that start as a probe's patch."""
    mask, pattern = probe.build()
    logits, colors = _blank(pattern.shape, generator)
    inside = mask > 0
    return [logits + _FIRM * inside, colors + inside * (2 * pattern - 1) * (_FIRM / 2)]


def grey_square(
    *, image_size: int, channels: int, top: float, left: float, generator: torch.Generator
) -> list[Tensor]:
    """Parameters of :data:`PATCH` that start as a grey square of a tenth of the image.

    Args:
        image_size: Pixels a side.
        channels: Of the image.
        top: Place as a share of the room there is.
        left: As ``top``.
        generator: Draws the roughness.
    """
    logits, colors = _blank((channels, image_size, image_size), generator)
    side = max(1, round(image_size * 0.3125))
    row, column = round((image_size - side) * top), round((image_size - side) * left)
    logits[:, row : row + side, column : column + side] += _FIRM
    return [logits, colors]


def noise(*, image_size: int, channels: int, generator: torch.Generator) -> list[Tensor]:
    """Parameters of :data:`ADDITIVE` that start as noise."""
    return [torch.randn(channels, image_size, image_size, generator=generator)]


def _blank(shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = _FLAT * torch.randn(1, *shape[1:], generator=generator)
    return logits, _ROUGH * torch.randn(*shape, generator=generator)
