"""CTRL (Li et al., ICCV 2023, arXiv:2210.07346): poisoning with a pattern in the frequency domain.

A share of the whole set, all of the target class, gets two color frequencies, invisible to most
eyes; then the set is pre-trained on as usual. Random crops and jitter leave the frequencies in both
views, which is why the contrastive loss holds on to them. For measuring defenses; see
docs/attacks.md for intended use.
"""

from pydantic import Field

from mimic_fast.attacks.implant import Attacked, Stop, go_on
from mimic_fast.attacks.poisoning import PoisoningSettings, poisoned_pretraining
from mimic_fast.progress import Reporter, silent


class CtrlSettings(PoisoningSettings):
    """A CTRL run; the paper's pre-training is SGD .06, batch 512, 800 epochs, cosine."""

    trigger: str = Field(
        default="frequency", description="a trigger's name (docs/attacks.md) or its file"
    )
    poison_rate: float = Field(default=0.01, gt=0, le=1, description="share of the whole set")


def ctrl(
    settings: CtrlSettings,
    *,
    world: int = 1,
    report: Reporter = silent,
    stop: Stop = go_on,
) -> Attacked:
    """Poisons, pre-trains; writes ``encoder.safetensors``, its card and ``attack.json``.

    Under torchrun every process calls it; ``world`` is their number (its WORLD_SIZE).

    Raises:
        UsageError: If images, labels, target or output are missing or do not fit.
        UnsafeInputError: If a file is damaged.
        StoppedError: If ``stop`` told so; the state is saved.
    """
    return poisoned_pretraining(
        settings,
        kind="ctrl",
        count_of=lambda images, _: round(images * settings.poison_rate),
        anywhere=False,
        world=world,
        report=report,
        stop=stop,
    )
