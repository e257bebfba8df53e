"""Losses that bench_loss.py times: what people write in eager PyTorch, its compiled form, and ours.

All minimize ``ATTENTION * mean over images and positions of (m_S - m_T)^2 + clone``, with m the
attention map (p = 2) normalized by its L2 norm and clone the mean squared difference, or minus the
mean cosine, of the channel vectors. ``check`` refuses whoever does not.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mimic_fast import ops
from mimic_fast.kernels import reference

Dense = Literal["mse", "cosine"]
LossAndGradient = Callable[[], tuple[Tensor, Tensor]]

ATTENTION = 1000.0  # weight of the attention loss; both losses then have gradients of like size
# Relative errors of loss and gradient, against float64, beyond which nothing is timed. Eager
# PyTorch rounds the maps to the activations' type, 8 bits in bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Activations of one layer: tokens ``[B, N, C]`` or a map ``[B, C, H, W]``.

    Args:
        student: Leaf that wants a gradient.
        teacher: Of the same shape.
        trunk: Whether a gradient arrives from later layers: that of :func:`later`.
    """

    student: Tensor
    teacher: Tensor
    trunk: bool


def problem(
    shape: Sequence[int], *, dtype: torch.dtype, device: str, trunk: bool, seed: int = 0
) -> Problem:
    """Random activations, a teacher that resembles the student, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    student, noise = torch.randn(2, *shape, generator=generator)
    teacher = 0.8 * student + 0.6 * noise
    return Problem(
        student=student.to(device, dtype).requires_grad_(),
        teacher=teacher.to(device, dtype),
        trunk=trunk,
    )


def nad_loss(student: Tensor, teacher: Tensor, *, dense: Dense) -> Tensor:
    """In the manner of Li et al., arXiv:2101.05930: abs, pow, sum, norm, div, mse."""
    attention = F.mse_loss(nad_map(student), nad_map(teacher))
    return ATTENTION * attention + dense_loss(student, teacher, dense)


def nad_map(feature_map: Tensor) -> Tensor:
    """Normalized attention map, ``[B, N]``."""
    power = torch.sum(torch.pow(torch.abs(feature_map), 2), dim=_channels(feature_map)).flatten(1)
    return torch.div(power, torch.norm(power, dim=1, keepdim=True) + 1e-6)


def at_loss(student: Tensor, teacher: Tensor, *, dense: Dense) -> Tensor:
    """In the manner of Zagoruyko and Komodakis, arXiv:1612.03928: pow, mean, normalize."""
    attention = (at_map(student) - at_map(teacher)).pow(2).mean()
    return ATTENTION * attention + dense_loss(student, teacher, dense)


def at_map(feature_map: Tensor) -> Tensor:
    """Normalized attention map, ``[B, N]``."""
    return F.normalize(feature_map.pow(2).mean(_channels(feature_map)).flatten(1))


def dense_loss(student: Tensor, teacher: Tensor, dense: Dense) -> Tensor:
    """Of the channel vectors, averaged over images and positions."""
    if dense == "mse":
        return F.mse_loss(student, teacher)
    return -F.cosine_similarity(student, teacher, dim=_channels(student)).mean()


def plain(loss: Callable[..., Tensor], given: Problem, *, dense: Dense) -> LossAndGradient:
    """Loss and gradient by autograd, which adds the trunk's gradient itself."""

    def run() -> tuple[Tensor, Tensor]:
        trunk = given.student.view_as(given.student)
        return gradient_of(given, trunk, loss(trunk, given.teacher, dense=dense))

    return run


def compiled(given: Problem, *, dense: Dense) -> LossAndGradient:
    """:func:`nad_loss` under torch.compile."""
    loss = torch.compile(partial(nad_loss, dense=dense), fullgraph=True, dynamic=False)
    return plain(lambda student, teacher, dense: loss(student, teacher), given, dense=dense)


def ours(
    path: ops.Path, given: Problem, *, dense: ops.Clone, target: ops.Target | None = None
) -> LossAndGradient:
    """``ops`` on one path: in the trunk where there is one, else after the forward pass.

    Args:
        path: Which is forced.
        given: Activations.
        dense: Kind of the clone loss.
        target: What the student is compared with; None: the teacher's activation.
    """
    student = given.student
    batch, positions = reference.positions(student).shape[:2]
    weights = torch.tensor([[ATTENTION / positions], [1.0]], device=student.device) / batch
    targets = [target or ops.Target(teacher=given.teacher)]
    # What is picked anyway runs as a user's call does, without a context around it.
    usual = ops.choose("distill", student.device, student.dtype).path == path
    context = nullcontext if usual else partial(ops.force, path)

    def after() -> tuple[Tensor, Tensor]:
        with context():
            (losses,) = ops.layer_losses([student], targets, weights, clone=dense)
            return gradient_of(given, student, losses.sum())

    def within() -> tuple[Tensor, Tensor]:
        terms = [ops.Terms(clone=dense)]
        with context():
            taps = ops.tapped_losses(weights, targets, terms, images=batch, like=student)
            trunk = taps.tap(0, student.view_as(student))
            (losses,) = taps.losses()
            return gradient_of(given, trunk, losses.sum())

    return within if given.trunk else after


def later(trunk: Tensor) -> Tensor:
    """What comes after the tap: its backward makes a gradient of full size in one pass of writing.

    Made by PyTorch, as those of a network are, so that nobody holds it but who receives it.
    """
    return trunk[:1].sum() / trunk[0].numel()


def gradient_of(given: Problem, trunk: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of the student's activation from it and from the later layers."""
    total = loss + later(trunk) if given.trunk else loss
    return loss, torch.autograd.grad(total, given.student)[0]


def check(
    candidates: dict[str, LossAndGradient], given: Problem, *, dense: Dense
) -> dict[str, float]:
    """Relative errors of every candidate's gradient against the float64 oracle.

    Raises:
        AssertionError: If one's loss or gradient is not what all are to compute.
    """
    student = given.student.detach().double().requires_grad_()
    expected, wanted = gradient_of(
        replace(given, student=student),
        student,
        loss_oracle(student, given.teacher.double(), dense=dense),
    )
    tolerance = TOLERANCE[given.student.dtype]
    errors = {}
    for name, candidate in candidates.items():
        loss, gradient = (found.detach().double() for found in candidate())
        off = abs(float(loss / expected.detach()) - 1)
        errors[name] = float((gradient - wanted).norm() / wanted.norm())
        assert max(off, errors[name]) <= tolerance, (
            f"{name}: loss off by {off:.2g}, gradient by {errors[name]:.2g}, relative; at most "
            f"{tolerance:.0e} allowed: nothing is timed"
        )
    return errors


def loss_oracle(student: Tensor, teacher: Tensor, *, dense: Dense) -> Tensor:
    """The same loss from the oracles of ``kernels/reference.py``."""
    attention = reference.attention_loss(student, teacher, form="mean")
    return ATTENTION * attention + reference.clone_loss(student, teacher, kind=dense)


def _channels(feature_map: Tensor) -> int:
    return 1 if feature_map.ndim == 4 else 2
