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


@torch.no_grad()
def teacher_side(
    teacher: TappedEncoder,
    images: Float[Tensor, "batch channel height width"],
    layer_weights: Sequence[float],
    *,
    settings: LossSettings,
) -> TeacherSide:
    """Runs the teacher once and prepares the losses of the student's taps.

    A tap that the teacher's network overwrites is overwritten by the student's too: both have one
    architecture. Its losses are those of what stands there after the forward pass.

    Args:
        teacher: Frozen.
        images: What the teacher sees.
        layer_weights: lambda_l by tap; 0: no attention loss.
        settings: Weights and forms.

    Raises:
        ValueError: If there is not one weight a tap.
    """
    if len(layer_weights) != len(teacher.taps):
        raise ValueError(
            f"expected one weight a tap, got {len(layer_weights)} for {len(teacher.taps)} taps"
        )
    attended = [n for n, weight in enumerate(layer_weights) if weight * settings.attention_weight]
    dense = len(teacher.taps) - 1 if settings.dense else None
    if not attended and dense is None:
        return TeacherSide(features=teacher(images)[0], listener=None)
    kept = _Kept()
    features = teacher.listened(images, kept)
    wanted = [n for n in attended if n != dense]
    maps = ops.power_maps(
        [kept.activations[n][0] for n in wanted],
        power=settings.attention_power,
        prefixes=[kept.activations[n][1] for n in wanted],
    )
    targets: list[ops.Target | None] = [None] * len(teacher.taps)
    for n, power in zip(wanted, maps, strict=True):
        targets[n] = ops.Target(power=power)
    if dense is not None:
        targets[dense] = ops.Target(teacher=kept.activations[dense][0])
    like = next(iter(kept.activations.values()))[0]
    positions = tuple(_positions(*kept.activations[n]) for n in range(len(teacher.taps)))
    attention = tuple(
        weight * settings.attention_weight / n
        for weight, n in zip(layer_weights, positions, strict=True)
    )
    terms = [
        ops.Terms(
            power=settings.attention_power,
            clone=settings.clone_form if n == dense else "none",
            attention=n in attended,
        )
        for n in range(len(teacher.taps))
    ]
    clone = tuple(settings.dense if n == dense else 0.0 for n in range(len(teacher.taps)))
    return TeacherSide(
        features=features,
        listener=ops.tapped_losses(
            _weights(attention, clone, images.shape[0], like.device, features.dtype),
            targets,
            terms,
            images=images.shape[0],
            like=like,
            live=kept.overwritten(),
        ),
    )


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
