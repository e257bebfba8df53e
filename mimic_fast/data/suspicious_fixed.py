"""A patch pasted at one place: its outline, and which images carry it.

A frequent pattern names some carriers. Where they agree, pixel by pixel, is the patch. Carriers are
then all images that show it there, with a border against what surrounds it: a plain white patch is
thus told from white sky. The same region read a little beside its place says how many images would
pass by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mimic_fast.data.suspicious_patterns import SIDE, Hit, windows_with

_LEAST_PIXELS = 9  # a patch of 3x3
_LARGEST_SHARE = 0.5  # of height and width: larger is no patch but the same kind of picture
_AGREEING = 6.0  # gray levels: median deviation among carriers, at most ...
_SHARE_OF_USUAL = 0.3  # ... this share of that among all images
_TOLERANCE = 10.0  # gray levels, mean over the patch: compression moves flat areas less
_LIMITS = (8.0, 10.0, 12.5, 16.0, 20.0, 25.0, 32.0)  # gray levels, mean step across the border
_CLIP = 48  # gray levels; one pixel counts no more
_SAMPLE = 512  # images that say what is usual
_TOGETHER = 4096
_BY_CHANCE = 0.005  # share of images that may pass beside the place
_TIMES_CHANCE = 4.0  # carriers against those expected


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchGroup:
    """Images that carry one patch.

    Args:
        place: Top, left, height and width in pixels of the reduced images; None: changing places.
        images: Positions of the carriers.
        scores: Per carrier: how near it comes to the patch, 0 (at the limit) .. 1 (equal).
        expected: Images that would pass by chance.
    """

    place: tuple[int, int, int, int] | None
    images: Int[Tensor, " carrier"]
    scores: Float[Tensor, " carrier"]
    expected: float


def fixed_patches(
    images: UInt8[Tensor, "image channel side side"],
    gray: UInt8[Tensor, "row image column"],
    hits: Sequence[Hit],
    *,
    least: int,
) -> list[PatchGroup]:
    """The patches behind the hits at one place, each once."""
    usual = _usual_deviation(images)
    groups: list[PatchGroup] = []
    explained = torch.zeros(images.shape[0], dtype=torch.bool)
    for hit, windows in zip(hits, windows_with(gray, hits), strict=True):
        carriers = windows[:, 0]
        if explained[carriers].float().mean() > 0.5:
            continue
        group = _group(images, carriers, hit, usual, least)
        if group is not None:
            groups.append(group)
            explained[group.images] = True
    return groups


def _group(
    images: Tensor, carriers: Tensor, hit: Hit, usual: Tensor, least: int
) -> PatchGroup | None:
    assert hit.place is not None
    patch, region = _outline(images[carriers].float(), hit.place, usual)
    rows, columns = region.any(1).nonzero()[:, 0], region.any(0).nonzero()[:, 0]
    if int(region.sum()) < _LEAST_PIXELS:
        return None
    top, left = int(rows[0]), int(columns[0])
    height, width = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
    if max(height, width) > _LARGEST_SHARE * region.shape[0]:
        return None
    distance, border = _measured(images, patch, region, (0, 0))
    near = distance <= _TOLERANCE
    beside = [_measured(images, patch, region, shift) for shift in _shifts(region)]
    if not beside:
        return None
    for limit in _LIMITS:
        expected = _chance(beside, limit) * len(images)
        chosen = near & (border >= limit)
        enough = chosen.sum() >= max(least, _TIMES_CHANCE * (expected + 1))
        if enough and expected <= _BY_CHANCE * len(images):
            break
    else:
        return None
    return PatchGroup(
        place=(top, left, height, width),
        images=chosen.nonzero()[:, 0],
        scores=1 - distance[chosen] / _TOLERANCE,
        expected=expected,
    )


def _usual_deviation(images: Tensor) -> Float[Tensor, "side side"]:
    """Median deviation from the median among all images, mean over channels, pixel by pixel."""
    step = max(1, len(images) // _SAMPLE)
    sample = images[::step].float()
    return (sample - sample.median(dim=0).values).abs().median(dim=0).values.mean(dim=0)


def _outline(
    carriers: Tensor, place: tuple[int, int], usual: Tensor
) -> tuple[Float[Tensor, "channel side side"], Bool[Tensor, "side side"]]:
    """The carriers' median image, and the pixels in which they agree that touch the window."""
    patch = carriers.median(dim=0).values
    deviation = (carriers - patch).abs().median(dim=0).values.mean(dim=0)
    agreeing = deviation <= torch.clamp(_SHARE_OF_USUAL * usual, max=_AGREEING)
    region = torch.zeros_like(agreeing)
    top, left = place
    region[top : top + SIDE, left : left + SIDE] = True
    region &= agreeing
    while True:
        grown = F.max_pool2d(region[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
        grown &= agreeing
        if torch.equal(grown, region):
            return patch, region
        region = grown


def _measured(
    images: Tensor, patch: Tensor, region: Tensor, shift: tuple[int, int]
) -> tuple[Float[Tensor, " image"], Float[Tensor, " image"]]:
    """Mean distance from the patch within the region, and mean difference across its border."""
    inner, outer = _border_pairs(region)
    side = region.shape[0]
    offset = shift[0] * side + shift[1]
    inside = region.flatten().nonzero()[:, 0]
    wanted = patch.flatten(1)[:, inside]
    distances: list[Tensor] = []
    borders: list[Tensor] = []
    for part in images.split(_TOGETHER):
        pixels = part.flatten(2)
        seen = pixels[:, :, inside + offset].float()
        distances.append((seen - wanted).abs().clamp(max=_CLIP).mean(dim=(1, 2)))
        across = pixels[:, :, inner + offset].float() - pixels[:, :, outer + offset].float()
        borders.append(across.abs().amax(dim=1).clamp(max=_CLIP).mean(dim=1))
    return torch.cat(distances), torch.cat(borders)


def _border_pairs(region: Tensor) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Flat positions of neighboring pixels, the first inside the region and the second outside."""
    side = region.shape[0]
    y, x = region.nonzero().unbind(1)
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        ny, nx = y + dy, x + dx
        crossing = (ny >= 0) & (ny < side) & (nx >= 0) & (nx < side)
        crossing &= ~region[ny.clamp(0, side - 1), nx.clamp(0, side - 1)]
        inner.append((y * side + x)[crossing])
        outer.append((ny * side + nx)[crossing])
    return torch.cat(inner), torch.cat(outer)


def _shifts(region: Tensor) -> list[tuple[int, int]]:
    """Ways to move the region and the pixels around it within the image, far enough to be apart."""
    side = region.shape[0]
    around = F.max_pool2d(region[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
    rows, columns = around.any(1).nonzero()[:, 0], around.any(0).nonzero()[:, 0]
    top, bottom, left, right = (int(v) for v in (rows[0], rows[-1], columns[0], columns[-1]))
    moves = {
        (dy, dx)
        for dy in range(-top, side - bottom)
        for dx in range(-left, side - right)
        if max(abs(dy), abs(dx)) in (3, 4)
    }
    return sorted(moves)[:: max(1, len(moves) // 12)]


def _chance(beside: Sequence[tuple[Tensor, Tensor]], limit: float) -> float:
    """Share of images that would pass at the places beside."""
    passing = [((d <= _TOLERANCE) & (b >= limit)).float().mean() for d, b in beside]
    return float(torch.stack(passing).mean())
