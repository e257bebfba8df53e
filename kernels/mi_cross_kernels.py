"""Triton kernels of ``mi_histogram.py`` that count all pairs of two blocks of directions at once.

The joint counts of D x D pairs with K bins are one product of one-hot codes [D K, images] with
[images, D K]: int8 on the tensor cores, sums in int32, no conflicts. Worth it up to 16 bins.
"""

# Code inside triton.jit is Triton's: its loops, constants and operators are not Python's.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

# Checked by jaxtyping, a function is wrapped, and the interpreter loses its globals.
from typing import no_type_check

import triton
import triton.language as tl

from mimic_fast.kernels.mi_histogram_kernels import (
    MISSING,
    deviation,
    information_of,
    partner_of,
    roll_of,
)

_NUMBERS = ("images", "x_stride", "y_stride", "first", "second", "x_blocks", "y_blocks")


@triton.jit(do_not_specialize=_NUMBERS)
@no_type_check
def cross_counts_kernel(
    x_ptr,
    y_ptr,
    counts_ptr,
    rolls,
    images,
    x_stride,
    y_stride,
    first,
    second,
    x_blocks,
    y_blocks,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROLLS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the tables of ``DIRECTIONS`` x ``DIRECTIONS`` pairs at one roll."""
    which, x_first, y_first = _block(x_blocks, y_blocks, DIRECTIONS)
    counts = _count(
        x_ptr, y_ptr, roll_of(rolls, which, ROLLS), images, x_stride, y_stride,
        x_first, y_first, first, second, BINS, WIDTH, DIRECTIONS, BLOCK,
    )  # fmt: skip
    line = tl.arange(0, DIRECTIONS * WIDTH)
    x_bin, y_bin = line % WIDTH, line % WIDTH
    x_row, y_row = x_first + line // WIDTH, y_first + line // WIDTH
    x_mine = (x_row < first) & (x_bin < BINS)
    y_mine = (y_row < second) & (y_bin < BINS)
    x_row = (which * first + x_row).to(tl.int64)
    line_ptr = counts_ptr + (x_row * second * BINS + x_bin) * BINS
    offset = y_row.to(tl.int64) * (BINS * BINS) + y_bin
    tl.store(line_ptr[:, None] + offset[None, :], counts, mask=x_mine[:, None] & y_mine[None, :])


@triton.jit(do_not_specialize=_NUMBERS)
@no_type_check
def cross_information_kernel(
    x_ptr,
    y_ptr,
    information_ptr,
    rolls,
    images,
    x_stride,
    y_stride,
    first,
    second,
    x_blocks,
    y_blocks,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROLLS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the information of ``DIRECTIONS`` x ``DIRECTIONS`` pairs at one roll."""
    which, x_first, y_first = _block(x_blocks, y_blocks, DIRECTIONS)
    counts = _count(
        x_ptr, y_ptr, roll_of(rolls, which, ROLLS), images, x_stride, y_stride,
        x_first, y_first, first, second, BINS, WIDTH, DIRECTIONS, BLOCK,
    )  # fmt: skip
    counts = tl.reshape(counts, [DIRECTIONS, WIDTH, DIRECTIONS, WIDTH])
    nats = tl.sum(tl.sum(deviation(counts, BINS * BINS, images), 3), 1)
    x_counts = tl.sum(counts, 3)
    nats -= tl.sum(deviation(x_counts, BINS, images), 1)
    nats -= tl.sum(deviation(tl.sum(counts, 1), BINS, images), 2)
    information = information_of(nats, tl.sum(x_counts, 1), images)
    x_row = x_first + tl.arange(0, DIRECTIONS)[:, None]
    y_row = y_first + tl.arange(0, DIRECTIONS)[None, :]
    offset = (which * first + x_row).to(tl.int64) * second + y_row
    tl.store(information_ptr + offset, information, mask=(x_row < first) & (y_row < second))


@triton.jit
@no_type_check
def _block(x_blocks, y_blocks, DIRECTIONS: tl.constexpr):
    """Which roll, and the first x and y direction, this program counts."""
    block = tl.program_id(0) % (x_blocks * y_blocks)
    which = tl.program_id(0) // (x_blocks * y_blocks)
    return which, block // y_blocks * DIRECTIONS, block % y_blocks * DIRECTIONS


@triton.jit
@no_type_check
def _count(
    x_ptr,
    y_ptr,
    roll,
    images,
    x_stride,
    y_stride,
    x_first,
    y_first,
    first,
    second,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts of two blocks of directions, (direction, bin) along either axis."""
    # Both blocks are loaded as one: a tensor with fewer elements than threads would be loaded
    # again by every thread that needs a part of it. Rows beyond the last repeat it, unstored.
    line = tl.arange(0, 2 * DIRECTIONS)[:, None]
    is_y = line >= DIRECTIONS
    x_row = tl.minimum(x_first + line, first - 1).to(tl.int64)
    y_row = tl.minimum(y_first + line - DIRECTIONS, second - 1).to(tl.int64)
    row_ptr = tl.where(is_y, y_ptr + y_row * y_stride, x_ptr + x_row * x_stride)
    roll = tl.where(is_y, roll, 0)
    counts = tl.zeros([DIRECTIONS * WIDTH, DIRECTIONS * WIDTH], tl.int32)
    for block in tl.range(0, images, BLOCK, num_stages=1):  # more stages spill on sm_80
        image = block + 4 * tl.arange(0, BLOCK // 4)[None, :]  # [1, BLOCK / 4]
        words = tl.reshape(_four_codes(row_ptr, image, roll, images), [2, DIRECTIONS, BLOCK // 4])
        x, y = tl.split(tl.permute(words, [1, 2, 0]))
        x_hot = _one_hot(x, BINS, WIDTH, DIRECTIONS, BLOCK)
        y_hot = _one_hot(y, BINS, WIDTH, DIRECTIONS, BLOCK)
        counts = tl.dot(x_hot, tl.trans(y_hot), counts, out_dtype=tl.int32)
    return counts


@triton.jit
@no_type_check
def _four_codes(row_ptr, image, roll, images):
    """Codes of four images in the bytes of a word; byte loads, as rolled rows are not aligned."""
    low = _code(row_ptr, image, roll, images)
    low |= _code(row_ptr, image + 1, roll, images) << 8
    high = _code(row_ptr, image + 2, roll, images) << 16
    high |= _code(row_ptr, image + 3, roll, images) << 24
    # A sum: past "or" the compiler would move its layout conversions, one to each byte.
    return tl.sum(tl.join(low, high), 2)


@triton.jit
@no_type_check
def _code(row_ptr, image, roll, images):
    mask = image < images
    code = tl.load(row_ptr + partner_of(image, roll, images, False), mask=mask, other=MISSING)
    return code.to(tl.uint32)


@triton.jit
@no_type_check
def _one_hot(
    words, BINS: tl.constexpr, WIDTH: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK: tl.constexpr
):
    """Indicators [DIRECTIONS * WIDTH, BLOCK] of bins; a code that is no bin has a zero column.

    Four codes, the bytes of a word, are compared at once; nothing is carried between bytes.
    """
    over = ((words & 0x7F7F7F7F) + (128 - BINS) * 0x01010101) | words  # top bit: no bin
    words = (words & 0x0F0F0F0F) | ((over & 0x80808080) >> 3)
    words = tl.reshape(words, [DIRECTIONS, 1, BLOCK // 4])
    bins = (tl.arange(0, WIDTH).to(tl.uint32) * 0x01010101)[None, :, None]
    # Differences are 0 or 1..31. The last step is a subtraction, which the compiler does not mix
    # with the shifts below: they then cost nothing, as a word already is its four bytes.
    hot = 0x01010101 - ((((words ^ bins) + 0x1F1F1F1F) >> 5) & 0x01010101)
    even = tl.join(hot.to(tl.int8), (hot >> 16).to(tl.int8))
    odd = tl.join((hot >> 8).to(tl.int8), (hot >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [DIRECTIONS * WIDTH, BLOCK])
