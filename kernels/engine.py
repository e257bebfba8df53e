"""What the autograd functions ask of a set of kernels, and how layers become launches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mimic_fast.kernels.layout import has_gaps, layout_of

Clone = Literal["none", "cosine", "mse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """The kernels behind the autograd functions; ``distill_loss.py`` and ``cpu_loss.py`` have them.

    Args:
        name: ``triton`` or ``cpp``.
        power_maps: Unnormalized attention maps of several layers of one shape.
        forward: Losses and the coefficients of their gradients.
        backward: The gradient of one layer, added to the trunk's.
        forward_with_gradient: Losses and gradient in one pass over an image, where caches make that
            cheaper than a second one.
    """

    name: Literal["triton", "cpp"]
    power_maps: Callable[..., Tensor]
    forward: Callable[..., Tensor]
    backward: Callable[..., None]
    forward_with_gradient: Callable[..., None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What is computed of a layer.

    Args:
        power: p of the attention map.
        clone: Kind of the dense clone loss.
        attention: Whether there is an attention loss.
        prefix: Class and register tokens to leave out.
    """

    power: float = 2.0
    clone: Clone = "none"
    attention: bool = True
    prefix: int = 0

    def arguments(self) -> dict[str, Any]:
        """As the engine's functions take them."""
        return {
            "power": self.power,
            "clone": self.clone,
            "attention": self.attention,
            "prefix": self.prefix,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What the student's layer is compared with.

    Args:
        power: Unnormalized attention map of the teacher, ``[B, N]``; None: made from ``teacher``.
        teacher: Activation of the teacher; None where its power map is all that is needed.
    """

    power: Tensor | None = None
    teacher: Tensor | None = None


@dataclass(kw_only=True, slots=True)
class Layer:
    """One layer between forward and backward.

    ``activation`` and ``target`` are let go by :func:`fill`: the graph keeps what the backward
    needs, and only until then.
    """

    terms: Terms
    target: Target
    activation: Tensor | None
    weights: Tensor | None = None  # [2]
    coefficients: Tensor | None = None  # [k, B, N]


def accumulator(activation: Tensor) -> torch.dtype:
    """Sums are float32, or float64 for float64."""
    return torch.float64 if activation.dtype == torch.float64 else torch.float32


def dense_activation(activation: Tensor, terms: Terms, images: int) -> Tensor:
    """The activation itself, or a contiguous copy if no kernel can read it where it lies.

    A gradient takes the strides of its activation, which must therefore have no gaps.
    """
    layout = layout_of(activation, prefix=terms.prefix, images=images)
    return activation.contiguous() if layout is None or has_gaps(activation) else activation


def matching(target: Target, student: Tensor) -> Target:
    """The target with the teacher's activation in the student's memory order, copied if need be."""
    teacher = target.teacher
    if teacher is None:
        return target
    own, other = layout_of(student), layout_of(teacher)
    if own is not None and other is not None and own.kind == other.kind:
        return target
    return Target(power=target.power, teacher=torch.empty_like(student).copy_(teacher))


def runs(layers: Sequence[Layer], numbers: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Consecutive layers that one launch can take: ``start, stop`` of each.

    Args:
        layers: In order.
        numbers: Their places among all layers; None: no layer is left out between them.
    """
    places = range(len(layers)) if numbers is None else numbers
    # A gap in the places raises the difference, and so begins a new run.
    gaps = [place - n for n, place in enumerate(places)]
    keys = [(gap, _run_key(layer)) for gap, layer in zip(gaps, layers, strict=True)]
    starts = [n for n, key in enumerate(keys) if n == 0 or key != keys[n - 1]]
    return list(zip(starts, [*starts[1:], len(keys)][: len(starts)], strict=True))


def fill(engine: Engine, layers: Sequence[Layer], weights: Tensor, losses: Tensor) -> None:
    """One launch: losses of the layers of a run, and what their backward needs."""
    weights = weights.contiguous()
    students = [layer.activation for layer in layers if layer.activation is not None]
    teachers = [layer.target.teacher for layer in layers if layer.target.teacher is not None]
    powers = [layer.target.power for layer in layers if layer.target.power is not None]
    coefficients = engine.forward(
        students,
        teachers or None,
        stacked(powers) if powers else None,
        weights,
        losses,
        **layers[0].terms.arguments(),
    )
    for number, layer in enumerate(layers):
        layer.weights, layer.coefficients = weights[:, number], coefficients[number]
        layer.activation, layer.target = None, Target()


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """``torch.stack``, without the copy where the rows lie behind each other already."""
    first = rows[0]
    step = first.numel()
    adjacent = all(
        row.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and row.storage_offset() == first.storage_offset() + number * step
        and row.is_contiguous()
        for number, row in enumerate(rows)
    )
    if not adjacent:
        return torch.stack(list(rows))
    return first.as_strided((len(rows), *first.shape), (step, *first.stride()))


def copy_uncounted(out: Tensor, trunk: Tensor | None, prefix: int, images: int) -> None:
    """Class tokens and images that do not count have the trunk's gradient, or none."""
    parts = [slice(images, None)] if images < out.shape[0] else []
    regions: list[Any] = [(part,) for part in parts]
    if prefix and out.ndim == 3:
        regions.append((slice(None, images), slice(None, prefix)))
    for region in regions:
        if trunk is None:
            out[region].zero_()
        else:
            out[region].copy_(trunk[region])


def _run_key(layer: Layer) -> tuple[Any, ...]:
    tensors = (layer.activation, layer.target.teacher)
    return (
        layer.terms,
        layer.target.power is None,
        *((t.shape, t.stride(), t.dtype) if t is not None else None for t in tensors),
    )
