"""Block sizes of the fused distillation loss: fixed by shape and element size, not tuned.

A tile holds two 16-byte vectors a thread (one where warps are 64 wide); as few of its elements are
masked as powers of two allow. Small images take fewer warps, so that more of them share a
processor.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import triton

WASTE = 1.2  # elements of a tile over those that count: below it, other merits decide
MOST_SLOTS = 2048  # in a row of planes: threads hold its sums in registers


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBlocks:
    """Tiles of ``block_n`` positions by ``block_c`` channels."""

    block_n: int
    block_c: int
    num_warps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaneBlocks:
    """Tiles of ``block_r`` rows, each of ``block_p`` positions of ``row`` channels."""

    row: int
    block_r: int
    block_p: int
    num_warps: int


def token_blocks(
    positions: int, channels: int, itemsize: int, *, most_warps: int, lanes: int
) -> TokenBlocks:
    """Tiles of tokens: few masked elements, then many warps, then pieces of 512 bytes."""
    options: list[tuple[float, TokenBlocks]] = []
    for warps in _warps(positions * channels * itemsize, most_warps):
        tile = warps * lanes * 16 // itemsize
        shortest = tile // triton.next_power_of_2(positions)
        longest = min(max(512 // itemsize, shortest), triton.next_power_of_2(channels))
        block_c = longest
        while block_c >= min(max(128 // itemsize, shortest), longest):
            blocks = TokenBlocks(block_n=max(1, tile // block_c), block_c=block_c, num_warps=warps)
            waste = _waste(positions, blocks.block_n) * _waste(channels, blocks.block_c)
            options.append((max(waste, WASTE), blocks))
            block_c //= 2
    return min(options, key=lambda option: option[0])[1]


def plane_blocks(
    positions: int, channels: int, itemsize: int, *, dense: bool, most_warps: int, lanes: int
) -> PlaneBlocks:
    """Tiles of planes: few masked elements, then many warps, then rows of about 512 slots.

    Args:
        positions: HW.
        channels: C.
        itemsize: Bytes an element.
        dense: Whether channels follow each other without a gap: rows may hold several.
        most_warps: Of a program; 4 or 8.
        lanes: 16-byte vectors of a tile for each warp, 32 or 64.
    """
    options: list[tuple[float, float, PlaneBlocks]] = []
    for warps in _warps(positions * channels * itemsize, most_warps):
        tile = warps * lanes * 16 // itemsize
        for row, block_p in _rows(positions, channels, itemsize, dense=dense):
            rows = triton.cdiv(channels, row)
            block_r = min(max(1, tile // (row * block_p)), triton.next_power_of_2(rows))
            blocks = PlaneBlocks(row=row, block_r=block_r, block_p=block_p, num_warps=warps)
            waste = _waste(positions, block_p) * _waste(rows, block_r)
            options.append((max(waste, WASTE), abs(math.log2(row * block_p / 512)), blocks))
    return min(options, key=lambda option: (option[0], -option[2].num_warps, option[1]))[2]


def unrolled(iterations: int, *, most: int) -> int:
    """Tiles whose loads are in flight together: all of three at most, or two (more would spill)."""
    if iterations <= most:
        return iterations
    return 2 if most > 1 and _waste(iterations, 2) <= WASTE else 1


def _rows(
    positions: int, channels: int, itemsize: int, *, dense: bool
) -> Iterator[tuple[int, int]]:
    """Channels a row and positions a block: of parts of one channel, or of whole channels.

    Rows of several channels are multiples of 16 bytes where one is not. Where that takes too many
    (odd HW above 256), rows of one channel are read without 128-bit loads.
    """
    whole = triton.next_power_of_2(positions)
    vector = 16 // itemsize
    least = vector // math.gcd(vector, positions) if dense else 1
    if least * whole > MOST_SLOTS:
        least = 1
    if least == 1:
        parts = [part for part in (512, 256, 128, 64) if 256 <= part * itemsize < whole * itemsize]
        yield from ((1, part) for part in parts)
    row = least
    while row * whole <= MOST_SLOTS and (row == least or (dense and channels % row == 0)):
        yield row, whole
        row *= 2


def _warps(image_bytes: int, most: int) -> Iterator[int]:
    """Warps that an image may take, descending: 8 KiB of it or more for each, but the first."""
    warps = most
    while warps > 1 and warps * 8192 > image_bytes:
        warps //= 2
    while warps >= 1:
        yield warps
        warps //= 2


def _waste(size: int, block: int) -> float:
    return triton.cdiv(size, block) * block / size
