"""The fused losses as custom operators, which torch.compile takes as they are.

A custom operator may not return its input, so these return losses and coefficients, and the
gradient of the layer's own losses; adding it to the trunk's is left to the compiler.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mimic_fast.kernels.engine import (
    Clone,
    Engine,
    Layer,
    Target,
    Terms,
    accumulator,
    copy_uncounted,
    dense_activation,
    fill,
    matching,
)
from mimic_fast.kernels.reference import positions

EngineFor = Callable[[Tensor], Engine]


def register(engine_for: EngineFor) -> Callable[..., Tensor]:
    """Defines ``mimic_fast::distill_forward`` and ``mimic_fast::distill_backward``.

    Args:
        engine_for: The kernels for an activation, asked for when an operator runs.

    Returns:
        ``losses(students, teachers, powers, weights, terms)``, ``[layer, 2, image]``, of layers of
        one shape; teachers or powers may be empty.
    """
    forward = torch.library.custom_op(
        "mimic_fast::distill_forward", _forward_of(engine_for), mutates_args=()
    )
    forward.register_fake(_fake_forward)
    backward = torch.library.custom_op(
        "mimic_fast::distill_backward", _backward_of(engine_for), mutates_args=()
    )
    backward.register_fake(_fake_backward)

    def gradients(ctx: Any, cotangent: Tensor, _coefficients: Tensor) -> Any:
        students, teachers, coefficients, weights = _saved(ctx)
        own = [
            backward(
                student,
                teachers[n] if teachers else None,
                coefficients[n],
                weights[:, n],
                cotangent[n],
                *ctx.terms,
            )
            for n, student in enumerate(students)
        ]
        return own, [None] * ctx.counts[1], [None] * ctx.counts[2], None, None, None, None, None

    forward.register_autograd(gradients, setup_context=_setup_context)

    def losses(
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        powers: Sequence[Tensor],
        weights: Tensor,
        terms: Terms,
    ) -> Tensor:
        detached = [teacher.detach() for teacher in teachers]
        found, _ = forward(list(students), detached, list(powers), weights, *_plain(terms))
        return found

    return losses


def _plain(terms: Terms) -> tuple[float, str, bool, int]:
    return terms.power, terms.clone, terms.attention, terms.prefix


def _terms(power: float, clone: str, attention: bool, prefix: int) -> Terms:
    kinds: dict[str, Clone] = {"none": "none", "cosine": "cosine", "mse": "mse"}
    return Terms(power=power, clone=kinds[clone], attention=attention, prefix=prefix)


def _forward_of(engine_for: EngineFor) -> Callable[..., tuple[Tensor, Tensor]]:
    def distill_forward(
        students: list[Tensor],
        teachers: list[Tensor],
        powers: list[Tensor],
        weights: Tensor,
        power: float,
        clone: str,
        attention: bool,
        prefix: int,
    ) -> tuple[Tensor, Tensor]:
        terms = _terms(power, clone, attention, prefix)
        images = students[0].shape[0]
        layers = []
        for n, student in enumerate(students):
            dense = dense_activation(student, terms, images)
            target = Target(
                teacher=teachers[n] if teachers else None, power=powers[n] if powers else None
            )
            layers.append(Layer(terms=terms, target=matching(target, dense), activation=dense))
        losses = students[0].new_empty((len(layers), 2, images), dtype=accumulator(students[0]))
        fill(engine_for(students[0]), layers, weights, losses)
        planes = [layer.coefficients for layer in layers if layer.coefficients is not None]
        return losses, torch.stack(planes)

    return distill_forward


def _backward_of(engine_for: EngineFor) -> Callable[..., Tensor]:
    def distill_backward(
        student: Tensor,
        teacher: Tensor | None,
        coefficients: Tensor,
        weights: Tensor,
        cotangent: Tensor,
        power: float,
        clone: str,
        attention: bool,
        prefix: int,
    ) -> Tensor:
        terms = _terms(power, clone, attention, prefix)
        dense = dense_activation(student, terms, student.shape[0])
        out = torch.empty_like(dense)
        copy_uncounted(out, None, prefix, out.shape[0])
        engine_for(student).backward(
            dense,
            matching(Target(teacher=teacher), dense).teacher,
            coefficients,
            weights,
            cotangent,
            None,
            out,
            **terms.arguments(),
        )
        return out

    return distill_backward


def _fake_forward(
    students: list[Tensor],
    teachers: list[Tensor],
    powers: list[Tensor],
    weights: Tensor,
    power: float,
    clone: str,
    attention: bool,
    prefix: int,
) -> tuple[Tensor, Tensor]:
    first = students[0]
    batch, places = positions(first, prefix=prefix).shape[:2]
    planes = int(attention) + 2 * int(clone == "cosine")
    wide = accumulator(first)
    losses = first.new_empty((len(students), 2, batch), dtype=wide)
    return losses, first.new_empty((len(students), planes, batch, places), dtype=wide)


def _fake_backward(student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    students, teachers, powers, weights, *terms = inputs
    ctx.counts = len(students), len(teachers), len(powers)
    ctx.terms = tuple(terms)
    ctx.save_for_backward(*students, *teachers, output[1], weights)


def _saved(ctx: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    *activations, coefficients, weights = ctx.saved_tensors
    count = ctx.counts[0]
    return activations[:count], activations[count:], coefficients, weights
