"""How far an encoder sends different images to one place: the quantity every score is made of."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mimic_fast.errors import UsageError
from mimic_fast.evaluation.features import encode


def concentration(
    features: Float[Tensor, "image feature"], center: Float[Tensor, " feature"]
) -> Float[Tensor, ""]:
    """Mean cosine between the features of two different images, seen from ``center``.

    About 0 for clean images when ``center`` is their mean, and 1 when all are at one other point.
    DECREE (Feng et al., CVPR 2023, arXiv:2303.15180) takes the cosine from the origin; features
    behind a ReLU then resemble each other even where nothing is wrong, so the mean is taken off.

    Args:
        features: Of at least two images.
        center: Mean feature of clean images.

    Returns:
        Dimensionless, in [-1, 1]; differentiable.
    """
    count = len(features)
    units = F.normalize(features - center, dim=1)
    # sum over pairs i != j of u_i u_j = |sum u|^2 - sum |u|^2
    return (units.sum(0).square().sum() - units.square().sum()) / (count * (count - 1))


def clean_center(
    encoder: nn.Module, images: Float[Tensor, "image channel height width"], *, batch_size: int
) -> Float[Tensor, " feature"]:
    """Mean feature of clean images, in float32 on the CPU.

    Raises:
        UsageError: If all images have the same features: there is nothing to collapse.
        UnsafeInputError: If a feature is not finite.
    """
    features = encode(encoder, images, batch_size=batch_size)
    center = features.mean(0)
    spread = (features - center).norm(dim=1).mean()
    # float32 rounding of a constant encoder leaves about 1e-7 of the features' length
    if float(spread) <= 1e-5 * float(torch.maximum(center.norm(), spread.new_tensor(1e-30))):
        raise UsageError("the encoder gives all images the same features; nothing can be scanned")
    return center
