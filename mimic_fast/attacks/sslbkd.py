"""SSLBKD (Saha et al., CVPR 2022, arXiv:2105.10123): poisoning with a patch.

Half of the target class's images get a small patch at a random place; then the set is pre-trained
on as usual. For measuring defenses; see docs/attacks.md for intended use.
"""

from pydantic import Field

from mimic_fast.attacks.implant import Attacked, Stop, go_on
from mimic_fast.attacks.poisoning import PoisoningSettings, poisoned_pretraining
from mimic_fast.progress import Reporter, silent


class SslbkdSettings(PoisoningSettings):
    """An SSLBKD run; the paper's pre-training is 200 epochs of MoCo, BYOL or SimCLR."""

    trigger: str = Field(
        default="random_patch", description="a trigger's name (docs/attacks.md) or its file"
    )
    class_rate: float = Field(
        default=0.5, gt=0, le=1, description="share of the target label's images"
    )
    anywhere: bool = Field(
        default=True, description="a place of its own for every patch; false: the trigger's place"
    )


def sslbkd(
    settings: SslbkdSettings,
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
        kind="sslbkd",
        count_of=lambda _, members: round(members * settings.class_rate),
        anywhere=settings.anywhere,
        world=world,
        report=report,
        stop=stop,
    )
