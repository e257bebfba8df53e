"""Fine-tuning: the suspect is trained on with its own kind of task, in the hope that it forgets.

The contrastive loss takes the place of cross-entropy, for want of labels: SimCLR's NT-Xent on two
views of every clean image, BatchNorm in training mode. Without captions this is what CleanCLIP
(Bansal et al., ICCV 2023, arXiv:2303.03323) does to the image side.
"""

from collections.abc import Callable
from pathlib import Path

from mimic_fast.baselines.repair import (
    Contrast,
    ContrastSettings,
    Repair,
    leave_repaired,
    minimize,
    open_repair,
)
from mimic_fast.config import Settings
from mimic_fast.encoders.build import Encoder
from mimic_fast.progress import Reporter, silent


class FineTuningSettings(ContrastSettings):
    """SGD 0.01, momentum 0.9, decay 5e-4, cosine, 100 epochs, batch 256."""


def fine_tuning(
    settings: Settings,
    options: FineTuningSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Fine-tunes a copy of the suspect; gives the encoder's file below ``run.out``.

    Raises:
        MimicError: As :func:`mimic_fast.baselines.repair.open_repair` and ``minimize`` do.
    """
    repair = open_repair(
        settings,
        kind="fine_tuning",
        report=report,
        stop=stop,
        batch_size=options.optim.batch_size,
    )
    encoder = repair.copy()
    fine_tune(repair, encoder, options)
    return leave_repaired(repair, encoder, options)


def fine_tune(
    repair: Repair, encoder: Encoder, options: ContrastSettings, *, phase: str | None = None
) -> None:
    """Trains the encoder in place by the contrastive loss, and leaves it in eval mode."""
    contrast = Contrast(encoder, options, seed=repair.settings.seed)
    contrast.train()
    minimize(
        repair,
        contrast,
        lambda step: {"contrastive": contrast(repair.views(step, options))},
        optim=options.optim,
        phase=phase,
    )
    encoder.eval()
