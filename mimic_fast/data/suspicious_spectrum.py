"""Patterns laid over whole images, found in their spectra: noise blended in, sinusoids.

Natural images have as many large positive as large negative coefficients: a mirrored image is as
natural. A pattern that many images share breaks this symmetry in the same coefficients. From there
follows a template of the pattern, and how far each image leans towards it; how many images lean as
far the other way says how many do so by chance (Tran et al., NeurIPS 2018, look for such a
direction in features; here it is looked for in pixels, which needs no encoder).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

_SIDE = 32  # the central tile that is looked at
_TAILS = (3.5, 5.0)  # robust standard deviations
_LOWEST = 3.0  # cycles; below, pictures have structure of their own
_SEPARATE = 3.0  # median score of a group over its limit: apart from all other images
_CLIP = 6.3  # stored as 8 bits
_STEP = 0.05
_SURPRISE = 4.2  # standard deviations of the difference between tails
_RATIO = 3.0  # one tail against the other
_ROUNDS = 3
_COSTS = (1.25, 2.0, 4.0)  # of one image by chance against one more that carries the pattern
_MOST_BY_CHANCE = 0.02  # share of images that may lean as far the other way
_TIMES_CHANCE = 3.0
_MOST_TRIES = 8
_FEW = 40  # coefficients
_SURPLUS = 0.004  # share of images
_MOST_SHARE = 0.1  # of images; a larger group is a kind of picture
_OUTLIER = 6.0  # robust standard deviations of one image's energy in a band
_BANDS = 6
_TOGETHER = 1024
_SAMPLE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlayGroup:
    """Images that share a pattern all over.

    Args:
        images: Positions.
        scores: Per image: how far it leans towards the pattern, robust standard deviations.
        expected: Images that would lean as far by chance.
    """

    images: Int[Tensor, " member"]
    scores: Float[Tensor, " member"]
    expected: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectra:
    """Spectra of images, comparable among them.

    Args:
        coefficients: Cosine and Fourier coefficients over their usual size, in steps of 0.05.
        energies: Log energy per band of frequencies, low to high.
    """

    coefficients: Tensor  # int8 [image, coefficient]
    energies: Float[Tensor, "image band"]


def spectra(images: UInt8[Tensor, "image channel side side"]) -> Spectra:
    """Spectra of the central tiles of at most 32 x 32 pixels."""
    side = min(_SIDE, images.shape[-1])
    margin = (images.shape[-1] - side) // 2
    tiles = images[:, :, margin : margin + side, margin : margin + side]
    bases = [_cosines(side), _waves(side)]
    usual = _usual_size(tiles, bases)
    frequencies = [_frequency(cycles) for cycles, _ in bases]
    high = (torch.cat([frequencies[0].repeat(3), frequencies[1]]) >= _LOWEST).float()
    band = (frequencies[0] * _BANDS / frequencies[0].max()).long().clamp(max=_BANDS - 1)
    coefficients: list[Tensor] = []
    energies: list[Tensor] = []
    for part in tiles.split(_TOGETHER):
        sizes = _transformed(part, bases) / usual
        spread = (sizes.clamp(-4, 4) * high).square().sum(1, keepdim=True) / high.sum()
        # Square root: half way between absolute sizes and those relative to the image's texture.
        shown = sizes * high / (spread.sqrt() + 0.05).sqrt()
        coefficients.append((shown.clamp(-_CLIP, _CLIP) / _STEP).round().to(torch.int8))
        luma = sizes[:, : side * side].square()
        sums = torch.zeros(len(part), _BANDS).index_add_(1, band, luma)
        energies.append((sums / torch.bincount(band, minlength=_BANDS) + 1e-3).log())
    return Spectra(coefficients=torch.cat(coefficients), energies=torch.cat(energies))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asymmetry:
    """A coefficient with many more large values of one sign."""

    column: int
    sign: int
    tail: float
    surprise: float
    surplus: int


def overlays(spectra: Spectra, *, least: int) -> list[OverlayGroup]:
    """Groups of at least ``least`` images that share a pattern, each pattern once."""
    stored = spectra.coefficients
    groups: list[OverlayGroup] = []
    explained = torch.zeros(len(stored), dtype=torch.bool)
    tries = 0
    asymmetric = _asymmetric(stored, least)
    few = len({found.column for found in asymmetric}) <= _FEW
    for found in asymmetric:
        members = stored[:, found.column].float() * found.sign * _STEP > found.tail
        if explained[members].float().mean() > 0.3:
            continue
        tries += 1
        # Where many coefficients lean to a side, or few images make the difference, pictures of one
        # kind can be the reason: then a group must stand apart from all the others.
        overlapping = few and found.surplus >= _SURPLUS * len(stored)
        group = _group(stored, members, least, overlapping=overlapping)
        if group is not None:
            groups.append(group)
            explained[group.images] = True
        if tries == _MOST_TRIES:
            break
    return groups


def energy_outliers(
    spectra: Spectra,
) -> tuple[Int[Tensor, " image"], Float[Tensor, " image"]]:
    """Images whose energy in some band of frequencies is far from the others', and how far."""
    energies = spectra.energies
    center = energies.median(dim=0).values
    away = (energies - center).abs() / _robust_deviation(energies - center).clamp(min=1e-3)
    furthest = away.amax(dim=1)
    found = (furthest > _OUTLIER).nonzero()[:, 0]
    return found, furthest[found]


