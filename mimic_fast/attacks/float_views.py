"""Augmented views that gradients flow through: ``data/augment.py`` for images that are optimized.

The same draws of crop, flip and colors; the crop is resampled bilinearly without antialiasing,
which differs from the training views only where a crop is larger than the result.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mimic_fast.data.augment import apply_colors
from mimic_fast.data.view_parameters import ViewParameters


def float_views(
    images: Float[Tensor, "batch channel side side"], drawn: ViewParameters
) -> Float[Tensor, "batch channel side side"]:
    """The views that were drawn for squares of this side, at the same side, in [0, 1].

    Differentiable in the images.
    """
    side = images.shape[-1]
    top, left, height, width = drawn.box.to(images).unbind(1)
    mirror = torch.where(drawn.flip.to(images.device), -1.0, 1.0).to(images)
    zero = torch.zeros_like(top)
    # affine_grid maps the result's [-1, 1] to the crop's part of the image's [-1, 1].
    across = torch.stack([mirror * width / side, zero, (2 * left + width) / side - 1], dim=1)
    down = torch.stack([zero, height / side, (2 * top + height) / side - 1], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(images.shape), False)
    crops = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return apply_colors(crops.clamp(0, 1), drawn)
