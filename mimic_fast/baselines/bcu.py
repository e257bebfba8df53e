"""BCU: a share of the suspect's weights is drawn anew, more in deeper layers, and distilled back.

Pang et al., "Backdoor Cleansing with Unlabeled Data", CVPR 2023, arXiv:2211.12044. Each weight and
bias of a convolution or linear layer is random again with its stage's probability, normalization
stays; the network then learns the suspect's softened outputs on clean images, at a temperature
that rises from 1 to 4.

The paper needs no labels, but class probabilities, which an encoder lacks. Here the images of the
batch are the classes: an image's logits are the cosines of its features with the suspect's
features of all images of the batch, so that both networks are read by the same classifier. -cos
of the features is added, since these probabilities say little of directions that no other image
of the batch has. The drawn share is exact, not a coin per weight.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mimic_fast.baselines.repair import (
    Repair,
    ViewSettings,
    leave_repaired,
    minimize,
    open_repair,
)
from mimic_fast.config import Settings
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.progress import Reporter, silent


class BcuSettings(ViewSettings):
    """SGD 0.01, momentum 0.9, decay 5e-4, cosine, 100 epochs, batch 256, as in the paper."""

    first_share: float = Field(
        default=0.01, gt=0, le=1, description="share drawn anew in the first stage and before it"
    )
    last_share: float = Field(
        default=0.27, gt=0, le=1, description="share in the last stage; geometric in between"
    )
    head_share: float = Field(
        default=0.1, ge=0, le=1, description="share in what follows the last stage"
    )
    temperature: float = Field(
        default=0.1, gt=0, description="what cosines are divided by, times the rise so far"
    )
    rise: float = Field(
        default=4.0, ge=1, description="the last pass's temperature in multiples of the first's"
    )
    cosine: float = Field(default=1.0, ge=0, description="weight of -cos to the suspect's features")


def bcu(
    settings: Settings,
    options: BcuSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Draws a share of the suspect's weights anew and distills; gives the encoder's file.

    ``encoder.taps`` are the stages; without them those of the architecture.

    Raises:
        MimicError: As :func:`mimic_fast.baselines.repair.open_repair` and ``minimize`` do, or if
            the architecture's stages are not known.
    """
    repair = open_repair(
        settings, kind="bcu", report=report, stop=stop, batch_size=options.optim.batch_size
    )
    encoder = repair.copy()
    # Checks the names of the taps too.
    taps = TappedEncoder(encoder, settings.encoder.taps or default_taps(encoder)).taps
    shares = stage_shares(len(taps), options)
    drawn = reinitialize(encoder, taps, shares, seed=settings.seed)
    _distill(repair, encoder, options)
    stages = (*taps, "head")
    facts = {
        "shares": dict(zip(stages, shares, strict=True)),
        "reinitialized": dict(zip(stages, drawn, strict=True)),
    }
    return leave_repaired(repair, encoder, options, facts=facts)


def stage_shares(stages: int, options: BcuSettings) -> tuple[float, ...]:
    """Shares of all stages, a geometric series as the paper's .01, .03, .09, .27, then the head's.

    Args:
        stages: How many; a single one gets ``last_share``.
        options: First, last and head's share.
    """
    ratio = options.last_share / options.first_share
    rising = (
        options.last_share * ratio ** ((stage + 1 - stages) / max(1, stages - 1))
        for stage in range(stages)
    )
    return (*rising, options.head_share)


@torch.no_grad()
def reinitialize(
    encoder: Encoder, taps: Sequence[str], shares: Sequence[float], *, seed: int
) -> tuple[int, ...]:
    """Draws a share of every convolution and linear layer anew, in place.

    ``round(share * n)`` of the n numbers of every weight and bias, at random places. Layers before
    the first tap and between taps count as part of the next one. Normalization, its statistics,
    tokens and positions stay.

    Args:
        encoder: What is changed.
        taps: The last module of every stage or the stage itself, shallow to deep.
        shares: One a stage, and one for what follows the last.
        seed: Of the new weights and of the places.

    Returns:
        How many numbers were drawn anew, as ``shares``.
    """
    fresh = dict(build_encoder(encoder.spec, seed=seed).backbone.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    stage_of = _stages(encoder, taps)
    drawn = [0] * len(shares)
    for name, module in encoder.backbone.named_modules():
        # MultiheadAttention holds the weights of its input projection itself.
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
            continue
        stage = stage_of(name)
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            count = round(shares[stage] * parameter.numel())
            mask = torch.zeros(parameter.numel(), dtype=torch.bool)
            mask[torch.randperm(parameter.numel(), generator=generator)[:count]] = True
            mask = mask.view(parameter.shape).to(parameter.device)
            parameter.copy_(torch.where(mask, fresh[key].to(parameter), parameter))
            drawn[stage] += count
    return tuple(drawn)


def softened_loss(
    student: Float[Tensor, "batch feature"],
    suspect: Float[Tensor, "batch feature"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """KL divergence of the student's from the suspect's softmax over the images of the batch.

    The logits of image i are the cosines of its features with the suspect's features of all
    images j, divided by the temperature. As in the paper, no factor T^2 makes up for it.

    Args:
        student: Features of the network that learns.
        suspect: Features of the same images; no gradient flows into them.
        temperature: Softens both; > 0.

    Returns:
        Scalar in nats, mean over the batch; 0 when the features agree in direction.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        mine = F.normalize(student.to(dtype), dim=1)
        classes = F.normalize(suspect.detach().to(dtype), dim=1)
        expected = (classes @ classes.T / temperature).log_softmax(1)
        found = (mine @ classes.T / temperature).log_softmax(1)
        return F.kl_div(found, expected, reduction="batchmean", log_target=True)


def temperature_at(step: int, *, images: int, options: BcuSettings) -> float:
    """Temperature of a step: the same within a pass, linear over the passes, as in the paper."""
    epoch = step * options.optim.batch_size // images
    progress = min(1.0, (epoch + 1) / options.optim.epochs)
    return options.temperature * (1 + (options.rise - 1) * progress)


def _distill(repair: Repair, encoder: Encoder, options: BcuSettings) -> None:
    suspect = repair.suspect.encoder

    def losses(step: int) -> dict[str, Tensor]:
        (images,) = repair.views(step, options, count=1)
        with torch.no_grad():
            expected = suspect(images)
        features = encoder(images)
        temperature = temperature_at(step, images=len(repair.pool), options=options)
        wide = torch.promote_types(features.dtype, torch.float32)
        cosine = F.cosine_similarity(features.to(wide), expected.to(wide)).mean()
        return {
            "softened": softened_loss(features, expected, temperature=temperature),
            "cosine": -options.cosine * cosine,
        }

    encoder.train()
    minimize(repair, encoder, losses, optim=options.optim)
    encoder.eval()


def _stages(encoder: Encoder, taps: Sequence[str]) -> Callable[[str], int]:
    """From a layer's name to the number of its stage; ``len(taps)`` for what follows the last."""
    place = {name: number for number, (name, _) in enumerate(encoder.backbone.named_modules())}

    def stage_of(name: str) -> int:
        around = [k for k, tap in enumerate(taps) if f"{name}.".startswith(f"{tap}.")]
        if around:
            return max(around)
        return next((k for k, tap in enumerate(taps) if place[tap] > place[name]), len(taps))

    return stage_of
