"""Losses that bench_loss.py times: what people write in eager PyTorch, its compiled form, and ours.

All minimize ``ATTENTION * mean over images and positions of (m_S - m_T)^2 + clone``, with m the
attention map (p = 2) normalized by its L2 norm and clone the mean squared difference, or minus the
mean cosine, of the channel vectors. ``check`` refuses whoever does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

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
        arriving: The gradient from later layers, which every run takes out, adds to and puts
            back; empty: the layer is the last one.
    """

    student: Tensor
    teacher: Tensor
    arriving: list[Tensor]


def problem(
    shape: Sequence[int], *, dtype: torch.dtype, device: str, trunk: bool, seed: int = 0
) -> Problem:
    """Random activations, a teacher that resembles the student, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    student, noise, gradient = torch.randn(3, *shape, generator=generator)
    teacher = 0.8 * student + 0.6 * noise
    return Problem(
        student=student.to(device, dtype).requires_grad_(),
        teacher=teacher.to(device, dtype),
        arriving=[(gradient / student.numel()).to(device, dtype)] if trunk else [],
    )


def nad_loss(student: Tensor, teacher: Tensor, *, dense: Dense) -> Tensor:
    """In the manner of Li et al., arXiv:2101.05930: abs, pow, sum, norm, div, mse."""
    maps = []
    for feature_map in (student, teacher):
        axis = _channels(feature_map)
        power = torch.sum(torch.pow(torch.abs(feature_map), 2), dim=axis).flatten(1)
        maps.append(torch.div(power, torch.norm(power, dim=1, keepdim=True) + 1e-6))
    return ATTENTION * F.mse_loss(*maps) + dense_loss(student, teacher, dense)


def at_loss(student: Tensor, teacher: Tensor, *, dense: Dense) -> Tensor:
    """In the manner of Zagoruyko and Komodakis, arXiv:1612.03928: pow, mean, normalize."""
    maps = [
        F.normalize(feature_map.pow(2).mean(_channels(feature_map)).flatten(1))
        for feature_map in (student, teacher)
    ]
    return ATTENTION * (maps[0] - maps[1]).pow(2).mean() + dense_loss(student, teacher, dense)


def dense_loss(student: Tensor, teacher: Tensor, dense: Dense) -> Tensor:
    """Of the channel vectors, averaged over images and positions."""
    if dense == "mse":
        return F.mse_loss(student, teacher)
    return -F.cosine_similarity(student, teacher, dim=_channels(student)).mean()


def plain(loss: Callable[..., Tensor], given: Problem, *, dense: Dense) -> LossAndGradient:
    """Loss and gradient by autograd, which adds the trunk's gradient itself."""

    def run() -> tuple[Tensor, Tensor]:
        trunk = given.student.view_as(given.student)
        return _gradient(given, trunk, loss(trunk, given.teacher, dense=dense))

    return run


def compiled(given: Problem, *, dense: Dense) -> LossAndGradient:
    """:func:`nad_loss` under torch.compile."""
    loss = torch.compile(partial(nad_loss, dense=dense), fullgraph=True, dynamic=False)
    return plain(lambda student, teacher, dense: loss(student, teacher), given, dense=dense)


def ours(path: ops.Path, given: Problem, *, dense: Dense) -> LossAndGradient:
    """``ops`` on one path: in the trunk where there is one, else after the forward pass."""
    student = given.student
    batch, positions = reference.positions(student).shape[:2]
    weights = torch.tensor([[ATTENTION / positions], [1.0]], device=student.device) / batch
    targets = [ops.Target(teacher=given.teacher)]

    def after() -> tuple[Tensor, Tensor]:
        with ops.force(path):
            (losses,) = ops.layer_losses([student], targets, weights, clone=dense)
            return _gradient(given, student, losses.sum())

    def within() -> tuple[Tensor, Tensor]:
        terms = [ops.Terms(clone=dense)]
        with ops.force(path):
            taps = ops.tapped_losses(weights, targets, terms, images=batch, like=student)
            trunk = taps.tap(0, student.view_as(student))
            (losses,) = taps.losses()
            return _gradient(given, trunk, losses.sum())

    return within if given.arriving else after


def check(
    candidates: dict[str, LossAndGradient], given: Problem, *, dense: Dense
) -> dict[str, float]:
    """Relative errors of every candidate's gradient against the float64 oracle.

    Raises:
        AssertionError: If one's loss or gradient is not what all are to compute.
    """
    student = given.student.detach().double().requires_grad_()
    loss = nad_oracle(student, given.teacher.double(), dense)
    (gradient,) = torch.autograd.grad(loss, student)
    errors = {}
    for name, candidate in candidates.items():
        expected = gradient + given.arriving[0].double() if given.arriving else gradient
        off, errors[name] = _errors(candidate, float(loss.detach()), expected)
        tolerance = TOLERANCE[given.student.dtype]
        assert max(off, errors[name]) <= tolerance, (
            f"{name}: loss off by {off:.2g}, gradient by {errors[name]:.2g}, relative; at most "
            f"{tolerance:.0e} allowed: nothing is timed"
        )
    return errors


def nad_oracle(student: Tensor, teacher: Tensor, dense: Dense) -> Tensor:
    """The same loss from the oracles of ``kernels/reference.py``."""
    attention = reference.attention_loss(student, teacher, form="mean")
    return ATTENTION * attention + reference.clone_loss(student, teacher, kind=dense)


class _Later(torch.autograd.Function):
    """The layers after the tap: their gradient is there already, and nobody else holds it."""

    @staticmethod
    def forward(ctx: Any, trunk: Tensor, arriving: list[Tensor]) -> Tensor:
        ctx.arriving = arriving
        return trunk.new_zeros(())

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *_: Tensor
    ) -> Any:
        return ctx.arriving.pop(), None


def _errors(candidate: LossAndGradient, loss: float, gradient: Tensor) -> tuple[float, float]:
    found, own = candidate()
    off = abs(float(found.detach()) / loss - 1)
    return off, float((own.double() - gradient).norm() / gradient.norm())


def _gradient(given: Problem, trunk: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the student's activation; the trunk's is added if there is one."""
    if not given.arriving:
        (gradient,) = torch.autograd.grad(loss, given.student)
        return loss, gradient
    total = loss + _Later.apply(trunk, given.arriving)
    (gradient,) = torch.autograd.grad(total, given.student)
    given.arriving.append(gradient)
    return loss, gradient


def _channels(feature_map: Tensor) -> int:
    return 1 if feature_map.ndim == 4 else 2
