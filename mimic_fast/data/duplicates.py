"""Duplicates: the same bytes, the same pixels, nearly the same picture.

Near duplicates are found by an 8x8 thumbnail without its brightness and contrast, a perceptual hash
with 64 real numbers. Thumbnails no further apart than the limit differ by no more than it in any
projection, so a grid over the four principal directions, looked up cell by neighboring cell, misses
none and compares few (only where thousands fall into one cell is each compared with its next
neighbors alone). Each pair is then verified on all pixels.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mimic_fast.data.images import with_channels

_THUMB = 8  # pixels
_SCALE = 50.0  # gray levels, the contrast that all are brought to
_FLOOR = 16.0  # gray levels; weaker contrast is not raised to the full one, noise would decide
_THUMB_LIMIT = 4.0  # gray levels at that scale, root mean square
_PIXEL_LIMIT = 12.0
_DIRECTIONS = 4
_CROWD = 512  # members of a cell that are all compared with each other
_TOGETHER = 8192
_PAIRS_TOGETHER = 1 << 20
_SAMPLE = 20_000


def equal_groups(digests: Sequence[bytes]) -> tuple[tuple[int, ...], ...]:
    """Positions with the same digest, in groups of two and more."""
    places: dict[bytes, list[int]] = {}
    for position, digest in enumerate(digests):
        places.setdefault(digest, []).append(position)
    return tuple(tuple(group) for group in places.values() if len(group) > 1)


def near_groups(
    images: UInt8[Tensor, "image channel side side"],
) -> tuple[tuple[int, ...], ...]:
    """Images that show the same picture but for compression, brightness, contrast or noise.

    A chain of near duplicates is one group. Those with the very same pixels belong to it.
    """
    if len(images) < 2:
        return ()
    parents = np.arange(len(images))
    thumbs = _thumbs(images)
    for first, second in _candidates(thumbs):
        near = (thumbs[first] - thumbs[second]).square().mean(dim=1).sqrt() <= _THUMB_LIMIT
        _join(parents, images, first[near], second[near])
    roots = _roots(parents)
    order = np.argsort(roots, kind="stable")
    starts = np.flatnonzero(np.diff(roots[order], prepend=-1))
    groups = np.split(order, starts[1:])
    return tuple(tuple(int(i) for i in group) for group in groups if len(group) > 1)


def _thumbs(images: Tensor) -> Float[Tensor, "image 64"]:
    parts: list[Tensor] = []
    for part in images.split(_TOGETHER):
        luma = with_channels(part, 1).float()
        parts.append(_normal(F.adaptive_avg_pool2d(luma, _THUMB).flatten(1)))
    return torch.cat(parts)


def _normal(values: Float[Tensor, "image value"]) -> Float[Tensor, "image value"]:
    """Without mean, and of one contrast unless there is next to none."""
    values = values - values.mean(dim=1, keepdim=True)
    contrast = values.square().mean(dim=1, keepdim=True).sqrt()
    return values * (_SCALE / contrast.clamp(min=_FLOOR))


def _candidates(
    thumbs: Float[Tensor, "image 64"],
) -> Iterator[tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]]:
    """Pairs in the same or in neighboring cells, each pair once."""
    sample = thumbs[:: max(1, len(thumbs) // _SAMPLE)]
    directions = torch.linalg.eigh(sample.T @ sample)[1][:, -_DIRECTIONS:]
    width = _THUMB_LIMIT * _THUMB  # of a root mean square over 64 values, as a distance
    along = thumbs @ directions
    cells = (along / width).floor().long()
    cells -= cells.amin(dim=0) - 1  # a border, so that neighbors never wrap around
    sizes = cells.amax(dim=0) + 2
    strides = torch.tensor([int(sizes[i + 1 :].prod()) for i in range(_DIRECTIONS)])
    codes = (cells * strides).sum(dim=1)
    # Within a cell by the main direction, so that in a crowd neighbors stand together.
    order = torch.from_numpy(np.lexsort((along[:, -1].numpy(), codes.numpy())))
    codes = codes[order]
    for step in product((-1, 0, 1), repeat=_DIRECTIONS):
        offset = int((torch.tensor(step) * strides).sum())
        if offset < 0:
            continue
        start = torch.searchsorted(codes, codes + offset)
        stop = torch.searchsorted(codes, codes + offset, right=True)
        if offset == 0:
            start = torch.arange(1, len(codes) + 1)
        count = (stop - start).clamp(min=0, max=_CROWD)
        for first, second in _expanded(start, count):
            yield order[first], order[second]


def _expanded(start: Tensor, count: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(i, start[i]), (i, start[i] + 1), ... for every i, about a million pairs at a time."""
    rows = count.nonzero()[:, 0]
    ends = count[rows].cumsum(0)
    done = 0
    while done < len(rows):
        before = int(ends[done - 1]) if done else 0
        stop = int(torch.searchsorted(ends, before + _PAIRS_TOGETHER, right=True))
        stop = max(stop, done + 1)
        part = rows[done:stop]
        first = torch.repeat_interleave(part, count[part])
        inner = torch.arange(len(first)) - torch.repeat_interleave(
            ends[done:stop] - count[part] - before, count[part]
        )
        yield first, start[first] + inner
        done = stop


def _join(parents: np.ndarray, images: Tensor, first: Tensor, second: Tensor) -> None:
    """Joins the pairs that are alike in all pixels; those already joined are not looked at."""
    for a, b in zip(first.split(_TOGETHER), second.split(_TOGETHER), strict=True):
        roots = torch.from_numpy(_roots(parents))
        apart = roots[a] != roots[b]
        ours, theirs = (_normal(images[part[apart]].float().flatten(1)) for part in (a, b))
        alike = (ours - theirs).square().mean(dim=1).sqrt() <= _PIXEL_LIMIT
        pairs = zip(a[apart][alike].tolist(), b[apart][alike].tolist(), strict=True)
        for one, other in pairs:
            low, high = sorted((_root(parents, one), _root(parents, other)))
            parents[high] = low


def _root(parents: np.ndarray, position: int) -> int:
    while parents[position] != position:
        position = int(parents[position])
    return position


def _roots(parents: np.ndarray) -> np.ndarray:
    """The root of every position, which then is its parent: later walks are short."""
    while not np.array_equal(parents[parents], parents):
        parents[:] = parents[parents]
    return parents
