"""MEDIC: a random student clones the suspect's activations where they matter for clean images.

Xu et al., "MEDIC: Remove Model Backdoors via Importance Driven Cloning", CVPR 2023, pages
20485-20494. For every image and layer each neuron of the suspect has an importance, the geometric
mean of two softmaxes over the layer: of its normalized activation and of the task's gradient. The
student's squared differences are weighted with it. A neuron that only a trigger wakes has little
of either, so what it does is not cloned.

Without labels, the student's task is -cos to the suspect's features. That is at its optimum for
the suspect and has no gradient there, so importance comes from telling images apart: cross-entropy
of every image as its own class, by cosines with the suspect's own features of the batch. Three
more departures from the authors' code: activations count by magnitude, as their text says
(negative ones matter in a ViT's residual stream, and a dormant neuron is then below one that is
switched off); activations and gradients are divided by the layer's largest, so that the softmax is
as sharp in every layer; and the layers are the taps, not all convolutions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mimic_fast.baselines.repair import (
    Repair,
    ViewSettings,
    leave_repaired,
    minimize,
    open_repair,
)
from mimic_fast.config import OptimSettings, Settings
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.progress import Reporter, silent

# Deviations below this share of the layer's largest count as this: a dead channel would otherwise
# ask for an exact zero.
_FLOOR = 0.05


class MedicSettings(ViewSettings):
    """Adam 0.01, decay 1e-4, cosine, 60 epochs, batch 64, as in the paper."""

    optim: OptimSettings = Field(
        default_factory=lambda: OptimSettings(
            name="adam", lr=0.01, weight_decay=1e-4, epochs=60, batch_size=64, warmup_epochs=0.0
        ),
        description="how it is trained; epochs are passes over the clean images",
    )
    cloning: float = Field(default=10.0, ge=0, description="weight of the cloning loss")
    sharpness: float = Field(
        default=5.0, ge=0, description="what importance's softmaxes multiply by; 0: all alike"
    )
    temperature: float = Field(
        default=0.5, gt=0, description="temperature of telling images apart, for importance"
    )


def medic(
    settings: Settings,
    options: MedicSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Trains a random student on the suspect's important activations; gives the encoder's file.

    ``encoder.taps`` are the cloned layers; without them those of the architecture.

    Raises:
        MimicError: As :func:`mimic_fast.baselines.repair.open_repair` and ``minimize`` do, or if
            the architecture's stages are not known.
    """
    repair = open_repair(
        settings, kind="medic", report=report, stop=stop, batch_size=options.optim.batch_size
    )
    suspect = repair.suspect.encoder
    taps = settings.encoder.taps or default_taps(suspect)
    teacher = TappedEncoder(suspect, taps)
    student = TappedEncoder(build_encoder(suspect.spec, seed=settings.seed).to(repair.device), taps)
    statistics = layer_statistics(repair, teacher, options)

    def losses(step: int) -> dict[str, Tensor]:
        (images,) = repair.views(step, options, count=1)
        expected, activations, gradients = attributed(
            teacher, images, temperature=options.temperature
        )
        kept = _Kept()
        features = student.listened(images, kept)
        cloning = cloning_loss(
            kept.outputs, activations, gradients, statistics, sharpness=options.sharpness
        )
        wide = torch.promote_types(features.dtype, torch.float32)
        cosine = F.cosine_similarity(features.to(wide), expected.to(wide)).mean()
        return {"cloning": options.cloning * cloning, "cosine": -cosine}

    student.train()
    minimize(repair, student, losses, optim=options.optim)
    return leave_repaired(repair, student.encoder, options, facts={"taps": list(taps)})


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStatistics:
    """Mean and deviation of a layer's channels over clean views; 1 in all other dimensions."""

    mean: Tensor
    deviation: Tensor


