"""What the fused distillation loss computes in either memory layout: Triton functions.

Powers of the attention map, both losses of an image from its sums over channels, and the gradient
of an element (formulas: ``reference.layer_losses``). Where the numbers lie is the business of
``distill_tokens.py`` and ``distill_planes.py``.
"""

# tl.static_range is iterable inside triton.jit only.
# pyright: reportGeneralTypeIssues=false
# no_type_check: checked by jaxtyping, a function is wrapped, and the interpreter loses its globals.

from typing import no_type_check

import triton
import triton.language as tl

ATTENTION_EPSILON = tl.constexpr(1e-6)  # as reference.ATTENTION_EPSILON
COSINE_EPSILON = tl.constexpr(1e-8)  # as torch.nn.functional.cosine_similarity


@triton.jit
@no_type_check
def layer_pointer(pointers, layer, LAYERS: tl.constexpr):
    """Entry of a pointer table that travels in the kernel's arguments, not through memory."""
    pointer = pointers[0]
    for i in tl.static_range(1, LAYERS):
        if layer == i:
            pointer = pointers[i]
    return pointer


@triton.jit
@no_type_check
def layer_stride(STRIDES: tl.constexpr, layer, COUNT: tl.constexpr, TYPE: tl.constexpr):
    """Entry of a table of COUNT strides; a single one stands for all layers."""
    stride = tl.full([], STRIDES[0], TYPE)
    for i in tl.static_range(1, COUNT):
        stride = tl.where(layer == i, STRIDES[i], stride).to(TYPE)
    return stride


@triton.jit
@no_type_check
def raised(x, POWER: tl.constexpr):
    """|x|^p, 0 at 0."""
    if POWER == 1:
        return tl.abs(x)
    elif POWER == 2:
        return x * x
    elif POWER == 3:
        return x * x * tl.abs(x)
    elif POWER == 4:
        return x * x * (x * x)
    else:
        size = tl.abs(x)
        # log2(0) is never taken: its infinity would warn in the interpreter.
        power = tl.exp2(POWER * tl.log2(tl.where(size > 0, size, 1.0)))
        return tl.where(size > 0, power, 0.0)


@triton.jit
@no_type_check
def raised_slope(x, POWER: tl.constexpr):
    """|x|^(p-1) sign(x), the derivative of |x|^p over p, 0 at 0."""
    if POWER == 2:
        return x
    elif POWER == 3:
        return x * tl.abs(x)
    elif POWER == 4:
        return x * x * x
    else:
        slope = tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)
        if POWER != 1:
            size = tl.abs(x)
            slope *= tl.exp2((POWER - 1) * tl.log2(tl.where(size > 0, size, 1.0)))
        return slope


