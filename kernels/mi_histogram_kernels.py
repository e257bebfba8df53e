"""Triton kernels of ``mi_histogram.py``: bin codes, and joint counts of one pair of directions.

Counts are gathered in shared memory (``tl.histogram``), in int32, so that no result depends on the
order of the images. ``mi_cross_kernels.py`` has the kernels that count many pairs at once.

With f(c, b) = c log(c b / N), N images and K bins, the information of n counted images is
[sum_xy f(n_xy, K^2) - sum_x f(n_x, K) - sum_y f(n_y, K) + f(n, 1)] / n. Every sum is about zero
where bins have equal mass and no image is missing: float32 loses less than it would with c log c.
"""

# Code inside triton.jit is Triton's: its loops, constants and operators are not Python's.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

# Checked by jaxtyping, a function is wrapped, and the interpreter loses its globals.
from typing import no_type_check

import triton
import triton.language as tl

MISSING = tl.constexpr(255)  # reference.MISSING: code of a value that has no bin


@triton.jit(do_not_specialize=["blocks"])
@no_type_check
def edge_codes_kernel(
    values_ptr,
    edges_ptr,
    codes_ptr,
    images,
    values_stride,
    edges_stride,
    blocks,
    BINS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bins ``BLOCK`` values of one direction by bisection of its edges."""
    direction = (tl.program_id(0) // blocks).to(tl.int64)
    image = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = image < images
    edges_ptr += direction * edges_stride
    value = tl.load(values_ptr + direction * values_stride + image, mask=inside, other=0).to(WIDE)
    low = tl.zeros([BLOCK], tl.int32)  # the last edge known not to lie above the value
    for step in tl.static_range(STEPS):
        middle = low + (1 << (STEPS - 1 - step))
        edge = tl.load(edges_ptr + middle, mask=middle < BINS, other=0).to(WIDE)
        low = tl.where((middle < BINS) & (edge <= value), middle, low)
    first = tl.load(edges_ptr).to(WIDE)
    last = tl.load(edges_ptr + BINS).to(WIDE)
    code = tl.where((value >= first) & (value <= last), low, MISSING)  # no comparison holds for NaN
    tl.store(codes_ptr + direction * images + image, code.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["pairs", "second"])
@no_type_check
def pair_counts_kernel(
    x_ptr,
    y_ptr,
    group_ptr,
    counts_ptr,
    rolls,
    start,
    stop,
    images,
    x_stride,
    y_stride,
    pairs,
    second,
    BINS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPED: tl.constexpr,
    CROSS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROLLS: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes ``ROWS`` of the rows (group, x) of the tables of one pair and roll."""
    TILES: tl.constexpr = (GROUPS * BINS + ROWS - 1) // ROWS
    first_row = (tl.program_id(0) % TILES) * ROWS
    table = tl.program_id(0) // TILES
    x_ptr, y_ptr = _pair_rows(x_ptr, y_ptr, table % pairs, x_stride, y_stride, second, CROSS)
    roll = roll_of(rolls, table // pairs, ROLLS)
    counts = _count(
        x_ptr, y_ptr, group_ptr, roll, start, stop, images, first_row,
        BINS, BINS, GROUPS, GROUPED, ALIGNED, ROWS, CELLS, BLOCK,
    )  # fmt: skip
    cell = tl.arange(0, CELLS)  # [CELLS]
    mine = (cell < ROWS * BINS) & (cell < (GROUPS * BINS - first_row) * BINS)
    cell += first_row * BINS
    counts_ptr += ((table // pairs).to(tl.int64) * GROUPS * pairs + table % pairs) * (BINS * BINS)
    if GROUPS > 1:
        group = (cell // (BINS * BINS)).to(tl.int64)
        offset = group * pairs * (BINS * BINS) + cell % (BINS * BINS)
    else:
        offset = cell
    tl.store(counts_ptr + offset, counts, mask=mine)


@triton.jit(do_not_specialize=["pairs", "second"])
@no_type_check
def pair_information_kernel(
    x_ptr,
    y_ptr,
    information_ptr,
    rolls,
    images,
    x_stride,
    y_stride,
    pairs,
    second,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    CROSS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROLLS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the information of one pair and roll, from ``ROWS`` rows of its table at a time."""
    table = tl.program_id(0)
    x_ptr, y_ptr = _pair_rows(x_ptr, y_ptr, table % pairs, x_stride, y_stride, second, CROSS)
    roll = roll_of(rolls, table // pairs, ROLLS)
    y_counts = tl.zeros([WIDTH], tl.int32)
    nats = tl.full([], 0.0, tl.float64)  # of few, large numbers that nearly cancel
    for first_row in range(0, BINS, ROWS):
        counts = _count(
            x_ptr, y_ptr, x_ptr, roll, 0, images, images, first_row,
            BINS, WIDTH, 1, False, ALIGNED, ROWS, ROWS * WIDTH, BLOCK,
        )  # fmt: skip
        counts = tl.reshape(counts, [ROWS, WIDTH])
        nats += tl.sum(tl.sum(deviation(counts, BINS * BINS, images), 1), 0)
        nats -= tl.sum(deviation(tl.sum(counts, 1), BINS, images), 0)
        y_counts += tl.sum(counts, 0)
    nats -= tl.sum(deviation(y_counts, BINS, images), 0)
    information = information_of(nats.to(tl.float32), tl.sum(y_counts, 0), images)
    tl.store(information_ptr + table, information)


@triton.jit
@no_type_check
def _count(
    x_ptr,
    y_ptr,
    group_ptr,
    roll,
    start,
    stop,
    images,
    first_row,
    BINS: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts of one pair in rows from ``first_row``: cell (row - first_row) * STRIDE + y."""
    counts = tl.zeros([CELLS], tl.int32)
    for block in range(start, stop, BLOCK):
        image = block + tl.arange(0, BLOCK)  # [BLOCK]
        inside = image < stop
        partner = partner_of(image, roll, images, ALIGNED)
        x = tl.load(x_ptr + image, mask=inside, other=MISSING).to(tl.int32)
        y = tl.load(y_ptr + partner, mask=inside, other=MISSING).to(tl.int32)
        row = x - first_row
        counted = inside & (x < BINS) & (y < BINS)
        if GROUPED:
            group = tl.load(group_ptr + image, mask=inside, other=-1)
            counted &= (group >= 0) & (group < GROUPS)
            row += group.to(tl.int32) * BINS
        if ROWS < GROUPS * BINS:
            counted &= (row >= 0) & (row < ROWS)
        counts += tl.histogram(row * STRIDE + y, CELLS, mask=counted)
    return counts


@triton.jit
@no_type_check
def _pair_rows(x_ptr, y_ptr, pair, x_stride, y_stride, second, CROSS: tl.constexpr):
    """First codes of a pair: of matched rows, or of any first row with any second one."""
    if CROSS:
        x_ptr += (pair // second).to(tl.int64) * x_stride
        y_ptr += (pair % second).to(tl.int64) * y_stride
    else:
        x_ptr += pair.to(tl.int64) * x_stride
        y_ptr += pair.to(tl.int64) * y_stride
    return x_ptr, y_ptr


@triton.jit
@no_type_check
def roll_of(rolls, which, ROLLS: tl.constexpr):
    """Roll number ``which``; ``packed_rolls`` put two bits below it."""
    roll = rolls[0]
    for i in tl.static_range(1, ROLLS):
        roll = tl.where(which == i, rolls[i], roll)
    return roll >> 2


@triton.jit
@no_type_check
def partner_of(image, roll, images, ALIGNED: tl.constexpr):
    """Image whose y code a rolled pairing gives to this one: image - roll, around the end."""
    partner = image - roll
    partner = tl.where(partner < 0, partner + images, partner)
    if ALIGNED:  # no run of 16 images is broken by the end
        partner = tl.max_contiguous(tl.multiple_of(partner, 16), 16)
    return partner


@triton.jit
@no_type_check
def deviation(counts, bins, images):
    """f(c, bins) of the top of this file; 0 for an empty bin.

    ``tl.log`` branches on denormals, and as many branches as a thread has cells keep all their
    registers alive. Here log(2^k (1 + x)) = k log 2 + x + x^2 q(x) with |x| < 0.42, q fitted to
    4e-8, which stays finite at 0.
    """
    wide = counts.to(tl.float32)
    scale = bins * (1.0 / images)  # float32; by what 1 / N is rounded cancels in the sum
    bits = (wide * scale).to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) & -0x800000  # exponent above that of sqrt(1/2), where it lies
    x = (bits - power).to(tl.float32, bitcast=True) - 1.0
    q = -0.100346185 * x + 0.163356468
    q = q * x - 0.173259959
    q = q * x + 0.198882774
    q = q * x - 0.249614656
    q = q * x + 0.333352625
    q = q * x - 0.500005841
    return wide * (power.to(tl.float32) * 8.26295829e-8 + (q * x * x + x))


@triton.jit
@no_type_check
def information_of(nats, counted, images):
    """Information from f of all cells, less f of all rows and columns; never negative."""
    nats += deviation(counted, 1, images)
    return tl.maximum(nats / tl.maximum(counted, 1).to(tl.float32), 0.0)