def _asymmetric(stored: Tensor, least: int) -> list[_Asymmetry]:
    """Coefficients whose tails differ, the most surprising first."""
    found: list[_Asymmetry] = []
    for tail in _TAILS:
        positive = torch.zeros(stored.shape[1], dtype=torch.long)
        negative = torch.zeros_like(positive)
        for part in stored.split(_TOGETHER):
            positive += (part > tail / _STEP).sum(dim=0)
            negative += (part < -tail / _STEP).sum(dim=0)
        surprise = (positive - negative) / (positive + negative + 4).sqrt()
        more, fewer = torch.maximum(positive, negative), torch.minimum(positive, negative)
        chosen = (surprise.abs() >= _SURPRISE) & (more >= least)
        chosen &= more + 3 >= _RATIO * (fewer + 3)
        found += [
            _Asymmetry(
                column=column,
                sign=1 if surprise[column] > 0 else -1,
                tail=tail,
                surprise=abs(float(surprise[column])),
                surplus=int(more[column] - fewer[column]),
            )
            for column in chosen.nonzero()[:, 0].tolist()
        ]
    return sorted(found, key=lambda each: -each.surprise)


def _group(
    stored: Tensor, members: Tensor, least: int, *, overlapping: bool
) -> OverlayGroup | None:
    """The group that the first members lead to; None if it does not stand out."""
    chosen = members
    scores = torch.zeros(len(stored))
    for _ in range(_ROUNDS):
        template = _template(stored, chosen)
        if not bool(template.any()):
            return None
        scores = torch.cat([part.float() @ template for part in stored.split(_TOGETHER)])
        scores = scores - scores.median()
        scores = scores / _robust_deviation(scores[:, None]).clamp(min=1e-6)
        chosen = scores > _limit(scores, _COSTS[-1])[0]
        if chosen.sum() < least:
            return None
    for cost in _COSTS:
        limit, expected = _limit(scores, cost)
        chosen = scores > limit
        if chosen.sum() < max(least, _TIMES_CHANCE * (expected + 1)):
            continue
        if chosen.sum() > _MOST_SHARE * len(stored):
            return None
        if overlapping or scores[chosen].median() >= _SEPARATE * limit:
            return OverlayGroup(
                images=chosen.nonzero()[:, 0], scores=scores[chosen], expected=expected
            )
    return None


def _template(stored: Tensor, chosen: Tensor) -> Float[Tensor, " column"]:
    """What the chosen images have on average and the others have not."""
    usual = stored[:: max(1, len(stored) // _SAMPLE)].float().mean(dim=0)
    members = stored[chosen][:_SAMPLE].float()
    template = members.mean(dim=0) - usual
    noise = members.std(dim=0) / math.sqrt(len(members))
    return torch.where(template.abs() > 4 * noise, template, 0)


def _limit(scores: Tensor, cost: float) -> tuple[float, float]:
    """Where nearly all of the surplus of one tail lies above, and what of the other lies beyond.

    ``cost`` is what one of the other tail weighs: the higher, the purer the group.
    """
    levels = torch.logspace(math.log10(2.5), 2, 75)
    above = (scores[:, None] > levels).sum(dim=0)
    below = (scores[:, None] < -levels).sum(dim=0)
    allowed = below <= _MOST_BY_CHANCE * len(scores)
    surplus = torch.where(allowed, above - cost * below, 0)
    at = int((surplus >= 0.97 * surplus.max()).nonzero().max())
    return float(levels[at]), float(below[at])


def _robust_deviation(values: Float[Tensor, "row column"]) -> Float[Tensor, " column"]:
    return 1.4826 * values.abs().median(dim=0).values


def _usual_size(tiles: Tensor, bases: list[tuple[Tensor, Tensor]]) -> Float[Tensor, " column"]:
    step = max(1, len(tiles) // _SAMPLE)
    # A gray level more: coefficients that compression has erased are not to be blown up.
    return 1 + _robust_deviation(_transformed(tiles[::step], bases))


def _transformed(
    tiles: Tensor, bases: list[tuple[Tensor, Tensor]]
) -> Float[Tensor, "image column"]:
    """Cosine coefficients of luma and two color differences, then Fourier ones of luma."""
    red, green, blue = tiles.float().unbind(dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = torch.stack([luma, 0.564 * (blue - luma), 0.713 * (red - luma)], dim=1)
    (_, cosines), (_, waves) = bases
    # Color that differs between top and bottom, as sky does, leans all Fourier series to one side.
    parts = (cosines @ planes @ cosines.mT, waves @ planes[:, 0] @ waves.mT)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _cosines(side: int) -> tuple[Tensor, Tensor]:
    """Frequencies (cycles a side) and orthonormal basis of the DCT-II."""
    index = torch.arange(side)
    basis = torch.cos(math.pi / side * (index + 0.5) * index[:, None]) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)
    return index / 2, basis


def _waves(side: int) -> tuple[Tensor, Tensor]:
    """The same of the real Fourier series: a constant, then cosine and sine in turn."""
    cycles = (torch.arange(side) + 1) // 2
    angle = 2 * math.pi / side * cycles[:, None] * torch.arange(side)
    sine = (torch.arange(side) % 2 == 0)[:, None]
    basis = torch.where(sine, torch.sin(angle), torch.cos(angle))
    basis[0] = 1
    return cycles.float(), F.normalize(basis, dim=1)


def _frequency(cycles: Tensor) -> Float[Tensor, " column"]:
    return (cycles[:, None].square() + cycles.square()).sqrt().flatten()
