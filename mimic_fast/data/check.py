"""What is in a data source and what is wrong with it: every item really read and decoded.

One pass gives counts, sizes, digests and the corrupt items; what it keeps of an image is a small
square, in which near duplicates and suspicious images are then searched. No labels and no encoder
are needed.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from mimic_fast.data.check_result import DataCheck, Size, Suspect
from mimic_fast.data.duplicates import equal_groups, near_groups
from mimic_fast.data.images import center_square, resized, with_channels
from mimic_fast.data.items import CorruptItemError, Source
from mimic_fast.data.suspicious import SuspiciousGroup, find_suspicious
from mimic_fast.errors import UsageError
from mimic_fast.progress import Event, Reporter, silent

LARGEST_SIDE = 64  # pixels, of the squares unless another side is asked for
_SMALLEST_SIDE = 8
_PROBED = 64  # images that decide on the side
_IN_MEMORY = 2**30  # bytes of squares; more are kept in a temporary file
_REPORT_EVERY = 256


def check_source(
    source: Source,
    *,
    image_size: int | None = None,
    limit: int | None = None,
    report: Reporter = silent,
) -> DataCheck:
    """Reads and decodes every item and searches for what is wrong.

    Args:
        source: Any source.
        image_size: Side of the squares to search, pixels; None: the usual side of the images, at
            most 64.
        limit: Check this many items, spread evenly over the source.
        report: Told how many images are done, and of each corrupt item.

    Raises:
        UsageError: If ``image_size`` or ``limit`` is too small.
    """
    if image_size is not None and image_size < _SMALLEST_SIDE:
        raise UsageError(f"image size must be at least {_SMALLEST_SIDE} pixels, got {image_size}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1 item, got {limit}")
    count = len(source) if limit is None else min(limit, len(source))
    indices = _spread(len(source), count)
    side = image_size or _usual_side(source, indices)
    seen = _read_all(source, indices, side, report)
    return DataCheck(
        source=source.name,
        items=len(source),
        checked=len(indices),
        good=len(seen.good),
        item_bytes=seen.item_bytes,
        labels=_label_counts(source, indices),
        sizes=tuple(
            Size(width=width, height=height, channels=channels, images=images)
            for (width, height, channels), images in seen.sizes.most_common()
        ),
        side=side,
        corrupt=tuple(seen.corrupt),
        **_searched(seen, [source.keys[index] for index in seen.good], report),
    )


class _Findings(TypedDict):
    same_bytes: tuple[tuple[str, ...], ...]
    same_pixels: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]
    groups: tuple[SuspiciousGroup, ...]
    suspicious: tuple[Suspect, ...]


@dataclass(kw_only=True, slots=True)
class _Seen:
    """What the pass has gathered; one digest and one square per good item."""

    squares: Tensor
    good: list[int] = field(default_factory=list)
    byte_digests: list[bytes] = field(default_factory=list)
    pixel_digests: list[bytes] = field(default_factory=list)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    sizes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    item_bytes: int = 0

    def add(self, index: int, data: bytes, image: Tensor) -> None:
        channels, height, width = image.shape
        shape = f"{channels} {height} {width} ".encode()
        self.byte_digests.append(hashlib.sha256(data).digest())
        self.pixel_digests.append(hashlib.sha256(shape + image.numpy().tobytes()).digest())
        self.sizes[width, height, channels] += 1
        square = resized(center_square(image), self.squares.shape[-1])
        self.squares[len(self.good)] = with_channels(square, 3)
        self.good.append(index)


def _read_all(source: Source, indices: Sequence[int], side: int, report: Reporter) -> _Seen:
    seen = _Seen(squares=_room(len(indices), side))
    for done, index in enumerate(indices, start=1):
        try:
            data = source.read(index)
            seen.item_bytes += len(data)
            seen.add(index, data, source.decode(data))
        except CorruptItemError as error:
            key = source.keys[index]
            seen.corrupt.append((key, str(error)))
            report(Event(phase="data check", message=f"corrupt {key}: {error}"))
        if done % _REPORT_EVERY == 0 or done == len(indices):
            report(Event(phase="data check", done=done, total=len(indices), unit="images"))
    return seen


def _searched(seen: _Seen, keys: Sequence[str], report: Reporter) -> _Findings:
    """Duplicates and suspicious images; of near duplicates, which share all, one is searched.

    The squares are moved up in place.
    """
    squares = seen.squares[: len(keys)]
    report(Event(phase="duplicates", done=0, total=1, unit="steps"))
    same_bytes, same_pixels = equal_groups(seen.byte_digests), equal_groups(seen.pixel_digests)
    near = near_groups(squares)
    report(Event(phase="duplicates", done=1, total=1, unit="steps"))
    copies = {index for group in near for index in group[1:]}
    kept = [index for index in range(len(keys)) if index not in copies]
    for place, index in enumerate(kept if copies else ()):
        squares[place] = squares[index]
    groups, found = find_suspicious(squares[: len(kept)], report=report)
    same: dict[bytes, list[int]] = {}
    for index, digest in enumerate(seen.pixel_digests):
        same.setdefault(digest, []).append(index)
    return _Findings(
        same_bytes=_named(same_bytes, keys),
        same_pixels=_named(_differing(same_pixels, seen.byte_digests), keys),
        near_duplicates=_named(_differing(near, seen.pixel_digests), keys),
        groups=groups,
        suspicious=tuple(
            Suspect(key=keys[index], reason=each.reason, score=each.score, group=each.group)
            for each in found
            for index in same[seen.pixel_digests[kept[each.index]]]
        ),
    )


def _room(count: int, side: int) -> Tensor:
    """Uint8 ``[count, 3, side, side]``, in a nameless temporary file if it is large."""
    shape = (count, 3, side, side)
    if np.prod(shape) <= _IN_MEMORY:
        return torch.empty(shape, dtype=torch.uint8)
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="w+", shape=shape))


def _usual_side(source: Source, indices: Sequence[int]) -> int:
    sides: list[int] = []
    for place in _spread(len(indices), min(_PROBED, len(indices))):
        try:
            sides.append(min(source.decode(source.read(indices[place])).shape[1:]))
        except CorruptItemError:
            continue
    usual = round(median(sides)) if sides else LARGEST_SIDE
    return max(_SMALLEST_SIDE, min(usual, LARGEST_SIDE))


def _spread(total: int, count: int) -> list[int]:
    """``count`` of ``total`` positions at even distances: sources are often sorted by class."""
    return [place * total // count for place in range(count)]


def _label_counts(source: Source, indices: Sequence[int]) -> dict[str, int] | None:
    if source.labels is None:
        return None
    counts = Counter(source.labels[index] for index in indices)
    names = source.classes
    return {
        str(label) if names is None else names[label]: counts[label] for label in sorted(counts)
    }


def _differing(groups: Sequence[Sequence[int]], digests: Sequence[bytes]) -> list[tuple[int, ...]]:
    """One of each digest in every group, where that leaves two or more."""
    single = [tuple({digests[i]: i for i in reversed(group)}.values()) for group in groups]
    return [tuple(sorted(group)) for group in single if len(group) > 1]


def _named(groups: Sequence[Sequence[int]], keys: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(keys[i] for i in group) for group in groups)
