"""The floor: a random student trained contrastively on the clean images alone, no teacher.

A defense that does not beat it has transferred nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from mimic_fast.config import EncoderSpec, LossSettings, Settings
from mimic_fast.distributed import start
from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.progress import Reporter, silent
from mimic_fast.recipe import settings_record
from mimic_fast.self_supervised import train_contrastive
from mimic_fast.training import Trained

# SimCLR's for small images: a contrastive loss learns little from the mild views of imitation.
VIEWS = {"crop_scale": (0.2, 1.0), "jitter_probability": 0.8, "grayscale": 0.2}


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentOnly:
    """The trained floor; ``path`` is its exported file, or None if nothing was to be written."""

    encoder: Encoder
    path: Path | None
    trained: Trained


def student_only(
    spec: EncoderSpec,
    pool: UInt8[Tensor, "image channel side side"],
    *,
    settings: Settings,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> StudentOnly:
    """Trains the floor with the same images, optimizer and epochs as a purification.

    Args:
        spec: The teacher's architecture.
        pool: The purification's training images.
        settings: The purification's settings; loss weights are replaced, ``run.out`` names the
            folder.
        report: Told of every step.
        stop: Polled every step.
    """
    # Only what SimCLR itself has: hardening is for imitation and would handicap the floor.
    loss = LossSettings(
        clone=0.0,
        attention_weight=0.0,
        contrastive=1.0,
        temperature=settings.loss.temperature,
        projection=settings.loss.projection,
    )
    data = settings.data.model_copy(update=VIEWS)
    settings = settings.model_copy(update={"loss": loss, "data": data})
    started = start(settings.run, settings.optim, expected_world=1)
    encoder, trained = train_contrastive(
        spec,
        pool,
        settings=settings,
        started=started,
        report=report,
        stop=stop,
        phase="student_only",
    )
    path = None
    if settings.run.out is not None:
        card = {"kind": "student_only", "settings": settings_record(settings)}
        path = export_encoder(encoder, settings.run.out, key_map=None, card=card)
    return StudentOnly(encoder=encoder, path=path, trained=trained)
