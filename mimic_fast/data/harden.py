"""Student-only perturbation: above all rectangles of foreign content in the student's view.

The teacher sees the view as it was. What the student learns to imitate then cannot hang on a local
pattern, such as a trigger patch, which a plain clone loss would teach it from clean images alone.
Against triggers that lie over the whole image see ``harden_whole.py``.
"""

import math

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mimic_fast.config import HardenSettings
from mimic_fast.data.augment import plain_view
from mimic_fast.data.counter import uniforms
from mimic_fast.data.harden_whole import blended, waved

_STREAM = 1000  # apart from the views' streams
_ASPECT = math.log(3.0)  # height / width between 1/3 and 3 where that fits, log-uniform


def hardened(
    views: Float[Tensor, "batch channel height width"],
    ids: Int[Tensor, " batch"],
    pool: UInt8[Tensor, "image channel side side"],
    *,
    settings: HardenSettings,
    seed: int,
    epoch: int | Int[Tensor, " batch"],
) -> Float[Tensor, "batch channel height width"]:
    """The views blended, waved and with rectangles pasted in; the input is not changed.

    Args:
        views: First augmented views.
        ids: Item ids, which with seed and epoch decide everything random.
        pool: All training images, donors of the ``image`` kind.
        settings: Probability; blend, waves; area, contents and number of rectangles.
        seed: Seed of the run.
        epoch: Pass over the data, of all items or of each.
    """
    if settings.probability == 0:
        return views
    chosen = uniforms(ids, 1, seed=seed, epoch=epoch, stream=_STREAM)[:, 0] < settings.probability
    rows = chosen.nonzero()[:, 0]
    epochs = epoch[rows] if isinstance(epoch, Tensor) else epoch
    result = views
    key = {"settings": settings, "seed": seed, "epoch": epochs}
    if settings.blend > 0:
        result = result.index_copy(0, rows, blended(result[rows], ids[rows], pool, **key))
    if settings.waves > 0:
        result = result.index_copy(0, rows, waved(result[rows], ids[rows], **key))
    for index in range(settings.rectangles):
        u = uniforms(ids[rows], 10, seed=seed, epoch=epochs, stream=_STREAM + 2 * index)
        inside = _rectangles(u, views.shape[2], views.shape[3], settings.area)
        content = _contents(views[rows], ids[rows], pool, u, settings, seed, epochs, index)
        result = result.index_copy(0, rows, torch.where(inside, content, result[rows]))
    return result


def _rectangles(u: Tensor, height: int, width: int, area: tuple[float, float]) -> Tensor:
    """Masks ``[B, 1, H, W]``; small areas are as likely as large ones (log-uniform)."""
    low, high = math.log(area[0]), math.log(area[1])
    log_share = low + u[:, 1] * (high - low)
    # A large area must be nearly square to fit: share * aspect <= 1 both ways.
    aspect = torch.exp((2 * u[:, 2] - 1) * (-log_share).clamp(max=_ASPECT))
    size = log_share.exp() * height * width
    tall = (size * aspect).sqrt().round().clamp(1, height)
    wide = (size / aspect).sqrt().round().clamp(1, width)
    top = (u[:, 3] * (height - tall + 1)).floor()
    left = (u[:, 4] * (width - wide + 1)).floor()
    y = torch.arange(height, device=u.device)
    x = torch.arange(width, device=u.device)
    rows = (y >= top[:, None]) & (y < (top + tall)[:, None])
    columns = (x >= left[:, None]) & (x < (left + wide)[:, None])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _contents(
    views: Tensor,
    ids: Tensor,
    pool: Tensor,
    u: Tensor,
    settings: HardenSettings,
    seed: int,
    epoch: int | Tensor,
    index: int,
) -> Tensor:
    """What fills the rectangles, at full image size ``[B, C, H, W]``."""
    B, C, H, W = views.shape
    kind = (u[:, 5] * len(settings.kinds)).long()
    # Arcsine-distributed: likeliest near black and white, the colors that triggers tend to have.
    color = (1 - torch.cos(math.pi * u[:, 6 : 6 + C])) / 2
    content = color[:, :, None, None].expand_as(views).clone()
    for number, name in enumerate(settings.kinds):
        rows = (kind == number).nonzero()[:, 0]
        if name == "noise":
            passes = epoch[rows] if isinstance(epoch, Tensor) else epoch
            noise = uniforms(
                ids[rows], C * H * W, seed=seed, epoch=passes, stream=_STREAM + 2 * index + 1
            )
            content[rows] = noise.view(-1, C, H, W)
        elif name == "image":
            donors = (u[rows, 9] * pool.shape[0]).long()
            content[rows] = plain_view(pool[donors], image_size=H)
    return content
