"""Small patterns that recur on more images than chance allows: the trace of a pasted patch.

Every 5x5 window of the gray image becomes a 25-bit code, which compression hardly changes. Natural
images hold few codes often (edges, corners) and these everywhere alike, so that two comparisons
within the data show what was pasted: a code at one place against the same code at all the other
places, and a code anywhere against its mirror images and its negative, which nature makes as often.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

SIDE = 5  # pixels; the smallest patch that a window can lie within
_BITS = SIDE * SIDE
_CODES = 1 << _BITS
_CENTER = _BITS // 2
_CONTRAST = 10  # gray levels, standard deviation: weaker windows are sky and noise
_STEP = 16  # gray levels; what differs less from the central pixel counts as equal
_TOGETHER = 4096  # images coded at a time
_MOST_HITS = 64

CODINGS = ("bright", "equal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A code that is too frequent.

    Args:
        coding: One of ``CODINGS``: pixels above the window's mean, or equal to its center.
        code: The bits.
        place: Top and left of the window; None: it recurs at changing places.
        count: Windows that have it.
        expected: Windows that should have it.
    """

    coding: str
    code: int
    place: tuple[int, int] | None
    count: int
    expected: float


def frequent_patterns(
    gray: UInt8[Tensor, "row image column"], *, least: int, ratio: float
) -> tuple[list[Hit], list[Hit]]:
    """Hits at one place and hits anywhere, the most surprising first; at most 64 of each.

    Args:
        gray: Luma, rows first.
        least: Windows a code must have.
        ratio: How many times the expectation (plus one) it must reach.
    """
    fixed: list[Hit] = []
    anywhere: list[Hit] = []
    places = (gray.shape[0] - SIDE + 1) * (gray.shape[2] - SIDE + 1)
    for coding in CODINGS:
        total, frequent = _counted(gray, coding, least)
        if len(frequent):
            top, left, code, count = frequent.T
            expected = (total[code] - count) / max(1, places - 1)
            chosen = np.flatnonzero(count >= ratio * (expected + 1))
            fixed += [
                Hit(
                    coding=coding,
                    code=int(code[i]),
                    place=(int(top[i]), int(left[i])),
                    count=int(count[i]),
                    expected=float(expected[i]),
                )
                for i in chosen
            ]
        # Equal to the center: its few codes stand for many patterns, so the place must be the same.
        if coding == "bright":
            anywhere += _asymmetric(total, least, ratio)
    return _largest(fixed), _largest(anywhere)


def windows_with(
    gray: UInt8[Tensor, "row image column"], hits: Sequence[Hit]
) -> list[Int[Tensor, "window 3"]]:
    """Per hit: image, top and left of every window that has the code, at its place or anywhere."""
    found: list[list[Tensor]] = [[] for _ in hits]
    for coding in {hit.coding for hit in hits}:
        wanted = torch.tensor([hit.code for hit in hits if hit.coding == coding])
        for top in range(gray.shape[0] - SIDE + 1):
            here = [
                i
                for i, hit in enumerate(hits)
                if hit.coding == coding and (hit.place is None or hit.place[0] == top)
            ]
            if not here:
                continue
            for start, codes in _row_codes(gray, top, coding):
                image, left = torch.isin(codes, wanted.int()).nonzero().unbind(1)
                code = codes[image, left]
                rows = torch.stack([image + start, torch.full_like(image, top), left], dim=1)
                for i in here:
                    place = hits[i].place
                    mine = code == hits[i].code
                    found[i].append(rows[mine if place is None else mine & (left == place[1])])
    return [torch.cat(parts) for parts in found]


def _row_codes(gray: Tensor, top: int, coding: str) -> Iterator[tuple[int, Tensor]]:
    """First image and codes ``[image, left]`` of one row of windows; -1: too little contrast."""
    places = gray.shape[2] - SIDE + 1
    for start in range(0, gray.shape[1], _TOGETHER):
        rows = gray[top : top + SIDE, start : start + _TOGETHER].to(torch.int16)
        shifted = [rows[y, :, x : x + places] for y in range(SIDE) for x in range(SIDE)]
        sums = torch.zeros(shifted[0].shape, dtype=torch.int32)
        squares = torch.zeros_like(sums)
        for pixel in shifted:
            sums += pixel
            squares += pixel.int() ** 2
        codes = torch.zeros_like(sums)
        for bit, pixel in enumerate(shifted):
            codes |= _bit(pixel, shifted[_CENTER], sums, coding).int() << bit
        flat = squares * _BITS - sums**2 < (_CONTRAST * _BITS) ** 2
        yield start, codes.masked_fill_(flat, -1)


def _bit(pixel: Tensor, center: Tensor, sums: Tensor, coding: str) -> Bool[Tensor, "image left"]:
    if coding == "bright":
        return pixel.int() * _BITS > sums
    return (pixel - center).abs() <= _STEP


def _counted(gray: Tensor, coding: str, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of every code, and rows (top, left, code, count) of those frequent at one place."""
    total = np.zeros(_CODES, dtype=np.int32)
    frequent: list[np.ndarray] = [np.empty((0, 4), dtype=np.int64)]
    for top in range(gray.shape[0] - SIDE + 1):
        codes = torch.cat([codes for _, codes in _row_codes(gray, top, coding)])
        ordered = np.sort(codes.numpy(), axis=0)
        for left in range(ordered.shape[1]):
            column = ordered[np.searchsorted(ordered[:, left], 0) :, left]
            starts = np.flatnonzero(np.diff(column, prepend=-1))
            counts = np.diff(starts, append=len(column))
            total[column[starts]] += counts
            many = counts >= least
            rows = np.stack([column[starts][many], counts[many]], axis=1)
            where = np.broadcast_to([top, left], rows.shape)
            frequent.append(np.concatenate([where, rows], axis=1))
    return total, np.concatenate(frequent)


def _asymmetric(total: np.ndarray, least: int, ratio: float) -> list[Hit]:
    """Codes more frequent than the mean of their mirror images, quarter turns and negatives."""
    codes = np.flatnonzero(total >= least)
    sums, others = np.zeros(len(codes)), np.zeros(len(codes))
    for order in _symmetries():
        moved = np.zeros_like(codes)
        for bit, origin in enumerate(order):
            moved |= ((codes >> int(origin)) & 1) << bit
        for variant in (moved, moved ^ (_CODES - 1)):
            differs = variant != codes
            sums += np.where(differs, total[variant], 0)
            others += differs
    expected = sums / np.maximum(others, 1)
    chosen = np.flatnonzero(total[codes] >= ratio * (expected + 1))
    return [
        Hit(
            coding="bright",
            code=int(codes[i]),
            place=None,
            count=int(total[codes[i]]),
            expected=float(expected[i]),
        )
        for i in chosen
    ]


def _symmetries() -> list[np.ndarray]:
    """The eight orders of a window's pixels under mirroring and quarter turns."""
    grid = np.arange(_BITS).reshape(SIDE, SIDE)
    turned = [np.rot90(grid, turns) for turns in range(4)]
    return [order.ravel() for grid in turned for order in (grid, grid[:, ::-1])]


def _largest(hits: list[Hit]) -> list[Hit]:
    return sorted(hits, key=_surprise, reverse=True)[:_MOST_HITS]


def _surprise(hit: Hit) -> float:
    return (hit.count - hit.expected) / (hit.expected + 1) ** 0.5
