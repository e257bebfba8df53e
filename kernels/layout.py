"""How an activation lies in memory, so that a kernel reads it where it is, without a copy.

Tokens ``[B, N, C]`` and channels_last maps keep the channels of a position together (``tokens``);
NCHW maps keep the positions of a channel together (``planes``). Class and register tokens are left
out by an offset, images that take no part by a count.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes and strides, in elements, of what counts of one activation.

    Args:
        kind: ``tokens``: stride_channel is 1; ``planes``: stride_position is 1.
        images: B, images that count (the first of the batch).
        positions: N, positions that count.
        channels: C.
        stride_image: Between images.
        stride_position: Between positions.
        stride_channel: Between channels.
        start: Offset of the first position that counts from ``data_ptr()``.
    """

    kind: Literal["tokens", "planes"]
    images: int
    positions: int
    channels: int
    stride_image: int
    stride_position: int
    stride_channel: int
    start: int


def layout_of(activation: Tensor, *, prefix: int = 0, images: int | None = None) -> Layout | None:
    """Layout of ``[B, D]`` features, ``[B, N, C]`` tokens or a ``[B, C, H, W]`` map.

    Args:
        activation: What was tapped; features have one position.
        prefix: Class and register tokens before the positions that count (tokens only).
        images: Only the first so many count; None: all.

    Returns:
        None if neither channels nor positions are dense: a copy is needed (``contiguous()``).
    """
    return _layout(tuple(activation.shape), activation.stride(), prefix, images)


def has_gaps(activation: Tensor) -> bool:
    """Whether memory between its elements is not its own."""
    return _has_gaps(tuple(activation.shape), activation.stride())


# A step asks for the same few shapes again and again; on small layers that was a tenth of the op.
@lru_cache(maxsize=1024)
def _layout(
    sizes: tuple[int, ...], strides: tuple[int, ...], prefix: int, images: int | None
) -> Layout | None:
    if len(sizes) == 2:
        positions, channels = 1, sizes[1]
        position, channel = 0, strides[1]
    elif len(sizes) == 3:
        positions, channels = sizes[1] - prefix, sizes[2]
        position, channel = strides[1], strides[2]
    else:
        positions, channels = sizes[2] * sizes[3], sizes[1]
        if sizes[2] > 1 and sizes[3] > 1 and strides[2] != sizes[3] * strides[3]:
            return None
        position, channel = strides[3] if sizes[3] > 1 else strides[2], strides[1]
    if channel == 1 or channels == 1:
        kind = "tokens"
    elif position == 1 or positions == 1:
        kind = "planes"
    else:
        return None
    return Layout(
        kind=kind,
        images=sizes[0] if images is None else images,
        positions=positions,
        channels=channels,
        stride_image=strides[0],
        stride_position=position,
        stride_channel=channel,
        start=prefix * strides[1] if len(sizes) == 3 else 0,
    )


@lru_cache(maxsize=1024)
def _has_gaps(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return reach + 1 != math.prod(sizes)
