"""Triton kernels of the fused distillation loss where the channels of a position lie together.

Tokens ``[B, N, C]``, features ``[B, D]`` and channels_last maps. Every activation is read once in
the forward and once in the backward pass; what passes between them is k planes of ``[B, N]``.
Strides travel as constants: the models fix them, and the compiler then sees every alignment.
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

# One binary whatever the batch: nothing is gained from the alignment of a few numbers a position.
# Loops end at numbers known at run time only: a compiler that knows how often they run may unroll
# them until registers spill.
POWER_SIDES = ["powers_ptr", "channels"]
FORWARD_SIDES = [
    "powers_ptr",
    "weights_ptr",
    "losses_ptr",
    "coefficients_ptr",
    "weight_row",
    "weight_column",
    "steps",
]
BACKWARD_SIDES = [
    "coefficients_ptr",
    "weights_ptr",
    "grads_ptr",
    "weight_stride",
    "grad_row",
    "grad_image",
]


@triton.jit
@no_type_check
def token_mask(mask_n, columns, C: tl.constexpr, STEP: tl.constexpr):
    """Elements that exist; channels [1, BLOCK_C] are taken STEP at a time."""
    mask = mask_n[:, None]
    if C % STEP != 0:
        mask = mask & (columns < C)
    return mask


@triton.jit(do_not_specialize=POWER_SIDES)
@no_type_check
def tokens_power_kernel(
    features,  # L pointers to activations
    powers_ptr,  # [L, B, N], written: sum_c |x|^p
    channels,
    IMAGE_STRIDES: tl.constexpr,
    ROW_STRIDES: tl.constexpr,
    LAYERS: tl.constexpr,
    STRIDED: tl.constexpr,  # entries in the tables of strides
    OFFSETS: tl.constexpr,  # integer type that holds offsets within an image
    N: tl.constexpr,
    C: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """BLOCK_N positions of one image and layer a program."""
    image = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(2)
    x_ptr = layer_pointer(features, layer, LAYERS)
    x_ptr += image * layer_stride(IMAGE_STRIDES, layer, STRIDED, tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = offs_n < N
    row_stride = layer_stride(ROW_STRIDES, layer, STRIDED, OFFSETS)
    rows = offs_n.to(OFFSETS)[:, None] * row_stride
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in tl.range(0, channels, BLOCK_C * UNROLL, num_stages=2):
        for piece in tl.static_range(UNROLL):
            columns = (start + piece * BLOCK_C + offs_c)[None, :]
            mask = token_mask(mask_n, columns, C, BLOCK_C * UNROLL)
            x = tl.load(x_ptr + rows + columns, mask=mask, other=0.0).to(tl.float32)
            acc += raised(x, POWER)
    row_ptr = powers_ptr + (layer * tl.num_programs(0) + image) * N
    tl.store(row_ptr + offs_n, tl.sum(acc, axis=1), mask=mask_n)


@triton.jit(do_not_specialize=FORWARD_SIDES)
@no_type_check
def tokens_fwd_kernel(
    students,  # L pointers to activations
    teachers,  # the same; the students' where no teacher is read
    powers_ptr,  # [L, B, N], the teachers' power maps; written unless GIVEN
    weights_ptr,  # [2, L], attention and clone
    losses_ptr,  # [L, 2, B], written
    coefficients_ptr,  # [L, K, B, N], written: q, then alpha and beta
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
    N: tl.constexpr,
    C: tl.constexpr,
    POWER: tl.constexpr,
    CLONE: tl.constexpr,
    ATTENTION: tl.constexpr,
    GIVEN: tl.constexpr,  # whether the teachers' power maps are
    PLANES: tl.constexpr,  # K
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    UNROLL: tl.constexpr,  # pieces of BLOCK_C channels a step
    GROUPS: tl.constexpr,  # steps until all channels of BLOCK_N positions are in
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
    plane = images.to(tl.int64) * N
    q_ptr = coefficients_ptr + layer * PLANES * plane + image * N
    a_ptr = powers_ptr + layer * plane + image * N
    weight_ptr = weights_ptr + layer * weight_column
    clone_weight_ptr = weight_ptr + weight_row
    offs_c = tl.arange(0, BLOCK_C)
    zeros = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    squares = zeros
    cosines = tl.zeros([BLOCK_N], tl.float32)
    own, other, own_squares, other_squares, dot = zeros, zeros, zeros, zeros, zeros
    # Loads of the next step are in flight during this one: the programs are too few to hide them.
    for step in tl.range(0, steps, num_stages=2):
        offs_n = step // GROUPS * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        rows = offs_n.to(OFFSETS)[:, None]
        for piece in tl.static_range(UNROLL):
            columns = ((step % GROUPS * UNROLL + piece) * BLOCK_C + offs_c)[None, :]
            mask = token_mask(mask_n, columns, C, BLOCK_C * UNROLL)
            s = tl.load(s_ptr + rows * s_row + columns, mask=mask, other=0.0).to(tl.float32)
            t = s
            if CLONE != "none" or (ATTENTION and not GIVEN):
                t = tl.load(t_ptr + rows * t_row + columns, mask=mask, other=0.0).to(tl.float32)
            own, other, own_squares, other_squares, dot, squares = add_elements(
                own, other, own_squares, other_squares, dot, squares,
                s, t, POWER, CLONE, ATTENTION, GIVEN,
            )  # fmt: skip
        if step % GROUPS == GROUPS - 1:
            cosines = finish_positions(
                tl.sum(own, axis=1), tl.sum(other, axis=1), tl.sum(own_squares, axis=1),
                tl.sum(other_squares, axis=1), tl.sum(dot, axis=1), cosines, clone_weight_ptr,
                q_ptr, a_ptr, plane, offs_n, mask_n, N, POWER, CLONE, ATTENTION, GIVEN, PLANES,
            )  # fmt: skip
            own, other, own_squares, other_squares, dot = zeros, zeros, zeros, zeros, zeros
    finish_image(
        squares, cosines, weight_ptr, clone_weight_ptr, q_ptr, a_ptr,
        losses_ptr + layer * 2 * images + image, images, N, C, BLOCK_ROW, CLONE, ATTENTION,
    )  # fmt: skip


@triton.jit(do_not_specialize=BACKWARD_SIDES)
@no_type_check
def tokens_bwd_kernel(
    student_ptr,  # activations
    teacher_ptr,  # the student's where no teacher is read
    trunk_ptr,  # gradient that arrives from later layers; may be out_ptr
    out_ptr,  # written
    coefficients_ptr,  # [K, B, N]: q, then alpha and beta
    weights_ptr,  # [2], attention and clone
    grads_ptr,  # [2, B], of the losses
    weight_stride,
    grad_row,  # strides of the gradients of the losses
    grad_image,
    IMAGE_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    TEACHER_IMAGE_STRIDE: tl.constexpr,
    TEACHER_ROW_STRIDE: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    POWER: tl.constexpr,
    CLONE: tl.constexpr,
    ATTENTION: tl.constexpr,
    TRUNK: tl.constexpr,  # whether there is one
    PLANES: tl.constexpr,  # K
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes trunk + g0 q p |s|^(p-1) sign(s) + g1 (clone gradient), BLOCK_N positions each."""
    image = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64) * N
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = offs_n < N
    grad = tl.load(grads_ptr + image * grad_image)
    clone_grad = tl.load(grads_ptr + grad_row + image * grad_image)
    pull = clone_grad * tl.load(weights_ptr + weight_stride) * (2.0 / (N * C))
    slope, alpha, beta = load_coefficients(
        coefficients_ptr + image * N, plane, offs_n, mask_n, grad, clone_grad,
        POWER, CLONE, ATTENTION, PLANES,
    )  # fmt: skip
    # Three of four tensors share offsets: they take fewer registers than pointers to the image.
    rows = offs_n.to(tl.int64)[:, None]
    own = image * IMAGE_STRIDE + rows * ROW_STRIDE
    others = image * TEACHER_IMAGE_STRIDE + rows * TEACHER_ROW_STRIDE
    for start in range(0, C, BLOCK_C):
        columns = (start + offs_c)[None, :]
        mask = token_mask(mask_n, columns, C, BLOCK_C)
        s = tl.load(student_ptr + own + columns, mask=mask, other=0.0).to(tl.float32)
        t = s
        if CLONE != "none":
            t = tl.load(teacher_ptr + others + columns, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        if TRUNK:
            total = tl.load(trunk_ptr + own + columns, mask=mask, other=0.0).to(tl.float32)
        total = add_gradient(
            total, s, t, slope[:, None], alpha[:, None], beta[:, None], pull,
            POWER, CLONE, ATTENTION,
        )  # fmt: skip
        tl.store(out_ptr + own + columns, total.to(out_ptr.dtype.element_ty), mask=mask)
