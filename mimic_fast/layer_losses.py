"""Losses at the taps of one step: the teacher's side, the weights, and what the student tells.

The teacher leaves an attention map per tap, 4 bytes a position; only where a dense clone loss wants
it does an activation stay. The student's taps run through ``ops.tapped_losses``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from mimic_fast import ops
from mimic_fast.config import LossSettings
from mimic_fast.encoders.taps import Listener, TappedEncoder


@dataclass(kw_only=True, slots=True)
class _Kept:
    """Activations of one forward pass, by tap."""

    activations: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)

    def tap(self, index: int, activation: Tensor, *, prefix: int = 0) -> Tensor:
        self.activations[index] = activation, prefix
        self.versions[index] = activation._version
        return activation

    def overwritten(self) -> frozenset[int]:
        """Taps whose activation the network changed in place afterwards."""
        return frozenset(
            index
            for index, (activation, _) in self.activations.items()
            if activation._version != self.versions[index]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSide:
    """What the student is compared with in one step.

    Args:
        features: Of the teacher.
        listener: To be given to the student; None if no tap has a loss.
    """

    features: Float[Tensor, "batch feature"]
    listener: ops.LayerLosses | ops.LiveLosses | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherOutputs:
    """All that the losses need of the teacher for some images.

    Args:
        features: Of the teacher.
        power: Attention map by tap, before normalization; None where a tap has no attention loss.
        dense: The last tap's activation, where the dense clone loss wants it.
        positions: Of every tap.
        dtype: Of the activations.
        live: Taps whose activation the teacher's network changed in place afterwards.
    """

    features: Float[Tensor, "batch feature"]
    power: tuple[Float[Tensor, "batch _"] | None, ...]
    dense: Tensor | None
    positions: tuple[int, ...]
    dtype: torch.dtype
    live: frozenset[int]


def teacher_side(
    teacher: TappedEncoder,
    images: Float[Tensor, "batch channel height width"],
    layer_weights: Sequence[float],
    *,
    settings: LossSettings,
) -> TeacherSide:
    """Runs the teacher once and prepares the losses of the student's taps.

    Args:
        teacher: Frozen.
        images: What the teacher sees.
        layer_weights: lambda_l by tap; 0: no attention loss.
        settings: Weights and forms.

    Raises:
        ValueError: If there is not one weight a tap.
    """
    outputs = teacher_outputs(teacher, images, layer_weights, settings=settings)
    return side_of(outputs, layer_weights, settings=settings)


@torch.no_grad()
def teacher_outputs(
    teacher: TappedEncoder,
    images: Float[Tensor, "batch channel height width"],
    layer_weights: Sequence[float],
    *,
    settings: LossSettings,
) -> TeacherOutputs:
    """Runs the teacher once; arguments and errors are those of :func:`teacher_side`.

    A tap that the teacher's network overwrites is overwritten by the student's too: both have one
    architecture. Its losses are those of what stands there after the forward pass.
    """
    taps = len(teacher.taps)
    if len(layer_weights) != taps:
        raise ValueError(f"expected one weight a tap, got {len(layer_weights)} for {taps} taps")
    attended = _attended(layer_weights, settings)
    if not attended and not settings.dense:
        features = teacher(images)[0]
        return TeacherOutputs(
            features=features,
            power=(None,) * taps,
            dense=None,
            positions=(),
            dtype=features.dtype,
            live=frozenset(),
        )
    kept = _Kept()
    features = teacher.listened(images, kept)
    wanted = [n for n in attended if not (settings.dense and n == taps - 1)]
    maps = ops.power_maps(
        [kept.activations[n][0] for n in wanted],
        power=settings.attention_power,
        prefixes=[kept.activations[n][1] for n in wanted],
    )
    found = dict(zip(wanted, maps, strict=True))
    return TeacherOutputs(
        features=features,
        power=tuple(found.get(n) for n in range(taps)),
        dense=kept.activations[taps - 1][0] if settings.dense else None,
        positions=tuple(_positions(*kept.activations[n]) for n in range(taps)),
        dtype=kept.activations[0][0].dtype,
        live=kept.overwritten(),
    )


def side_of(
    outputs: TeacherOutputs, layer_weights: Sequence[float], *, settings: LossSettings
) -> TeacherSide:
    """The losses of the student's taps from what the teacher left, now or earlier."""
    attended, last = _attended(layer_weights, settings), len(layer_weights) - 1
    features, images = outputs.features, len(outputs.features)
    if not attended and outputs.dense is None:
        return TeacherSide(features=features, listener=None)
    targets = [None if power is None else ops.Target(power=power) for power in outputs.power]
    if outputs.dense is not None:
        targets[last] = ops.Target(teacher=outputs.dense)
    attention = tuple(
        weight * settings.attention_weight / n
        for weight, n in zip(layer_weights, outputs.positions, strict=True)
    )
    dense = None if outputs.dense is None else last
    clone = tuple(settings.dense if n == dense else 0.0 for n in range(last + 1))
    terms = [
        ops.Terms(
            power=settings.attention_power,
            clone=settings.clone_form if n == dense else "none",
            attention=n in attended,
        )
        for n in range(last + 1)
    ]
    return TeacherSide(
        features=features,
        listener=ops.tapped_losses(
            _weights(attention, clone, images, features.device, features.dtype),
            targets,
            terms,
            images=images,
            like=features.new_empty(0, dtype=outputs.dtype),
            live=outputs.live,
        ),
    )


def _attended(layer_weights: Sequence[float], settings: LossSettings) -> list[int]:
    return [n for n, weight in enumerate(layer_weights) if weight * settings.attention_weight]


def _positions(activation: Tensor, prefix: int) -> int:
    if activation.ndim == 2:
        return 1
    return activation.shape[1] - prefix if activation.ndim == 3 else activation[0, 0].numel()


@lru_cache(maxsize=8)
def _weights(
    attention: tuple[float, ...],
    clone: tuple[float, ...],
    images: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Made once a run: a copy to the device in every step would wait for it."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.tensor([attention, clone], dtype=wide, device=device) / images


def summed(
    listener: Listener | None, *, zero: Tensor
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Attention and dense clone loss over all taps, from a listener that has heard a forward."""
    if not isinstance(listener, ops.LayerLosses | ops.LiveLosses):
        return zero, zero
    attention, clone = torch.stack(listener.losses()).sum(dim=(0, 2))
    return attention, clone
