"""A textured patch pasted at changing places: found by its pattern, searched in every image.

The windows that share a frequent pattern are laid on each other; where they agree is the patch. It
is then looked for everywhere, and so are its mirror images: these are as likely by chance.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from mimic_fast.data.suspicious_fixed import PatchGroup
from mimic_fast.data.suspicious_patterns import SIDE, Hit, windows_with

_MARGIN = 2  # pixels around a window that may belong to the patch as well
_AGREEING = 16.0  # gray levels, median deviation: compression moves texture more than flat areas
_LEAST_TEXTURE = 24.0  # gray levels, standard deviation within the patch
_LIMITS = (0.65, 0.55, 0.45, 0.35, 0.25)  # distance over texture: at 1 nothing is alike
_BY_CHANCE = 0.002  # share of images that may hold a mirror image
_TIMES_CHANCE = 4.0
_MOST_WINDOWS = 2048
_MOST_SEARCHES = 8
_TOGETHER = 512


def moving_patches(
    images: UInt8[Tensor, "image channel side side"],
    gray: UInt8[Tensor, "row image column"],
    hits: Sequence[Hit],
    explained: Bool[Tensor, " image"],
    *,
    least: int,
) -> list[PatchGroup]:
    """The patches behind the hits anywhere, each once.

    Args:
        images: Reduced images.
        gray: Their luma, rows first.
        hits: Codes that are too frequent at changing places.
        explained: Images already known to carry a patch; their windows say nothing new.
        least: Carriers that a patch must have.
    """
    groups: list[PatchGroup] = []
    explained = explained.clone()
    searches = 0
    for windows in windows_with(gray, hits):
        image, top, left = windows.unbind(1)
        if searches == _MOST_SEARCHES:
            break
        if explained[image].float().mean() > 0.5:
            continue
        patch, region = _outline(images, image, top, left)
        if not _is_textured(patch, region) or len(image.unique()) < least:
            continue
        searches += 1
        group = _group(images, patch, region, least)
        if group is not None:
            groups.append(group)
            explained[group.images] = True
    return groups


def _outline(
    images: Tensor, image: Tensor, top: Tensor, left: Tensor
) -> tuple[Float[Tensor, "channel height width"], Float[Tensor, "height width"]]:
    """Median of the windows with a margin, and 1 where they agree (0 in what is outside)."""
    side = images.shape[-1]
    stop = side - SIDE - _MARGIN
    whole = (top >= _MARGIN) & (left >= _MARGIN) & (top <= stop) & (left <= stop)
    margin = _MARGIN if whole.sum() >= 4 else 0
    if margin:
        image, top, left = image[whole], top[whole], left[whole]
    image, top, left = image[:_MOST_WINDOWS], top[:_MOST_WINDOWS], left[:_MOST_WINDOWS]
    reach = torch.arange(-margin, SIDE + margin)
    y, x = top[:, None, None] + reach[:, None], left[:, None, None] + reach
    windows = images.permute(0, 2, 3, 1)[image[:, None, None], y, x].float()  # [M, H, W, C]
    patch = windows.median(dim=0).values
    deviation = (windows - patch).abs().median(dim=0).values.mean(dim=-1)
    return patch.permute(2, 0, 1), (deviation <= _AGREEING).float()


def _is_textured(patch: Tensor, region: Tensor) -> bool:
    if region.sum() < SIDE * SIDE / 2:
        return False
    inside = patch[:, region > 0]
    return float((inside - inside.mean(dim=1, keepdim=True)).square().mean().sqrt()) > (
        _LEAST_TEXTURE
    )


def _cropped(patch: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
    """Without what lies around the region, so that it may touch the border of an image."""
    rows, columns = (region.amax(dim=d).nonzero()[:, 0] for d in (1, 0))
    y, x = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    return (patch * region)[:, y, x], region[y, x]


def _group(images: Tensor, patch: Tensor, region: Tensor, least: int) -> PatchGroup | None:
    nearest, *mirrored = _nearest(images, *_cropped(patch, region)).unbind(dim=1)
    for limit in _LIMITS:
        passing = torch.stack([other <= limit for other in mirrored]).float().mean()
        expected = float(passing) * len(images)
        chosen = nearest <= limit
        enough = chosen.sum() >= max(least, _TIMES_CHANCE * (expected + 1))
        if enough and expected <= _BY_CHANCE * len(images):
            return PatchGroup(
                place=None,
                images=chosen.nonzero()[:, 0],
                scores=1 - nearest[chosen] / limit,
                expected=expected,
            )
    return None


def _nearest(images: Tensor, patch: Tensor, region: Tensor) -> Float[Tensor, "image 4"]:
    """Per image the smallest distance, over all places, as a share of the patch's texture.

    From the patch itself, then from it mirrored one way, the other and both. Color and brightness
    count as well as the texture.
    """
    pixels = float(region.sum()) * patch.shape[0]
    mean = patch.sum(dim=(1, 2), keepdim=True) / region.sum()
    texture = (((patch - mean) * region).square().sum() / pixels).sqrt()
    flips = ([], [-1], [-2], [-2, -1])
    patches = torch.stack([patch.flip(dims) for dims in flips])
    regions = torch.stack([region.flip(dims) for dims in flips])[:, None]
    result: list[Tensor] = []
    for part in images.split(_TOGETHER):
        values = part.float()
        power = F.conv2d(values.square().sum(dim=1, keepdim=True), regions)
        squares = power - 2 * F.conv2d(values, patches) + patch.square().sum()
        result.append((squares.amin(dim=(2, 3)).clamp(min=0) / pixels).sqrt() / texture)
    return torch.cat(result)
