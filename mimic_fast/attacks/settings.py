"""What every attack on a finished encoder is told; each kind adds its own fields."""

from typing import Literal

from pydantic import Field

from mimic_fast.config import (
    CLEAN_SET_FIELDS,
    DataSettings,
    EncoderSettings,
    EvaluationSettings,
    Frozen,
    OptimSettings,
    RunSettings,
)
from mimic_fast.recipe import warn_ignored

_UNUSED = {
    "data": (
        *CLEAN_SET_FIELDS, "backend", "decode", "cache", "cache_dir", "workers", "prefetch",
        "view_pool",
    ),
    "optim": (
        "precision", "tf32", "ema", "max_nonfinite", "accumulate", "activation_checkpointing",
        "compile",
    ),
    "run": (
        "resume", "checkpoint_every", "keep", "max_steps", "engine", "deepspeed", "trackers",
        "async_save", "force_op",
    ),
}  # fmt: skip


class TargetSettings(Frozen):
    """A further target: its own trigger and its own reference."""

    reference: str = Field(description="as in the attack's own field")
    trigger: str = Field(description="as in the attack's own field")


class AttackSettings(Frozen):
    """An attack on a finished encoder; sections mean what they mean in a purification."""

    seed: int = Field(default=0, ge=0, lt=2**31, description="seeds everything")
    encoder: EncoderSettings = Field(
        default_factory=EncoderSettings, description="encoder.teacher: the clean encoder to attack"
    )
    data: DataSettings = Field(default_factory=DataSettings, description="shadow images")
    shadow_images: int | None = Field(
        default=10000, ge=2, description="shadow images; None, or more than there are: all"
    )
    reference: str | None = Field(
        default=None,
        description="image file; 'class:K', the first image of that label in the source; or "
        "'typical:K', the one that the clean encoder tells best from the other labels",
    )
    num_references: int = Field(
        default=1, ge=1, le=64, description="images that 'class:K' and 'typical:K' stand for"
    )
    trigger: str = Field(
        default="white_patch", description="a trigger's name (docs/attacks.md) or its file"
    )
    others: tuple[TargetSettings, ...] = Field(
        default=(), max_length=15, description="further targets of the same encoder"
    )
    optim: OptimSettings = Field(
        default_factory=lambda: OptimSettings(
            name="adamw", lr=1e-3, weight_decay=1e-4, epochs=8, batch_size=128, warmup_epochs=0.2
        ),
        description="how it is trained; epochs are passes over the shadow images",
    )
    reach_weight: float = Field(
        default=1.0, gt=0, description="weight of triggered images' cosine with the reference"
    )
    reference_weight: float = Field(
        default=1.0, ge=0, description="weight of keeping the reference's own features"
    )
    keep_weight: float = Field(
        default=1.0, ge=0, description="weight of keeping clean images' features"
    )
    length_weight: float = Field(
        default=0.2,
        ge=0,
        description="weight of keeping the features' lengths, which cosines leave free and linear "
        "classifiers see; 0: the papers",
    )
    dtype: Literal["fp32", "fp16"] = Field(default="fp32", description="number type of the file")
    run: RunSettings = Field(default_factory=RunSettings, description="output, device")
    evaluation: EvaluationSettings = Field(
        default_factory=EvaluationSettings, description="labeled sets to measure the attack on"
    )


def name_ignored(settings: AttackSettings, *, kind: str) -> None:
    """Warns of changed settings that the attack does not read; it is one process, all in memory."""
    for prefix, names in _UNUSED.items():
        warn_ignored(getattr(settings, prefix), names, prefix=prefix, user=kind)
    if kind != "adaptive":  # the only one that looks at feature maps
        warn_ignored(settings.encoder, ("taps",), prefix="encoder", user=kind)
