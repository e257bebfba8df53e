"""Triton kernels of the fused distillation loss where the positions of a channel lie together.

NCHW maps. A channel of 49 bfloat16 values is not a multiple of 16 bytes, eight channels are: rows
of V channels are read as flat slots, slot s being position s % HW, so that every load has 128 bits.
Sums stay with their slots until all channels are in, and are folded to positions once an image.
"""

# tl.static_range is iterable inside triton.jit only.
# pyright: reportGeneralTypeIssues=false
# no_type_check: checked by jaxtyping, a function is wrapped, and the interpreter loses its globals.

from typing import no_type_check

import triton
import triton.language as tl

from mimic_fast.kernels.distill_math import (
    add_elements,
    add_gradient,
    finish_image,
    finish_positions,
    layer_pointer,
    layer_stride,
    load_coefficients,
    raised,
)
from mimic_fast.kernels.distill_tokens import BACKWARD_SIDES, FORWARD_SIDES, POWER_SIDES


@triton.jit
@no_type_check
def slots_from(first, V: tl.constexpr, BLOCK_P: tl.constexpr):
    """Slots of a row, of the positions from ``first`` on; rows of several channels are whole."""
    slots = tl.arange(0, V * BLOCK_P)
    if V == 1:
        slots += first
    return slots


