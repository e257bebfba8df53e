"""Decodes items of a source once into one square uint8 tensor, the form kept in memory."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from mimic_fast.data.items import CorruptItemError, Source
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.progress import Event, Reporter, silent

_REPORT_EVERY = 256
_RESIZE_TOGETHER = 1024
_CROP_MARGIN = 8 / 7  # 256 / 224, the usual resize before a center crop


def load_images(
    source: Source,
    indices: Sequence[int],
    *,
    image_size: int,
    channels: int,
    evaluation: bool = False,
    side: int | None = None,
    report: Reporter = silent,
) -> tuple[UInt8[Tensor, "image channel side side"], tuple[int, ...]]:
    """Decodes images to squares of one side S, in the order of ``indices``.

    The largest square at the center is resized to S with antialiasing (bilinear). S is
    ``image_size`` with ``evaluation``, or if no such square is larger; else it is
    ``round(image_size * 8 / 7)``, which leaves room for the random crops of training. Gray becomes
    RGB by repetition, RGB becomes gray by ITU-R 601 luma.

    Corrupt items are left out and reported: compare the returned indices where none may be missing.

    Args:
        source: Where the images come from.
        indices: Items of the source.
        image_size: Input size of the encoder, pixels.
        channels: Input channels of the encoder, 1 or 3.
        evaluation: Exactly ``image_size``, for images that are not augmented.
        side: S, where it is known already; None: from the images.
        report: Told how many images are done, and of each corrupt item.

    Returns:
        The images, and the indices of those that could be decoded.

    Raises:
        UsageError: If ``channels`` is neither 1 nor 3, or ``indices`` is empty.
        UnsafeInputError: If no image at all can be decoded.
    """
    if channels not in (1, 3):
        raise UsageError(f"images have 1 or 3 channels, but the encoder expects {channels}")
    if not indices:
        raise UsageError(f"{source.name}: no image to load; ask for at least one")
    final = image_size if side is None else side
    squares: list[Tensor] = []
    kept: list[int] = []
    for done, index in enumerate(indices, start=1):
        if (image := _decoded(source, index, report)) is not None:
            square = with_channels(center_square(image), channels)
            if square.shape[-1] > image_size:
                if side is None and not evaluation:
                    final = round(image_size * _CROP_MARGIN)
                square = resized(square, final)  # now, so that no large image stays in memory
            squares.append(square)
            kept.append(index)
        if done % _REPORT_EVERY == 0 or done == len(indices):
            report(Event(phase="images", done=done, total=len(indices), unit="images"))
    if not squares:
        raise UnsafeInputError(f"{source.name}: none of {len(indices)} images can be decoded")
    return _stacked(squares, final), tuple(kept)


def square_side(sizes: Sequence[tuple[int, int]], *, image_size: int) -> int:
    """S of :func:`load_images` for images of these heights and widths, for training."""
    small = all(min(size) <= image_size for size in sizes)
    return image_size if small else round(image_size * _CROP_MARGIN)


def center_square(image: UInt8[Tensor, "channel height width"]) -> UInt8[Tensor, "channel s s"]:
    """The largest square at the center of an image."""
    _, height, width = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]


def resized(
    images: UInt8[Tensor, "*batch channel height width"], side: int
) -> UInt8[Tensor, "*batch channel {side} {side}"]:
    """Bilinear resize to ``side`` x ``side`` pixels, antialiased, rounded to uint8."""
    if images.shape[-2:] == (side, side):
        return images
    batch = images.reshape(-1, *images.shape[-3:])
    result = F.interpolate(batch, size=(side, side), mode="bilinear", antialias=True)
    return result.reshape(*images.shape[:-2], side, side)


def with_channels(
    images: UInt8[Tensor, "*batch channel height width"], channels: int
) -> UInt8[Tensor, "*batch {channels} height width"]:
    """Gray to RGB by repetition, RGB to gray by ITU-R 601 luma (Pillow's integer arithmetic)."""
    if images.shape[-3] == channels:
        return images
    if channels == 3:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    red, green, blue = images.int().unbind(dim=-3)
    luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return luma.to(torch.uint8).unsqueeze(-3)


def _decoded(source: Source, index: int, report: Reporter) -> Tensor | None:
    try:
        return source.decode(source.read(index))
    except CorruptItemError as error:
        report(Event(phase="images", message=f"left out {source.keys[index]}: {error}"))
        return None


def _stacked(squares: list[Tensor], side: int) -> Tensor:
    """One tensor; squares of one size are resized together, which is much faster if small."""
    result = torch.empty(len(squares), squares[0].shape[0], side, side, dtype=torch.uint8)
    by_side: dict[int, list[int]] = {}
    for position, square in enumerate(squares):
        by_side.setdefault(square.shape[-1], []).append(position)
    for positions in by_side.values():
        for start in range(0, len(positions), _RESIZE_TOGETHER):
            part = positions[start : start + _RESIZE_TOGETHER]
            result[part] = resized(torch.stack([squares[position] for position in part]), side)
    return result
