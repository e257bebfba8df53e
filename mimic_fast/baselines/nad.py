"""Neural attention distillation (NAD): the suspect learns a fine-tuned copy's attention.

Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks", ICLR 2021, arXiv:2101.05930. A copy of the backdoored network is fine-tuned on
clean images and becomes the teacher; the backdoored network is then fine-tuned with a term that
pulls the attention maps of its last stages to the teacher's.

Without labels the contrastive loss takes the place of cross-entropy in both. It needs two views of
an image, attention needs one: the teacher sees the first view only. A stage whose map has one
position is passed over: normalized, its attention is always 1. The learning rate falls by a cosine,
not in steps.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mimic_fast import ops
from mimic_fast.baselines.fine_tuning import fine_tune
from mimic_fast.baselines.repair import (
    Contrast,
    ContrastSettings,
    Repair,
    leave_repaired,
    minimize,
    open_repair,
)
from mimic_fast.config import OptimSettings, Settings
from mimic_fast.encoders.taps import TappedEncoder, attention_free_taps, default_taps
from mimic_fast.errors import UsageError
from mimic_fast.progress import Reporter, silent


class NadSettings(ContrastSettings):
    """SGD 0.1, momentum 0.9, decay 1e-4, batch 64: 10 epochs for the teacher, 20 for the student.

    The learning rate is that of small CNNs with BatchNorm; a ViT wants another optimizer.
    """

    optim: OptimSettings = Field(
        default_factory=lambda: OptimSettings(
            name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, epochs=20, batch_size=64,
            warmup_epochs=0.0,
        ),
        description="how teacher and student are trained; epochs are the student's",
    )  # fmt: skip
    teacher_epochs: int = Field(
        default=10, ge=1, description="passes over the clean images that make the teacher"
    )
    betas: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=(500.0, 1000.0, 1000.0),
        min_length=1,
        description="weights of the attention distance, a mean over positions, at the last taps, "
        "shallow to deep",
    )


def nad(
    settings: Settings,
    options: NadSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Distills a fine-tuned copy's attention into the suspect; gives the encoder's file.

    Taps are the last of ``encoder.taps``, or of the encoder's stages or blocks.

    Raises:
        UsageError: If there are fewer taps with attention than betas.
        MimicError: As :func:`mimic_fast.baselines.repair.open_repair` and ``minimize`` do.
    """
    repair = open_repair(
        settings, kind="nad", report=report, stop=stop, batch_size=options.optim.batch_size
    )
    taps = _last_taps(repair, count=len(options.betas))
    teacher = TappedEncoder(repair.copy(), taps)
    shorter = options.optim.model_copy(update={"epochs": options.teacher_epochs})
    recipe = options.model_copy(update={"optim": shorter})
    fine_tune(repair, teacher.encoder, recipe, phase="nad teacher")
    teacher.requires_grad_(False)

    student = TappedEncoder(repair.copy(), taps)
    contrast = Contrast(student.encoder, options, seed=settings.seed)
    contrast.train()

    def losses(step: int) -> dict[str, Tensor]:
        views = repair.views(step, options)
        features, maps = student(torch.cat(views))
        first = [one[: len(views[0])] for one in maps]
        return {
            "contrastive": contrast.of_features(features),
            "attention": attention_distance(first, teacher, views[0], betas=options.betas),
        }

    minimize(repair, contrast, losses, optim=options.optim)
    return leave_repaired(repair, student.encoder, options, facts={"taps": list(taps)})


def attention_distance(
    maps: Sequence[Float[Tensor, "batch _ _ _"]],
    teacher: TappedEncoder,
    images: Float[Tensor, "batch channel height width"],
    *,
    betas: Sequence[float],
) -> Float[Tensor, ""]:
    """Distance to the teacher's attention maps of the same images, weighted and summed over taps.

    Args:
        maps: The student's, one a tap.
        teacher: Seen once; no gradient flows into it.
        images: What the student saw.
        betas: Weights by tap.
    """
    with torch.no_grad():
        _, goals = teacher(images)
    distances = [
        beta * ops.attention_loss(own, goal, form="mean")
        for own, goal, beta in zip(maps, goals, betas, strict=True)
    ]
    return torch.stack(distances).sum()


def _last_taps(repair: Repair, *, count: int) -> tuple[str, ...]:
    encoder = repair.suspect.encoder
    taps = repair.settings.encoder.taps or default_taps(encoder)
    flat = attention_free_taps(TappedEncoder(encoder, taps))
    usable = tuple(tap for tap in taps if tap not in flat)
    if len(usable) < count:
        raise UsageError(
            f"nad needs {count} taps whose map has more than one position, one a beta; "
            f"{encoder.spec.architecture} has {len(usable)} of {len(taps)} at "
            f"{encoder.spec.image_size} pixels ({', '.join(usable) or 'none'}); give fewer "
            "options.betas or other encoder.taps"
        )
    return usable[-count:]
