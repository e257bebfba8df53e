"""Student-only perturbation of the whole image: another image blended in, a wave added.

What rectangles cannot cover: triggers that lie over all of the image, faint pictures and spatial
frequencies. Strengths are drawn anew for every image, from none to the most that is allowed.
"""

import math

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mimic_fast.config import HardenSettings
from mimic_fast.data.augment import plain_view
from mimic_fast.data.counter import uniforms

_BLEND, _WAVES = 1800, 1801  # streams, apart from the rectangles'


def blended(
    views: Float[Tensor, "batch channel height width"],
    ids: Int[Tensor, " batch"],
    pool: UInt8[Tensor, "image channel side side"],
    *,
    settings: HardenSettings,
    seed: int,
    epoch: int | Int[Tensor, " batch"],
) -> Float[Tensor, "batch channel height width"]:
    """Another training image over each view, at an opacity uniform in [0, ``settings.blend``)."""
    u = uniforms(ids, 2, seed=seed, epoch=epoch, stream=_BLEND)
    donors = pool[(u[:, 0] * len(pool)).long()]
    opacity = (u[:, 1] * settings.blend)[:, None, None, None]
    return torch.lerp(views, plain_view(donors, image_size=views.shape[-1]), opacity)


def waved(
    views: Float[Tensor, "batch channel height width"],
    ids: Int[Tensor, " batch"],
    *,
    settings: HardenSettings,
    seed: int,
    epoch: int | Int[Tensor, " batch"],
) -> Float[Tensor, "batch channel height width"]:
    """A sinusoid added to each view, clipped to [0, 1].

    Direction and phase are uniform, the frequency is log-uniform from one period over the image to
    the finest that pixels can hold; each channel has an amplitude of its own, uniform within
    plus and minus ``settings.waves``.
    """
    _, channels, height, width = views.shape
    u = uniforms(ids, 3 + channels, seed=seed, epoch=epoch, stream=_WAVES)
    angle, phase = math.pi * u[:, 0], 2 * math.pi * u[:, 1]
    periods = torch.exp(u[:, 2] * math.log(max(height, width) / 2))
    y = torch.arange(height, device=views.device) / height
    x = torch.arange(width, device=views.device) / width
    across = (periods * angle.cos())[:, None, None] * x
    down = (periods * angle.sin())[:, None, None] * y[:, None]
    wave = torch.cos(2 * math.pi * (across + down) + phase[:, None, None])
    amplitude = (2 * u[:, 3:] - 1) * settings.waves
    return (views + amplitude[:, :, None, None] * wave[:, None]).clamp(0, 1)
