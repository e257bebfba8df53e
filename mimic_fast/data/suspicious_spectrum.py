"""Spectra of images in sizes that can be compared, and images with a spectrum of their own."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

STEP = 0.05  # of stored coefficients
_CLIP = 6.3  # what 8 bits hold in such steps
_SIDE = 32  # the central tile that is looked at
_LOWEST = 3.0  # cycles; below, pictures have structure of their own
_OUTLIER = 6.0  # robust standard deviations of one image's energy in a band
_BANDS = 6
_TOGETHER = 1024
_SAMPLE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectra:
    """Spectra of images, comparable among them.

    Args:
        coefficients: Cosine and Fourier coefficients over their usual size, in steps of 0.05.
        energies: Log energy per band of frequencies, low to high.
    """

    coefficients: Int8[Tensor, "image column"]
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
        coefficients.append((shown.clamp(-_CLIP, _CLIP) / STEP).round().to(torch.int8))
        luma = sizes[:, : side * side].square()
        sums = torch.zeros(len(part), _BANDS).index_add_(1, band, luma)
        energies.append((sums / torch.bincount(band, minlength=_BANDS) + 1e-3).log())
    return Spectra(coefficients=torch.cat(coefficients), energies=torch.cat(energies))


def energy_outliers(
    spectra: Spectra,
) -> tuple[Int[Tensor, " image"], Float[Tensor, " image"]]:
    """Images whose energy in some band of frequencies is far from the others', and how far."""
    energies = spectra.energies
    center = energies.median(dim=0).values
    away = (energies - center).abs() / robust_deviation(energies - center).clamp(min=1e-3)
    furthest = away.amax(dim=1)
    found = (furthest > _OUTLIER).nonzero()[:, 0]
    return found, furthest[found]


def robust_deviation(values: Float[Tensor, "row column"]) -> Float[Tensor, " column"]:
    """Standard deviation around 0 that outliers do not change, per column."""
    return 1.4826 * values.abs().median(dim=0).values


def _usual_size(tiles: Tensor, bases: list[tuple[Tensor, Tensor]]) -> Float[Tensor, " column"]:
    step = max(1, len(tiles) // _SAMPLE)
    # A gray level more: coefficients that compression has erased are not to be blown up.
    return 1 + robust_deviation(_transformed(tiles[::step], bases))


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
