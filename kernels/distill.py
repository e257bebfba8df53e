"""Fused losses as a plain function: activations of the student in, losses out, after the forward.

``reference.layer_losses`` is the oracle; ``trunk.py`` has the form inside the network.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimic_fast.kernels.engine import (
    Engine,
    Layer,
    Target,
    Terms,
    accumulator,
    copy_uncounted,
    dense_activation,
    fill,
    matching,
    runs,
)


def distill_losses(
    engine: Engine,
    students: Sequence[Tensor],
    targets: Sequence[Target],
    weights: Tensor,
    terms: Sequence[Terms],
) -> tuple[Tensor, ...]:
    """Weighted losses of every layer, ``[2, image]``; arguments as for ``LayerLosses``."""
    return _Distill.apply(engine, tuple(targets), weights, tuple(terms), *students)


class _Distill(torch.autograd.Function):
    """Losses of whole layers; their gradient is made in the backward, or at once where cheaper."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        targets: tuple[Target, ...],
        weights: Tensor,
        terms: tuple[Terms, ...],
        *students: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        dense = [
            dense_activation(student, term, student.shape[0])
            for student, term in zip(students, terms, strict=True)
        ]
        targets = tuple(
            matching(target, student) for target, student in zip(targets, dense, strict=True)
        )
        teachers = [target.teacher for target in targets]
        ctx.save_for_backward(*dense, *teachers, *(target.power for target in targets), weights)
        ctx.engine, ctx.terms = engine, terms
        ctx.gradients = ctx.layers = None
        layers = _layers(dense, targets, terms)
        shape = (len(layers), 2, students[0].shape[0])
        losses = students[0].new_empty(shape, dtype=accumulator(students[0]))
        if engine.forward_with_gradient is not None and any(ctx.needs_input_grad[4:]):
            ctx.gradients = [
                _with_gradient(engine, layer, weights[:, n], losses[n])
                for n, layer in enumerate(layers)
            ]
        else:
            _fill_all(engine, layers, weights, losses)
            ctx.layers = layers
        return tuple(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor | None
    ) -> Any:
        count = len(ctx.terms)
        saved = ctx.saved_tensors
        students, teachers, powers = (saved[n * count : (n + 1) * count] for n in range(3))
        gradients, ctx.gradients = ctx.gradients, None
        # Only a CPU engine has made them already, so that this comparison waits for no device.
        if gradients is not None and all(map(_is_one, cotangents)):
            return None, None, None, None, *gradients
        layers = ctx.layers
        if layers is None:
            targets = [Target(teacher=t, power=p) for t, p in zip(teachers, powers, strict=True)]
            layers = _layers(students, targets, ctx.terms)
            shape = (count, 2, students[0].shape[0])
            again = students[0].new_empty(shape, dtype=accumulator(students[0]))
            _fill_all(ctx.engine, layers, saved[-1], again)
        sides = zip(layers, students, teachers, cotangents, strict=True)
        return None, None, None, None, *(_gradient(ctx.engine, *side) for side in sides)


def _is_one(cotangent: Tensor | None) -> bool:
    """Whether a cotangent is 1 throughout, as that of a sum is: one number, expanded."""
    if cotangent is None:
        return False
    if not any(cotangent.stride()):
        return cotangent.as_strided((), ()).item() == 1
    return bool((cotangent == 1).all())


def _layers(
    students: Sequence[Tensor], targets: Sequence[Target], terms: Sequence[Terms]
) -> list[Layer]:
    return [
        Layer(terms=term, target=target, activation=student)
        for student, target, term in zip(students, targets, terms, strict=True)
    ]


def _fill_all(engine: Engine, layers: list[Layer], weights: Tensor, losses: Tensor) -> None:
    for start, stop in runs(layers):
        fill(engine, layers[start:stop], weights[:, start:stop], losses[start:stop])


def _gradient(
    engine: Engine,
    layer: Layer,
    student: Tensor,
    teacher: Tensor | None,
    cotangent: Tensor | None,
) -> Tensor | None:
    if cotangent is None:
        return None
    out = torch.empty_like(student)
    copy_uncounted(out, None, layer.terms.prefix, out.shape[0])
    engine.backward(
        student,
        teacher,
        layer.coefficients,
        layer.weights,
        cotangent,
        None,
        out,
        **layer.terms.arguments(),
    )
    return out


def _with_gradient(engine: Engine, layer: Layer, weights: Tensor, losses: Tensor) -> Tensor:
    assert engine.forward_with_gradient is not None
    assert layer.activation is not None
    gradient = torch.empty_like(layer.activation)
    copy_uncounted(gradient, None, layer.terms.prefix, gradient.shape[0])
    engine.forward_with_gradient(
        layer.activation,
        layer.target.teacher,
        layer.target.power,
        weights.contiguous(),
        losses,
        gradient,
        **layer.terms.arguments(),
    )
    return gradient
