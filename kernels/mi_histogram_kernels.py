"""Triton kernels of ``mi_histogram.py``: bin codes, joint counts on chip, mutual information.

Counts are gathered in shared memory (``tl.histogram``; any pair of directions) or as a product of
one-hot codes on the tensor cores (every pair of two blocks of directions). Both count in int32, so
that no result depends on the order of the images.

With n the images counted, I = sum_xy n_xy / n log(n_xy n / (n_x n_y)). In float32 this form loses
less than a difference of entropies would: its terms are about as small as the information itself,
and the ratio is exactly 1 where one side is constant.
"""

import triton
import triton.language as tl

MISSING = tl.constexpr(255)  # reference.MISSING: code of a value that has no bin


@triton.jit
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
    values_ptr += direction * values_stride
    edges_ptr += direction * edges_stride
    value = tl.load(values_ptr + image, mask=inside, other=0).to(WIDE)
    low = tl.zeros([BLOCK], tl.int32)  # the last edge known not to lie above the value
    for step in tl.static_range(STEPS):
        middle = low + (1 << (STEPS - 1 - step))
        edge = tl.load(edges_ptr + middle, mask=middle < BINS, other=0).to(WIDE)
        low = tl.where((middle < BINS) & (edge <= value), middle, low)
    first = tl.load(edges_ptr).to(WIDE)
    last = tl.load(edges_ptr + BINS).to(WIDE)
    code = tl.where((value >= first) & (value <= last), low, MISSING)  # no comparison holds of NaN
    tl.store(codes_ptr + direction * images + image, code.to(tl.uint8), mask=inside)


