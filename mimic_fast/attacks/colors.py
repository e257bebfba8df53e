"""Additive patterns in a color space: what the eye sees least, given in R, G, B."""

import torch
from jaxtyping import Float
from torch import Tensor

# R, G, B from Y, U, V (ITU-R BT.601): the inverse of Y = .299 R + .587 G + .114 B,
# U = .492 (B - Y), V = .877 (R - Y).
_FROM_YUV = (
    (1.0, 0.0, 1 / 0.877),
    (1.0, -0.114 / 0.587 / 0.492, -0.299 / 0.587 / 0.877),
    (1.0, 1 / 0.492, 0.0),
)


def color_direction(
    gradient: Float[Tensor, "channel height width"], *, luma: float
) -> Float[Tensor, "channel height width"]:
    """A direction of ascent in R, G, B made of whole steps in Y, U, V, brightness held back.

    The gradient goes to Y, U, V by the chain rule; the step there is its sign, Y's scaled by
    ``luma``; it comes back to R, G, B with largest change 1. ``luma = 0`` leaves every pixel's
    brightness as it is. Other than three channels have no color: the sign alone.
    """
    if gradient.shape[0] != 3:
        return gradient.sign()
    basis = gradient.new_tensor(_FROM_YUV)
    scale = gradient.new_tensor([luma, 1.0, 1.0])[:, None, None]
    in_yuv = torch.einsum("ry,rhw->yhw", basis, gradient).sign() * scale
    step = torch.einsum("ry,yhw->rhw", basis, in_yuv)
    return step / step.abs().amax().clamp(min=1e-12)
