"""Settings of a scan."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from mimic_fast.config import DataSettings, EncoderSettings, Frozen, RunSettings

_VERSION = 1  # of probes, starts and search: raised whenever equal settings give other scores


class ScanSettings(Frozen):
    """A scan: what is measured and how hard it is tried."""

    seed: int = Field(default=0, ge=0, lt=2**31, description="draws images, starts and batches")
    encoder: EncoderSettings = Field(
        default_factory=EncoderSettings, description="encoder.teacher: the encoder to scan"
    )
    data: DataSettings = Field(default_factory=DataSettings, description="clean images")
    references: Path | None = Field(
        default=None,
        description="folder of clean encoders of the same family, or of their finished scans; "
        "None: scores, no verdict",
    )
    images: int = Field(default=512, ge=64, description="clean images drawn from the source")
    probe_images: int = Field(default=128, ge=16, description="images behind each fixed probe")
    batch_size: int = Field(default=64, ge=8, description="images in a step of an inversion")
    steps: int = Field(default=150, ge=10, description="steps of an inversion per level")
    levels: tuple[float, ...] = Field(
        default=(0.95, 0.6),
        description="mean pairwise cosine that counts as collapsed, from the highest down",
    )
    patch_starts: int = Field(
        default=6, ge=1, description="patch inversions: half from the best probes, half from grey"
    )
    additive_starts: int = Field(default=2, ge=1, description="inversions of an additive trigger")
    unusual: float = Field(
        default=0.05, gt=0, lt=1, description="chance among clean encoders below which: unusual"
    )
    suspicious: float = Field(
        default=0.01, gt=0, lt=1, description="chance among clean encoders below which: suspicious"
    )
    run: RunSettings = Field(
        default_factory=lambda: RunSettings(checkpoint_every=25),
        description="output, resuming, device",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "ScanSettings":
        levels = self.levels
        if not levels or sorted(set(levels), reverse=True) != list(levels):
            raise ValueError(f"levels must fall from one to the next, got {levels}")
        if not 0 < min(levels) <= max(levels) < 1:
            raise ValueError(f"levels must lie between 0 and 1, got {levels}")
        if self.suspicious > self.unusual:
            raise ValueError(
                f"suspicious ({self.suspicious}) must not be above unusual ({self.unusual})"
            )
        if self.images < 2 * self.batch_size:
            raise ValueError(
                f"images ({self.images}) must be at least two batches ({self.batch_size})"
            )
        return self


def protocol(settings: ScanSettings) -> dict[str, Any]:
    """What decides the scores of a given encoder on given images; scans compare if it agrees."""
    fields = {
        "seed", "images", "probe_images", "batch_size", "steps", "levels", "patch_starts",
        "additive_starts",
    }  # fmt: skip
    return {"version": _VERSION, **settings.model_dump(mode="json", include=fields)}
