"""Floating-point operations of a step, by torch's counter with three of its gaps closed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from mimic_fast.planning.fake_step import FakeStep

_CONVOLUTIONS = ("convolution", "convolution_backward")
Shape = Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Floating-point operations for one image; a multiplication with an addition counts as two.

    Args:
        convolutions: Of convolutions.
        products: Of matrix products and attention.
    """

    convolutions: float
    products: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """A step's work for one image.

    Args:
        forward: Teacher and student, all views.
        backward: The student's, activations computed again included.
    """

    forward: Work
    backward: Work


def counted_flops(step: FakeStep, images: int) -> Flops:
    """Runs forward and backward of a micro-batch; its gradients stay."""
    aten = torch.ops.aten
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            # Attention as the CPU's kernels do it, which torch's counter leaves out.
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
            # torch counts grouped convolutions' backward as if they had one group.
            aten.convolution_backward: _convolution_backward,
        },
    )
    with counter:
        loss = step.loss(images)
        forward = _work(counter, images)
        loss.backward()
    both = _work(counter, images)
    return Flops(
        forward=forward,
        backward=Work(
            convolutions=both.convolutions - forward.convolutions,
            products=both.products - forward.products,
        ),
    )


def _work(counter: FlopCounterMode, images: int) -> Work:
    found = counter.get_flop_counts().get("Global", {})
    names = {str(operation).removeprefix("aten."): flops for operation, flops in found.items()}
    convolutions = sum(flops for name, flops in names.items() if name in _CONVOLUTIONS)
    return Work(
        convolutions=convolutions / images,
        products=(sum(names.values()) - convolutions) / images,
    )


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _convolution_backward(
    gradient: Shape, image: Shape, weight: Shape, *rest: Any, **_: Any
) -> int:
    transposed, mask = rest[4], rest[7]
    # One number of the larger side costs a product with a kernel of one group.
    positions = math.prod(image if transposed else gradient)
    return 2 * positions * math.prod(weight[1:]) * (mask[0] + mask[1])