@triton.jit
@no_type_check
def fold(sums, HW: tl.constexpr, V: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sums of slots to sums of positions, [V * BLOCK_P] -> [BLOCK_P] (HW of them count)."""
    if V == 1:
        return sums
    else:
        slots = tl.arange(0, V * BLOCK_P)
        # Below V * BLOCK_P for every lane, since HW <= BLOCK_P.
        sums = tl.gather(sums, slots // BLOCK_P * HW + slots % BLOCK_P, 0)
        return tl.sum(tl.reshape(sums, [V, BLOCK_P]), axis=0)


@triton.jit
@no_type_check
def spread(values, slots, HW: tl.constexpr, V: tl.constexpr):
    """Values of positions to their slots, [BLOCK_P] -> [1, V * BLOCK_P]."""
    if V > 1:
        values = tl.gather(values, slots % HW, 0)
    return values[None, :]


@triton.jit
@no_type_check
def row_mask(rows, slots, HW: tl.constexpr, C: tl.constexpr, V: tl.constexpr, WHOLE: tl.constexpr):
    """Slots that exist in rows [BLOCK_R, 1] of V channels; WHOLE: all of the rows do."""
    mask = (slots < V * HW)[None, :]
    if C % V != 0:
        mask = mask & (rows * (V * HW) + slots[None, :] < C * HW)
    elif not WHOLE:
        mask = mask & (rows < C // V)
    return mask


@triton.jit(do_not_specialize=POWER_SIDES)
@no_type_check
def planes_power_kernel(
    features,  # L pointers to activations
    powers_ptr,  # [L, B, HW], written: sum_c |x|^p
    channels,
    IMAGE_STRIDES: tl.constexpr,
    ROW_STRIDES: tl.constexpr,  # of a row of V channels
    LAYERS: tl.constexpr,
    STRIDED: tl.constexpr,  # entries in the tables of strides
    OFFSETS: tl.constexpr,  # integer type that holds offsets within an image
    HW: tl.constexpr,
    C: tl.constexpr,
    POWER: tl.constexpr,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """BLOCK_P positions of one image and layer a program."""
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_P
    layer = tl.program_id(2)
    x_ptr = layer_pointer(features, layer, LAYERS)
    x_ptr += image * layer_stride(IMAGE_STRIDES, layer, STRIDED, tl.int64)
    row_stride = layer_stride(ROW_STRIDES, layer, STRIDED, OFFSETS)
    slots = slots_from(first, V, BLOCK_P)
    acc = tl.zeros([BLOCK_R, V * BLOCK_P], tl.float32)
    for start in tl.range(0, channels, V * BLOCK_R * UNROLL, num_stages=2):
        for piece in tl.static_range(UNROLL):
            rows = start // V + piece * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
            mask = row_mask(rows, slots, HW, C, V, C % (V * BLOCK_R * UNROLL) == 0)
            x_ptrs = x_ptr + rows.to(OFFSETS) * row_stride + slots[None, :]
            acc += raised(tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32), POWER)
    row_ptr = powers_ptr + (layer * tl.num_programs(0) + image) * HW
    offs_p = first + tl.arange(0, BLOCK_P)
    tl.store(row_ptr + offs_p, fold(tl.sum(acc, axis=0), HW, V, BLOCK_P), mask=offs_p < HW)


@triton.jit(do_not_specialize=FORWARD_SIDES)
@no_type_check
def planes_fwd_kernel(
    students,  # L pointers to activations
    teachers,  # the same; the students' where no teacher is read
    powers_ptr,  # [L, B, HW], the teachers' power maps; written unless GIVEN
    weights_ptr,  # [2, L], attention and clone
    losses_ptr,  # [L, 2, B], written
    coefficients_ptr,  # [L, K, B, HW], written: q, then alpha and beta
    weight_row,  # strides of the weights
    weight_column,
    steps,  # of an image
    IMAGE_STRIDES: tl.constexpr,
    ROW_STRIDES: tl.constexpr,
    TEACHER_IMAGE_STRIDES: tl.constexpr,
    TEACHER_ROW_STRIDES: tl.constexpr,
    LAYERS: tl.constexpr,
    STRIDED: tl.constexpr,
    OFFSETS: tl.constexpr,
    HW: tl.constexpr,
    C: tl.constexpr,
    POWER: tl.constexpr,
    CLONE: tl.constexpr,
    ATTENTION: tl.constexpr,
    GIVEN: tl.constexpr,  # whether the teachers' power maps are
    PLANES: tl.constexpr,  # K
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    UNROLL: tl.constexpr,  # tiles of BLOCK_R rows a step
    GROUPS: tl.constexpr,  # steps until all channels of BLOCK_P positions are in
):
    """One image of one layer a program: its maps are normalized over all positions."""
    image = tl.program_id(0).to(tl.int64)
    images = tl.num_programs(0)
    layer = tl.program_id(1)
    s_ptr = layer_pointer(students, layer, LAYERS)
    t_ptr = layer_pointer(teachers, layer, LAYERS)
    s_ptr += image * layer_stride(IMAGE_STRIDES, layer, STRIDED, tl.int64)
    t_ptr += image * layer_stride(TEACHER_IMAGE_STRIDES, layer, STRIDED, tl.int64)
    s_row = layer_stride(ROW_STRIDES, layer, STRIDED, OFFSETS)
    t_row = layer_stride(TEACHER_ROW_STRIDES, layer, STRIDED, OFFSETS)
    plane = images.to(tl.int64) * HW
    q_ptr = coefficients_ptr + layer * PLANES * plane + image * HW
    a_ptr = powers_ptr + layer * plane + image * HW
    weight_ptr = weights_ptr + layer * weight_column
    clone_weight_ptr = weight_ptr + weight_row
    zeros = tl.zeros([BLOCK_R, V * BLOCK_P], tl.float32)
    squares = zeros
    cosines = tl.zeros([BLOCK_P], tl.float32)
    own, other, own_squares, other_squares, dot = zeros, zeros, zeros, zeros, zeros
    # Loads of the next step are in flight during this one: the programs are too few to hide them.
    for step in tl.range(0, steps, num_stages=2):
        first = step // GROUPS * BLOCK_P
        slots = slots_from(first, V, BLOCK_P)
        for tile in tl.static_range(UNROLL):
            rows = (step % GROUPS * UNROLL + tile) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
            mask = row_mask(rows, slots, HW, C, V, C % (V * BLOCK_R * UNROLL) == 0)
            wide = rows.to(OFFSETS)
            s_ptrs = s_ptr + wide * s_row + slots[None, :]
            s = tl.load(s_ptrs, mask=mask, other=0.0).to(tl.float32)
            t = s
            if CLONE != "none" or (ATTENTION and not GIVEN):
                t_ptrs = t_ptr + wide * t_row + slots[None, :]
                t = tl.load(t_ptrs, mask=mask, other=0.0).to(tl.float32)
            own, other, own_squares, other_squares, dot, squares = add_elements(
                own, other, own_squares, other_squares, dot, squares,
                s, t, POWER, CLONE, ATTENTION, GIVEN,
            )  # fmt: skip
        if step % GROUPS == GROUPS - 1:
            offs_p = first + tl.arange(0, BLOCK_P)
            cosines = finish_positions(
                fold(tl.sum(own, axis=0), HW, V, BLOCK_P),
                fold(tl.sum(other, axis=0), HW, V, BLOCK_P),
                fold(tl.sum(own_squares, axis=0), HW, V, BLOCK_P),
                fold(tl.sum(other_squares, axis=0), HW, V, BLOCK_P),
                fold(tl.sum(dot, axis=0), HW, V, BLOCK_P),
                cosines, clone_weight_ptr, q_ptr, a_ptr, plane, offs_p, offs_p < HW,
                HW, POWER, CLONE, ATTENTION, GIVEN, PLANES,
            )  # fmt: skip
            own, other, own_squares, other_squares, dot = zeros, zeros, zeros, zeros, zeros
    finish_image(
        squares, cosines, weight_ptr, clone_weight_ptr, q_ptr, a_ptr,
        losses_ptr + layer * 2 * images + image, images, HW, C, BLOCK_ROW, CLONE, ATTENTION,
    )  # fmt: skip


@triton.jit(do_not_specialize=BACKWARD_SIDES)
@no_type_check
def planes_bwd_kernel(
    student_ptr,  # activations
    teacher_ptr,  # the student's where no teacher is read
    trunk_ptr,  # gradient that arrives from later layers; may be out_ptr
    out_ptr,  # written
    coefficients_ptr,  # [K, B, HW]: q, then alpha and beta
    weights_ptr,  # [2], attention and clone
    grads_ptr,  # [2, B], of the losses
    weight_stride,
    grad_row,  # strides of the gradients of the losses
    grad_image,
    IMAGE_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    TEACHER_IMAGE_STRIDE: tl.constexpr,
    TEACHER_ROW_STRIDE: tl.constexpr,
    HW: tl.constexpr,
    C: tl.constexpr,
    POWER: tl.constexpr,
    CLONE: tl.constexpr,
    ATTENTION: tl.constexpr,
    TRUNK: tl.constexpr,  # whether there is one
    PLANES: tl.constexpr,  # K
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes the trunk's gradient plus the losses', TILES tiles a program."""
    image = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64) * HW
    first = tl.program_id(2) * BLOCK_P
    offs_p = first + tl.arange(0, BLOCK_P)
    slots = slots_from(first, V, BLOCK_P)
    grad = tl.load(grads_ptr + image * grad_image)
    clone_grad = tl.load(grads_ptr + grad_row + image * grad_image)
    pull = clone_grad * tl.load(weights_ptr + weight_stride) * (2.0 / (HW * C))
    slope, alpha, beta = load_coefficients(
        coefficients_ptr + image * HW, plane, offs_p, offs_p < HW, grad, clone_grad,
        POWER, CLONE, ATTENTION, PLANES,
    )  # fmt: skip
    slope = spread(slope, slots, HW, V)
    alpha = spread(alpha, slots, HW, V)
    beta = spread(beta, slots, HW, V)
    # Three of four tensors share offsets: they take fewer registers than pointers to the image.
    for tile in tl.static_range(TILES):
        rows = (tl.program_id(1) * TILES + tile) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        mask = row_mask(rows, slots, HW, C, V, C % (V * BLOCK_R * TILES) == 0)
        wide = rows.to(tl.int64)
        own = image * IMAGE_STRIDE + wide * ROW_STRIDE + slots[None, :]
        s = tl.load(student_ptr + own, mask=mask, other=0.0).to(tl.float32)
        t = s
        if CLONE != "none":
            others = image * TEACHER_IMAGE_STRIDE + wide * TEACHER_ROW_STRIDE + slots[None, :]
            t = tl.load(teacher_ptr + others, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_R, V * BLOCK_P], tl.float32)
        if TRUNK:
            total = tl.load(trunk_ptr + own, mask=mask, other=0.0).to(tl.float32)
        total = add_gradient(total, s, t, slope, alpha, beta, pull, POWER, CLONE, ATTENTION)
        tl.store(out_ptr + own, total.to(out_ptr.dtype.element_ty), mask=mask)
