"""Color jitter on batches: each image has its own factors and its own order of changes."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as in torchvision


def jitter(
    images: Float[Tensor, "batch channel height width"],
    *,
    amounts: Float[Tensor, "batch 4"],
    chosen: Bool[Tensor, " batch"],
    order: Int[Tensor, "batch 4"],
) -> Float[Tensor, "batch channel height width"]:
    """Brightness, contrast, saturation and hue of the chosen images; gray images get the first two.

    Args:
        images: In [0, 1].
        amounts: Changes of brightness, contrast and saturation (factors minus 1) and of hue
            (turns); 0 changes nothing, to the last bit.
        chosen: Which images are changed.
        order: Per image, the order in which the four changes are made.
    """
    changes: list[Callable[[Tensor, Tensor], Tensor]] = [_brightness, _contrast, _saturation, _hue]
    used = range(4 if images.shape[1] == 3 else 2)
    result = images
    for place in range(4):
        for index in used:
            here = chosen & (order[:, place] == index) & (amounts[:, index] != 0)
            rows = here.nonzero()[:, 0]
            changed = changes[index](result[rows], amounts[rows, index, None, None, None])
            result = result.index_copy(0, rows, changed)
    return result


def to_gray(
    images: Float[Tensor, "batch channel height width"],
) -> Float[Tensor, "batch 1 height width"]:
    """Luma of color images; gray images as they are."""
    if images.shape[1] == 1:
        return images
    weights = images.new_tensor(_GRAY)
    return (images * weights[:, None, None]).sum(dim=1, keepdim=True)


def _brightness(images: Tensor, amount: Tensor) -> Tensor:
    return (images * (1 + amount)).clamp(0, 1)


def _contrast(images: Tensor, amount: Tensor) -> Tensor:
    # Rows first: the mean of a single image in one go would be split among threads, and its last
    # bits would depend on how many images of the batch happen to be here.
    mean = to_gray(images).mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)
    return torch.lerp(mean, images, 1 + amount).clamp(0, 1)


def _saturation(images: Tensor, amount: Tensor) -> Tensor:
    return torch.lerp(to_gray(images).expand_as(images), images, 1 + amount).clamp(0, 1)


def _hue(images: Tensor, amount: Tensor) -> Tensor:
    # f(n) = v - v s max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6, gives R, G, B for n = 5, 3, 1.
    high, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    chroma = high - low
    red, green, blue = images.split(1, dim=1)
    safe = chroma.clamp(min=1e-12)
    sector = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    offset = images.new_tensor([5.0, 3.0, 1.0])[:, None, None]
    k = (offset + sector + 6 * amount).remainder(6)
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
