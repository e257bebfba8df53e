"""How visible a trigger is: PSNR and SSIM of triggered images against the untouched ones."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_SIGMA = 1.5  # pixels, of the window's Gaussian
_RADIUS = 5  # pixels: an 11x11 window
_C1, _C2 = 0.01**2, 0.03**2  # of Wang et al., for pixel values in [0, 1]


def psnr(
    images: Float[Tensor, "batch channel height width"],
    changed: Float[Tensor, "batch channel height width"],
) -> float:
    """Peak signal-to-noise ratio in dB, mean over the images; pixel values in [0, 1].

    An image that did not change counts as 100 dB.
    """
    error = (images.double() - changed.double()).square().mean((1, 2, 3))
    return (-10 * error.clamp(min=1e-10).log10()).mean().item()


def ssim(
    images: Float[Tensor, "batch channel height width"],
    changed: Float[Tensor, "batch channel height width"],
) -> float:
    """Structural similarity, mean over pixels, channels and images; 1: equal.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", IEEE TIP 13 (2004): an 11x11
    Gaussian window of deviation 1.5 that stays inside the image, K1 = .01, K2 = .03. A window
    larger than the image shrinks to it.

    Args:
        images: Pixel values in [0, 1].
        changed: The same images with the trigger.
    """
    x, y = images.double(), changed.double()
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    var_x = _smoothed(x * x) - mean_x.square()
    var_y = _smoothed(y * y) - mean_y.square()
    both = _smoothed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    structure = (2 * both + _C2) / (var_x + var_y + _C2)
    return (luminance * structure).mean().item()


def _smoothed(images: Tensor) -> Tensor:
    radius = min(_RADIUS, (min(images.shape[-2:]) - 1) // 2)
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = (-offsets.square() / (2 * _SIGMA**2)).exp()
    kernel = kernel / kernel.sum()
    planes = images.flatten(0, 1)[:, None]
    planes = F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return planes.view(*images.shape[:2], *planes.shape[-2:])