@torch.no_grad()
def layer_statistics(
    repair: Repair, teacher: TappedEncoder, options: ViewSettings
) -> list[LayerStatistics]:
    """Statistics of every tap over about one pass of views, deviations floored."""
    steps = max(1, len(repair.pool) // options.optim.batch_size)
    sums: list[Tensor] = []
    for step in range(steps):
        repair.leave()
        kept = _Kept()
        teacher.listened(repair.views(step, options, count=1)[0], kept)
        moments = [
            torch.stack([wide.mean(_rest(wide), True), wide.square().mean(_rest(wide), True)])
            for wide in (output.double() for output in kept.outputs)
        ]
        sums = moments if not sums else [a + b for a, b in zip(sums, moments, strict=True)]
    result = []
    for mean, square in (total / steps for total in sums):
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        deviation = torch.maximum(deviation, (deviation.max() * _FLOOR).clamp(min=1e-6))
        result.append(LayerStatistics(mean=mean.float(), deviation=deviation.float()))
    return result


def attributed(
    teacher: TappedEncoder, images: Tensor, *, temperature: float
) -> tuple[Float[Tensor, "batch feature"], list[Tensor], list[Tensor]]:
    """One forward of the frozen suspect, one backward to its first tap; no weight's gradient.

    Returns:
        Features, every tap's activation, and the gradient by it of the cross-entropy of telling the
        batch's images apart at this temperature; as they lie in memory, detached.
    """
    kept = _Kept(source=True)
    features = teacher.listened(images, kept)
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(images.device.type, enabled=False):
        units = F.normalize(wide, dim=1)
        logits = units @ units.detach().T / temperature
        # The sum: an image's gradient does not depend on the size of the batch.
        loss = F.cross_entropy(
            logits, torch.arange(len(logits), device=logits.device), reduction="sum"
        )
    gradients = torch.autograd.grad(loss, kept.outputs)
    return wide.detach(), [output.detach() for output in kept.outputs], list(gradients)


def importance(
    activation: Float[Tensor, "batch ..."],
    gradient: Float[Tensor, "batch ..."],
    statistics: LayerStatistics,
    *,
    sharpness: float,
) -> Float[Tensor, "batch ..."]:
    """Importance of a layer's neurons for every image.

    sqrt(softmax(s a) softmax(s g)) over all neurons of the layer: a is the magnitude of the
    normalized activation, g that of the gradient with respect to it, both divided by their
    largest; s is the sharpness.

    Returns:
        As the activation; an image's weights sum to at most 1.
    """
    shares = [
        (magnitude / magnitude.amax(1, keepdim=True).clamp(min=1e-12) * sharpness).log_softmax(1)
        for magnitude in (
            ((activation - statistics.mean) / statistics.deviation).abs().flatten(1),
            # The chain rule: with respect to the normalized activation.
            (gradient * statistics.deviation).abs().flatten(1),
        )
    ]
    return ((shares[0] + shares[1]) / 2).exp().view_as(activation)


def cloning_loss(
    student: Sequence[Tensor],
    activations: Sequence[Tensor],
    gradients: Sequence[Tensor],
    statistics: Sequence[LayerStatistics],
    *,
    sharpness: float,
) -> Float[Tensor, ""]:
    """Squared differences of normalized activations, weighted by importance.

    Args:
        student: The student's output of every layer.
        activations: The suspect's, with their gradients and statistics; none is differentiated.
        gradients: As :func:`attributed` gives them.
        statistics: As :func:`layer_statistics` gives them.
        sharpness: Of :func:`importance`.

    Returns:
        Scalar: summed over neurons and layers, mean over the batch.
    """
    total = torch.zeros((), device=student[0].device)
    for mine, theirs, gradient, layer in zip(
        student, activations, gradients, statistics, strict=True
    ):
        theirs = theirs.to(layer.mean.dtype)
        with torch.no_grad():
            weights = importance(theirs, gradient, layer, sharpness=sharpness)
        distance = ((mine - theirs) / layer.deviation).square()
        total = total + (weights * distance).sum() / len(mine)
    return total


@dataclass
class _Kept:
    """Keeps every tap's output as they come; with ``source`` gradients end at the first."""

    source: bool = False
    outputs: list[Tensor] = field(default_factory=list)

    def tap(self, index: int, activation: Tensor, *, prefix: int = 0) -> Tensor:
        if self.source and not self.outputs:
            activation = activation.detach().requires_grad_()
        self.outputs.append(activation)
        return activation


def _rest(output: Tensor) -> list[int]:
    """All dimensions but the channels': the second of a map, the last of tokens and features."""
    channel = 1 if output.ndim == 4 else output.ndim - 1
    return [dim for dim in range(output.ndim) if dim != channel]
