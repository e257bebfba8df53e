"""Fused attention-map and clone loss on the GPU: every activation is read once in each pass.

Per image, with a = sum_c |f_c|^p over the channels of a position and m = a / (||a||_2 + 1e-6):

    losses[0] = w0 sum_n (m_S - m_T)^2
    losses[1] = w1 mean_{n,c} (s - t)^2   or   -w1 mean_n cos(s_n, t_n)

    d/ds = g0 q p |s|^(p-1) sign(s) + g1 (2 w1 / (N C) (s - t)   or   alpha s + beta t)

What passes from forward to backward are the planes q = d losses[0] / d a_S, alpha and beta, one
number a position each. The oracle is ``reference.layer_losses``; ``cpu_loss.py`` has the same
functions. Nothing is copied, nothing waits for the device: strides are taken as they come, and the
pointers of all layers travel in the arguments of one launch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from mimic_fast.kernels.distill_cases import aot_cases as aot_cases
from mimic_fast.kernels.distill_plan import (
    Clone,
    Plan,
    plan_backward,
    plan_forward,
    plan_powers,
)
from mimic_fast.kernels.layout import Layout, layout_of


def power_maps(
    feature_maps: Sequence[Tensor], *, prefix: int, power: float, images: int | None = None
) -> Float32[Tensor, "layer image position"]:
    """Attention maps before they are normalized, sum_c |x|^p, of all layers in one launch.

    Args:
        feature_maps: Activations of one shape and dtype, each dense in channels or positions.
        prefix: Class and register tokens to leave out (tokens only).
        power: p, at least 1.
        images: Only the first so many count; None: all.

    Raises:
        ValueError: If an activation is dense in neither, or not laid out as the first.
    """
    counted, layouts = _counted(feature_maps, prefix=prefix, images=images)
    plan = plan_powers(layouts, counted[0].element_size(), power=power)
    shape = (len(counted), layouts[0].images, layouts[0].positions)
    powers = torch.empty(shape, dtype=torch.float32, device=counted[0].device)
    _launch(plan, layouts[0].images, powers, counted, powers, plan.end)
    return powers


def forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor] | None,
    teacher_powers: Float32[Tensor, "layer image position"] | None,
    weights: Float32[Tensor, "2 layer"],
    losses: Float32[Tensor, "layer 2 image"],
    *,
    prefix: int,
    power: float,
    clone: Clone,
    attention: bool,
) -> Float32[Tensor, "layer plane image position"]:
    """Both losses of every layer and image, in one launch.

    Args:
        students: Activations of one shape and dtype, each dense in channels or positions.
        teachers: The same of the teacher; None where its power maps are all that is needed.
        teacher_powers: :func:`power_maps` of the teachers; None: computed in the same launch.
        weights: Of the attention and the clone loss of each layer.
        losses: Written; contiguous. Row 0: attention, row 1: clone, 0 where there is none. Its
            last axis says how many images count.
        prefix: Class and register tokens to leave out (tokens only).
        power: p of the attention map, at least 1.
        clone: Kind of the dense clone loss.
        attention: Whether there is an attention loss.

    Returns:
        What the backward pass needs: q if there is an attention loss, alpha and beta if the clone
        loss is a cosine.

    Raises:
        ValueError: If an activation is dense in neither, or not laid out as the first.
    """
    assert losses.is_contiguous()
    images = losses.shape[2]
    given = teacher_powers is not None
    own, own_layouts = _counted(students, prefix=prefix, images=images)
    others, other_layouts = own, own_layouts
    if teachers is not None:
        others, other_layouts = _counted(teachers, prefix=prefix, images=images)
    kind, positions = own_layouts[0].kind, own_layouts[0].positions
    if other_layouts[0].kind != kind:
        raise ValueError(
            f"students are {kind}, teachers {other_layouts[0].kind} in memory; "
            "call contiguous() on one of them, with the memory format of the other"
        )
    plan = plan_forward(
        own_layouts,
        other_layouts,
        own[0].element_size(),
        power=power,
        clone=clone,
        attention=attention,
        given=given,
    )
    shape = (len(own), plan.constants["PLANES"], images, positions)
    coefficients = torch.empty(shape, dtype=torch.float32, device=losses.device)
    if teacher_powers is not None:
        powers = teacher_powers.contiguous()
    elif attention:
        powers = torch.empty(
            (len(own), images, positions), dtype=torch.float32, device=losses.device
        )
    else:
        powers = losses  # never touched
    sides = (powers, weights, losses, coefficients, *weights.stride())
    _launch(plan, images, losses, own, others, *sides, plan.end)
    return coefficients


def backward(
    student: Tensor,
    teacher: Tensor | None,
    coefficients: Float32[Tensor, "plane image position"],
    weights: Float32[Tensor, "2"],
    grad_losses: Float32[Tensor, "2 image"],
    trunk: Tensor | None,
    out: Tensor,
    *,
    prefix: int,
    power: float,
    clone: Clone,
    attention: bool,
) -> None:
    """Gradient of one layer's losses, added to what arrives from later layers, in one launch.

    Args:
        student: As in the forward pass.
        teacher: As in the forward pass; not needed without a clone loss.
        coefficients: What :func:`forward` returned for this layer.
        weights: Of the attention and the clone loss of this layer.
        grad_losses: Gradient of this layer's losses; read on the device.
        trunk: Gradient that arrives from later layers, laid out as ``student``; None: zero.
        out: Written where images and positions count; laid out as ``student``. May be ``trunk``.
        prefix: As in the forward pass.
        power: As in the forward pass.
        clone: As in the forward pass.
        attention: As in the forward pass.

    Raises:
        ValueError: If an activation is dense in neither channels nor positions, or the gradients
            are not laid out as the student.
    """
    images = coefficients.shape[1]
    given = [student, *([out] if trunk is None else [trunk, out])]
    (own, *gradients), (layout, *others) = _counted(given, prefix=prefix, images=images)
    if any(other != layout for other in others):
        raise ValueError("trunk and out must have the strides of the student")
    target, target_layout = own, layout
    if teacher is not None:
        (target,), (target_layout,) = _counted([teacher], prefix=prefix, images=images)
    plan = plan_backward(
        layout,
        target_layout,
        student.element_size(),
        power=power,
        clone=clone,
        attention=attention,
        trunk=trunk is not None,
    )
    sides = (coefficients.contiguous(), weights, grad_losses)
    strides = (*weights.stride(), *grad_losses.stride())
    _launch(plan, images, out, own, target, gradients[0], gradients[-1], *sides, *strides)


def _counted(
    activations: Sequence[Tensor], *, prefix: int, images: int | None
) -> tuple[tuple[Tensor, ...], tuple[Layout, ...]]:
    """Views without the class tokens, and where they lie."""
    counted = tuple(x[:, prefix:] if prefix and x.ndim == 3 else x for x in activations)
    layouts: list[Layout] = []
    for activation in counted:
        layout = layout_of(activation, images=images)
        if layout is None or (layouts and layout.kind != layouts[0].kind):
            raise ValueError(
                f"an activation of shape {tuple(activation.shape)} and strides "
                f"{activation.stride()} is not laid out in memory as the others, or dense in "
                "neither channels nor positions; call contiguous() on it"
            )
        # A single image has no stride worth telling apart.
        layouts.append(replace(layout, stride_image=0) if layout.images == 1 else layout)
    return counted, tuple(layouts)


def _launch(plan: Plan, images: int, tensor: Tensor, *arguments: Any) -> None:
    # Triton launches on the current device, which need not be that of the tensors.
    options: dict[str, Any] = {"num_warps": plan.num_warps}
    if plan.most_registers is not None and torch.version.hip is None:  # AMD's has no such option
        options["maxnreg"] = plan.most_registers
    with torch.cuda.device_of(tensor):
        plan.kernel[images, *plan.blocks](*arguments, **plan.constants, **options)