@triton.jit
@no_type_check
def add_elements(
    own,  # sums so far, of |s|^p, |t|^p, s^2, t^2, s t and (s - t)^2
    other,
    own_squares,
    other_squares,
    dot,
    squares,
    s,
    t,
    POWER: tl.constexpr,
    CLONE: tl.constexpr,
    ATTENTION: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Adds one tile of elements to the sums that are asked for."""
    if ATTENTION and (CLONE != "cosine" or POWER != 2):
        own += raised(s, POWER)
        if not GIVEN:
            other += raised(t, POWER)
    if CLONE == "cosine":
        own_squares += s * s
        other_squares += t * t
        dot += s * t
    if CLONE == "mse":
        squares += (s - t) * (s - t)
    return own, other, own_squares, other_squares, dot, squares


@triton.jit
@no_type_check
def finish_positions(
    own,  # [BLOCK], sums over all channels
    other,
    own_squares,
    other_squares,
    dot,
    cosines,  # [BLOCK], sum so far
    weight_ptr,  # of the clone loss
    q_ptr,  # coefficients of the image
    a_ptr,  # the teacher's power map
    plane,
    offs,
    mask,
    N: tl.constexpr,
    POWER: tl.constexpr,
    CLONE: tl.constexpr,
    ATTENTION: tl.constexpr,
    GIVEN: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Stores what positions are known by: power maps (where q will be), alpha and beta.

    d (-weight cosine) / d s = alpha s + beta t.
    """
    if CLONE == "cosine" and POWER == 2:
        own = own_squares
        other = other_squares
    if ATTENTION:
        tl.store(q_ptr + offs, own, mask=mask)
        if not GIVEN:
            tl.store(a_ptr + offs, other, mask=mask)
    if CLONE == "cosine":
        weight = tl.load(weight_ptr) / N
        size = tl.sqrt_rn(own_squares)
        student = tl.maximum(size, COSINE_EPSILON)
        teacher = tl.maximum(tl.sqrt_rn(other_squares), COSINE_EPSILON)
        cosine = dot / student / teacher
        nonzero = tl.where(size > 0, size, 1.0)
        alpha = tl.where(size > 0, weight * cosine / (student * nonzero), 0.0)
        tl.store(q_ptr + (PLANES - 2) * plane + offs, alpha, mask=mask)
        tl.store(q_ptr + (PLANES - 1) * plane + offs, -weight / (student * teacher), mask=mask)
        cosines += tl.where(mask, cosine, 0.0)
    return cosines


@triton.jit
@no_type_check
def finish_image(
    squares,  # tile, sums of (s - t)^2
    cosines,  # [BLOCK]
    weight_ptr,  # of the attention loss
    clone_weight_ptr,
    q_ptr,
    a_ptr,
    loss_ptr,
    images,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    CLONE: tl.constexpr,
    ATTENTION: tl.constexpr,
):
    """Stores both losses of the image, and q over the student's power map."""
    attention_loss = 0.0
    clone_loss = 0.0
    if ATTENTION:
        # The threads that read the rows again are not those that wrote them.
        tl.debug_barrier()
        attention_loss = attention_row(q_ptr, a_ptr, tl.load(weight_ptr), N, BLOCK_ROW)
    if CLONE == "mse":
        clone_loss = tl.sum(squares) * (tl.load(clone_weight_ptr) / (N * C))
    if CLONE == "cosine":
        clone_loss = tl.sum(cosines) * (-tl.load(clone_weight_ptr) / N)
    tl.store(loss_ptr, attention_loss)
    tl.store(loss_ptr + images, clone_loss)


@triton.jit
@no_type_check
def attention_row(
    student_ptr,  # [N], a_S of one image; replaced by q = d loss / d a_S
    teacher_ptr,  # [N], a_T
    weight,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attention loss of one image from its power maps.

    With r = ||a_S||, m = a / (||a|| + eps) and d = m_S - m_T the loss is w sum(d^2), and
    q = 2 w / (r + eps) (d - a_S sum(d a_S) / (r (r + eps))); the last term is 0 at r = 0.
    """
    offs = tl.arange(0, BLOCK)
    student = tl.zeros([BLOCK], tl.float32)
    teacher = tl.zeros([BLOCK], tl.float32)
    student_squares = tl.zeros([BLOCK], tl.float32)
    teacher_squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        student = tl.load(student_ptr + start + offs, mask=start + offs < N, other=0.0)
        teacher = tl.load(teacher_ptr + start + offs, mask=start + offs < N, other=0.0)
        student_squares += student * student
        teacher_squares += teacher * teacher
    norm = tl.sqrt_rn(tl.sum(student_squares))
    student_scale = 1.0 / (norm + ATTENTION_EPSILON)
    teacher_scale = 1.0 / (tl.sqrt_rn(tl.sum(teacher_squares)) + ATTENTION_EPSILON)
    squares = tl.zeros([BLOCK], tl.float32)
    inner = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        if N > BLOCK:  # a row of one block is still in registers
            student = tl.load(student_ptr + start + offs, mask=start + offs < N, other=0.0)
            teacher = tl.load(teacher_ptr + start + offs, mask=start + offs < N, other=0.0)
        distance = student * student_scale - teacher * teacher_scale
        squares += distance * distance
        inner += distance * student
    slope = tl.sum(inner) * student_scale / tl.where(norm > 0, norm, 1.0)
    # Threads may hold copies of a short row: all have read it before one writes.
    tl.debug_barrier()
    for start in range(0, N, BLOCK):
        if N > BLOCK:
            student = tl.load(student_ptr + start + offs, mask=start + offs < N, other=0.0)
            teacher = tl.load(teacher_ptr + start + offs, mask=start + offs < N, other=0.0)
        distance = student * student_scale - teacher * teacher_scale
        q = 2.0 * weight * student_scale * (distance - student * slope)
        tl.store(student_ptr + start + offs, q, mask=start + offs < N)
    return weight * tl.sum(squares)


@triton.jit
@no_type_check
def load_coefficients(
    row_ptr,  # coefficients of the image
    plane,
    offs,
    mask,
    grad,  # of the attention loss
    clone_grad,
    POWER: tl.constexpr,
    CLONE: tl.constexpr,
    ATTENTION: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Loads p q g0, alpha g1 and beta g1 of positions; 0 where there are none."""
    slope = tl.zeros_like(offs).to(tl.float32)
    alpha = slope
    beta = slope
    if ATTENTION:
        slope = tl.load(row_ptr + offs, mask=mask, other=0.0) * grad * POWER
    if CLONE == "cosine":
        alpha_ptr = row_ptr + (PLANES - 2) * plane
        alpha = tl.load(alpha_ptr + offs, mask=mask, other=0.0) * clone_grad
        beta = tl.load(alpha_ptr + plane + offs, mask=mask, other=0.0) * clone_grad
    return slope, alpha, beta


@triton.jit
@no_type_check
def add_gradient(
    total,  # the trunk's gradient, or zeros
    s,
    t,
    slope,  # these broadcast to the tile
    alpha,
    beta,
    pull,  # 2 w1 g1 / (N C)
    POWER: tl.constexpr,
    CLONE: tl.constexpr,
    ATTENTION: tl.constexpr,
):
    """Gradient of one tile of the student."""
    if ATTENTION:
        total += slope * raised_slope(s, POWER)
    if CLONE == "cosine":
        total += alpha * s + beta * t
    if CLONE == "mse":
        total += pull * (s - t)
    return total
