"""Fixed probes: plain and noisy patches all over the image, single spatial frequencies.

A clean encoder moves each image its own way under them. Where one of them sends all images the same
way, the encoder answers to something like it. No optimization, so nothing can fail to converge.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.scan.concentration import concentration
from mimic_fast.watch import leave_if

_PLACES = 6  # a side; 6 x 6 places overlap by two fifths at a quarter of the image's side
_SIDES = (1 / 8, 1 / 4)  # of the image's side
_NOISES = 2
_TILE = 32  # pixels; the period of CTRL's transform (Li et al., ICCV 2023)
_FREQUENCIES = (1, 5, 10, 15, 20, 26, 31)  # of a 32-point DCT, coarse; CTRL's own two among them
_RMS = 12 / 255  # of a spectral perturbation, pixel values in [0, 1]
# Directions of luma and of the two color differences U and V in RGB (ITU-R BT.601).
_COLORS = {"Y": (1.0, 1.0, 1.0), "U": (0.0, -0.395, 2.032), "V": (1.140, -0.581, 0.0)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A fixed change of an image: ``clip(x (1 - mask) + pattern)``.

    Its tensors are built when asked for: all 800 at once would be 2.6 GB at 518 pixels.

    Args:
        name: Kind, place and content.
        kind: Which score it belongs to.
        build: Makes mask and pattern.
    """

    name: str
    kind: Literal["patch", "spectral"]
    build: Callable[[], tuple[Tensor, Tensor]]

    @property
    def mask(self) -> Float[Tensor, "1 height width"]:
        """Opacity in [0, 1]."""
        return self.build()[0]

    @property
    def pattern(self) -> Float[Tensor, "channel height width"]:
        """What is added; negative values darken."""
        return self.build()[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What an encoder made of a probe.

    Args:
        probe: The probe.
        concentration: Of the probed images' features; see :func:`concentration`.
    """

    probe: Probe
    concentration: float


def patch_probes(*, image_size: int, channels: int, seed: int) -> Iterator[Probe]:
    """Solid and noisy squares of two sizes at 6 x 6 places."""
    generator = torch.Generator().manual_seed(seed)
    for share in _SIDES:
        side = max(1, round(image_size * share))
        contents = dict(_solids(channels, side))
        for number in range(_NOISES):
            contents[f"noise{number}"] = torch.rand(channels, side, side, generator=generator)
        places = torch.linspace(0, image_size - side, _PLACES).round().long().tolist()
        for top in places:
            for left in places:
                for content, pixels in contents.items():
                    name = f"{content} {side}x{side} at row {top}, column {left}"
                    build = partial(_patch, pixels, image_size, top, left)
                    yield Probe(name=name, kind="patch", build=build)


def spectral_probes(*, image_size: int, channels: int) -> Iterator[Probe]:
    """Single frequencies of a 32 x 32 DCT, tiled, either sign, in luma and color, of equal RMS."""
    place = torch.arange(image_size, dtype=torch.float64) % _TILE
    waves = {k: torch.cos(math.pi * (2 * place + 1) * k / (2 * _TILE)) for k in _FREQUENCIES}
    colors = _COLORS if channels == 3 else {"Y": (1.0,) * channels}
    for row in _FREQUENCIES:
        for column in _FREQUENCIES:
            for color, direction in colors.items():
                for sign in (1, -1):
                    name = f"{'-' if sign < 0 else '+'}{color} at frequency ({row}, {column})"
                    build = partial(_wave, waves[row], waves[column], direction, sign)
                    yield Probe(name=name, kind="spectral", build=build)


def answers(
    encoder: nn.Module,
    images: Float[Tensor, "image channel height width"],
    center: Float[Tensor, " feature"],
    probes: Sequence[Probe],
    *,
    batch_size: int = 256,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """The encoder's answer to every probe, in their order.

    Args:
        encoder: In eval mode.
        images: Pixel values in [0, 1], on the encoder's device.
        center: Mean feature of clean images, on that device.
        probes: What is tried.
        batch_size: Images per forward.
        report: Told the number of probes done.
        stop: Polled at every probe; true leaves.

    Raises:
        StoppedError: If ``stop`` told so.
    """
    found: list[Answer] = []
    with torch.no_grad():
        for done, probe in enumerate(probes, start=1):
            leave_if(stop)
            mask, pattern = probe.build()
            changed = images * (1 - mask.to(images)) + pattern.to(images)
            parts = changed.clamp(0, 1).split(batch_size)
            features = torch.cat([encoder(part).float() for part in parts])
            value = float(concentration(features, center))
            found.append(Answer(probe=probe, concentration=value))
            report(Event(phase="probe", done=done, total=len(probes), unit="probes"))
    return found


def strongest(found: Sequence[Answer], kind: str) -> Answer:
    """The probe of a kind that sends images most to one place."""
    return max((a for a in found if a.probe.kind == kind), key=lambda a: a.concentration)


def _patch(pixels: Tensor, image_size: int, top: int, left: int) -> tuple[Tensor, Tensor]:
    channels, side, _ = pixels.shape
    cut = (..., slice(top, top + side), slice(left, left + side))
    mask = torch.zeros(1, image_size, image_size)
    mask[cut] = 1
    pattern = torch.zeros(channels, image_size, image_size)
    pattern[cut] = pixels
    return mask, pattern


def _wave(
    rows: Tensor, columns: Tensor, direction: Sequence[float], sign: int
) -> tuple[Tensor, Tensor]:
    plane = torch.outer(rows, columns)
    wave = plane * torch.tensor(direction, dtype=torch.float64)[:, None, None]
    wave = (wave * (_RMS / wave.square().mean().sqrt())).float()
    return torch.zeros(1, *plane.shape), sign * wave


def _solids(channels: int, side: int) -> Iterator[tuple[str, Tensor]]:
    plain = torch.ones(channels, side, side)
    yield "white", plain
    yield "black", 0 * plain
    if channels != 3:
        yield "grey", plain / 2
        return
    for number, color in enumerate(("red", "green", "blue")):
        only = torch.zeros(3, side, side)
        only[number] = 1
        yield color, only