@triton.jit
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
    roll = _roll_of(rolls, table // pairs, ROLLS)
    counts = _count(
        x_ptr, y_ptr, group_ptr, roll, start, stop, images, first_row,
        BINS, BINS, GROUPS, GROUPED, ALIGNED, ROWS, CELLS, BLOCK,
    )  # fmt: skip
    cell = tl.arange(0, CELLS)  # [CELLS]
    mine = (cell < ROWS * BINS) & (cell < (GROUPS * BINS - first_row) * BINS)
    cell += first_row * BINS
    group = cell // (BINS * BINS)
    first_table = (table // pairs).to(tl.int64) * GROUPS * pairs + table % pairs
    if GROUPED:
        offset = (first_table + group.to(tl.int64) * pairs) * (BINS * BINS) + cell % (BINS * BINS)
    else:
        offset = first_table * (BINS * BINS) + cell
    tl.store(counts_ptr + offset, counts, mask=mine)


@triton.jit
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
    """Writes the information of one pair and roll, from a table of ``WIDTH`` >= ``BINS`` bins."""
    table = tl.program_id(0)
    x_ptr, y_ptr = _pair_rows(x_ptr, y_ptr, table % pairs, x_stride, y_stride, second, CROSS)
    roll = _roll_of(rolls, table // pairs, ROLLS)
    y_counts = tl.zeros([WIDTH], tl.int32)
    nats = 0.0
    for first_row in tl.static_range(0, WIDTH, ROWS):
        counts = _count(
            x_ptr, y_ptr, x_ptr, roll, 0, images, images, first_row,
            BINS, WIDTH, 1, False, ALIGNED, ROWS, ROWS * WIDTH, BLOCK,
        )  # fmt: skip
        counts = tl.reshape(counts, [ROWS, WIDTH])
        nats += tl.sum(tl.sum(_deviation(counts, BINS * BINS, images), 1), 0)
        nats -= tl.sum(_deviation(tl.sum(counts, 1), BINS, images), 0)
        y_counts += tl.sum(counts, 0)
    nats -= tl.sum(_deviation(y_counts, BINS, images), 0)
    tl.store(information_ptr + table, _information(nats, tl.sum(y_counts, 0), images))


@triton.jit
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
    ALIGNED: tl.constexpr,
    ROLLS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the tables of ``DIRECTIONS`` x ``DIRECTIONS`` pairs at one roll."""
    which, x_row, y_row = _cross_rows(x_blocks, y_blocks, DIRECTIONS)
    roll = _roll_of(rolls, which, ROLLS)
    counts = _cross_count(
        x_ptr, y_ptr, x_row, y_row, roll, images, x_stride, y_stride, first, second,
        BINS, WIDTH, ALIGNED, DIRECTIONS, BLOCK,
    )  # fmt: skip
    line = tl.arange(0, DIRECTIONS * WIDTH)
    x_bin, y_bin = line % WIDTH, line % WIDTH
    x_row += line // WIDTH
    y_row += line // WIDTH
    table = (which * first + x_row).to(tl.int64)[:, None] * second + y_row[None, :]
    offset = (table * BINS + x_bin[:, None]) * BINS + y_bin[None, :]
    x_mine = (x_row < first) & (x_bin < BINS)
    y_mine = (y_row < second) & (y_bin < BINS)
    tl.store(counts_ptr + offset, counts, mask=x_mine[:, None] & y_mine[None, :])


@triton.jit
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
    ALIGNED: tl.constexpr,
    ROLLS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the information of ``DIRECTIONS`` x ``DIRECTIONS`` pairs at one roll."""
    which, x_row, y_row = _cross_rows(x_blocks, y_blocks, DIRECTIONS)
    roll = _roll_of(rolls, which, ROLLS)
    counts = _cross_count(
        x_ptr, y_ptr, x_row, y_row, roll, images, x_stride, y_stride, first, second,
        BINS, WIDTH, ALIGNED, DIRECTIONS, BLOCK,
    )  # fmt: skip
    counts = tl.reshape(counts, [DIRECTIONS, WIDTH, DIRECTIONS, WIDTH])
    nats = tl.sum(tl.sum(_deviation(counts, BINS * BINS, images), 3), 1)
    x_counts = tl.sum(counts, 3)
    nats -= tl.sum(_deviation(x_counts, BINS, images), 1)
    nats -= tl.sum(_deviation(tl.sum(counts, 1), BINS, images), 2)
    information = _information(nats, tl.sum(x_counts, 1), images)
    x_row += tl.arange(0, DIRECTIONS)
    y_row += tl.arange(0, DIRECTIONS)
    offset = (which * first + x_row).to(tl.int64)[:, None] * second + y_row[None, :]
    mine = (x_row < first)[:, None] & (y_row < second)[None, :]
    tl.store(information_ptr + offset, information, mask=mine)


@triton.jit
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
    """Counts of rows ``first_row ..`` of one pair: cell (row - first_row) * STRIDE + y."""
    counts = tl.zeros([CELLS], tl.int32)
    for block in range(start, stop, BLOCK):
        image = block + tl.arange(0, BLOCK)  # [BLOCK]
        inside = image < stop
        x = tl.load(x_ptr + image, mask=inside, other=MISSING).to(tl.int32)
        partner = _partner(image, roll, images)
        if ALIGNED:  # no run of 16 is broken by the end
            partner = tl.max_contiguous(tl.multiple_of(partner, 16), 16)
        y = tl.load(y_ptr + partner, mask=inside, other=MISSING).to(tl.int32)
        row = x - first_row
        counted = inside & (x < BINS) & (y < BINS)
        if GROUPED:
            group = tl.load(group_ptr + image, mask=inside, other=-1)
            counted &= (group >= 0) & (group < GROUPS)
            row += group.to(tl.int32) * BINS
        counted &= (row >= 0) & (row < ROWS)
        counts += tl.histogram(row * STRIDE + y, CELLS, mask=counted)
    return counts


@triton.jit
def _cross_count(
    x_ptr,
    y_ptr,
    x_row,
    y_row,
    roll,
    images,
    x_stride,
    y_stride,
    first,
    second,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts of all pairs of two blocks of directions, (direction, bin) on either axis."""
    x_row += tl.arange(0, DIRECTIONS)
    y_row += tl.arange(0, DIRECTIONS)
    x_row = x_row[:, None]
    y_row = y_row[:, None]
    x_ptr += x_row.to(tl.int64) * x_stride
    y_ptr += y_row.to(tl.int64) * y_stride
    counts = tl.zeros([DIRECTIONS * WIDTH, DIRECTIONS * WIDTH], tl.int32)
    for block in range(0, images, BLOCK):
        image = block + 4 * tl.arange(0, BLOCK // 4)[None, :]  # [1, BLOCK / 4]
        x = _four_codes(x_ptr, image, 0, images, x_row < first, ALIGNED)
        y = _four_codes(y_ptr, image, roll, images, y_row < second, ALIGNED)
        x_hot = _one_hot(x, BINS, WIDTH, DIRECTIONS, BLOCK)
        y_hot = _one_hot(y, BINS, WIDTH, DIRECTIONS, BLOCK)
        counts = tl.dot(x_hot, tl.trans(y_hot), counts, out_dtype=tl.int32)
    return counts


@triton.jit
def _four_codes(row_ptr, image, roll, images, exists, ALIGNED: tl.constexpr):
    """Codes of four images in the bytes of a word."""
    if ALIGNED:
        word_ptr = (row_ptr + _partner(image, roll, images)).to(tl.pointer_type(tl.uint32))
        return tl.load(word_ptr, mask=exists & (image < images), other=0xFFFFFFFF)
    words = tl.zeros(image.shape, tl.uint32)
    for i in tl.static_range(4):
        mask = exists & (image + i < images)
        code = tl.load(row_ptr + _partner(image + i, roll, images), mask=mask, other=MISSING)
        words |= code.to(tl.uint32) << 8 * i
    return words


@triton.jit
def _one_hot(
    words, BINS: tl.constexpr, WIDTH: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK: tl.constexpr
):
    """Indicator of every bin of every direction; a code that is no bin has a column of zeros.

    Four codes are compared at once, as the bytes of a word, in which nothing is ever carried.
    """
    over = ((words & 0x7F7F7F7F) + (128 - BINS) * 0x01010101) | words  # top bit: no bin
    words = (words & 0x0F0F0F0F) | ((over & 0x80808080) >> 3)
    words = tl.reshape(words, [DIRECTIONS, 1, BLOCK // 4])
    bins = tl.arange(0, WIDTH).to(tl.uint32) * 0x01010101
    hot = ((0x20202020 - (words ^ bins[None, :, None])) >> 5) & 0x01010101
    even = tl.join(hot.to(tl.int8), (hot >> 16).to(tl.int8))
    odd = tl.join((hot >> 8).to(tl.int8), (hot >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [DIRECTIONS * WIDTH, BLOCK])


@triton.jit
def _deviation(counts, bins, images):
    """c log(c bins / images): sums to about zero over bins of equal mass; 0 of an empty bin.

    ``tl.log`` branches on denormals, and 64 branches a thread keep every register alive. Here
    log(2^k (1 + x)) = k log 2 + x + x^2 q(x) for |x| < 0.42, q fitted to 4e-8; 0 stays finite.
    """
    wide = counts.to(tl.float32)
    bits = (wide * (bins / images.to(tl.float32))).to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) & -0x800000  # exponent of the value over sqrt(1/2), in place
    x = (bits - power).to(tl.float32, bitcast=True) - 1.0
    q = -0.100346185 * x + 0.163356468
    q = q * x - 0.173259959
    q = q * x + 0.198882774
    q = q * x - 0.249614656
    q = q * x + 0.333352625
    q = q * x - 0.500005841
    return wide * (power.to(tl.float32) * 8.26295829e-8 + (q * x * x + x))


@triton.jit
def _information(nats, counted, images):
    """Information from the sum of deviations of cells, less those of rows and columns."""
    counted = tl.maximum(counted, 1).to(tl.float32)
    return tl.maximum(nats / counted + tl.log(counted / images.to(tl.float32)), 0.0)


@triton.jit
def _partner(image, roll, images):
    """Image whose y code a rolled pairing gives to this one: image - roll, around the end."""
    partner = image - roll
    return tl.where(partner < 0, partner + images, partner)


@triton.jit
def _pair_rows(x_ptr, y_ptr, pair, x_stride, y_stride, second, CROSS: tl.constexpr):
    """First codes of a pair: pair (x, y) of all, in rows of ``second``, or matched rows."""
    if CROSS:
        x_ptr += (pair // second).to(tl.int64) * x_stride
        y_ptr += (pair % second).to(tl.int64) * y_stride
    else:
        x_ptr += pair.to(tl.int64) * x_stride
        y_ptr += pair.to(tl.int64) * y_stride
    return x_ptr, y_ptr


@triton.jit
def _cross_rows(x_blocks, y_blocks, DIRECTIONS: tl.constexpr):
    """Which roll, and the first x and y direction, this program counts."""
    tile = tl.program_id(0) % (x_blocks * y_blocks)
    which = tl.program_id(0) // (x_blocks * y_blocks)
    return which, tile // y_blocks * DIRECTIONS, tile % y_blocks * DIRECTIONS


@triton.jit
def _roll_of(rolls, which, ROLLS: tl.constexpr):
    """Roll number ``which``: see ``_packed`` of the launcher for its two spare bits."""
    roll = rolls[0]
    for i in tl.static_range(1, ROLLS):
        roll = tl.where(which == i, rolls[i], roll)
    return roll >> 2
