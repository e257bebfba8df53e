"""RECEIVE: finds the trigger that makes all features collapse, then unlearns it.

MOTH (Tao et al., "Model Orthogonalization: Class Distance Hardening in Neural Networks for Better
Security", IEEE S&P 2022) inverts triggers of a classifier and trains against them. RECEIVE is its
form for encoders: it inverts one trigger, mask and pattern, and minimizes ``NT-Xent + 3.5 MSE(f(x),
f(x + trigger))`` over clean images x. No publication of this form was found to check it against;
the recipe, 3.5 included, was handed down.

Adapted: there are no classes, so the trigger is the smallest one that sends the features of
different images to one place; the inversion is that of ``mimic_fast.scan`` (DECREE, Feng et al.,
CVPR 2023, arXiv:2303.15180), started from the best fixed patches as well as from grey squares. x is
the first of NT-Xent's two views, which saves a forward. The trigger is inverted again every few
passes, as in MOTH; old ones are kept, and steps take them in turn. Where no trigger small enough is
found, nothing but NT-Xent is left, and the card says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn

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
from mimic_fast.precision import autocast, autocast_dtype
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.scan.concentration import clean_center
from mimic_fast.scan.forms import PATCH
from mimic_fast.scan.inversion import Inverted, Schedule, Search
from mimic_fast.scan.measure import patch_starts
from mimic_fast.scan.probing import answers, patch_probes

_INVERSION = "receive: inversion"


class ReceiveSettings(ContrastSettings):
    """SGD 0.01, momentum 0.9, decay 5e-4, cosine, 100 epochs, batch 256; weight 3.5."""

    unlearn_weight: float = Field(
        default=3.5, gt=0, description="of the squared distance between plain and triggered"
    )
    invert_every: int = Field(default=25, ge=1, description="passes between two inversions")
    levels: tuple[float, ...] = Field(
        default=(0.95, 0.6),
        min_length=1,
        description="mean pairwise cosine that counts as collapsed; the first reached is taken",
    )
    largest: float = Field(
        default=0.3,
        gt=0,
        le=0.9,
        description="share of the image above which a trigger is not unlearned: it hides the image",
    )
    steps: int = Field(default=150, ge=1, description="steps of an inversion for each level")
    starts: int = Field(
        default=4, ge=1, description="inversions: half from the best probes, half from grey squares"
    )
    inversion_batch: int = Field(default=64, ge=2, description="images in a step of an inversion")
    probe_images: int = Field(default=64, ge=2, description="images behind each fixed probe")

    @field_validator("levels")
    @classmethod
    def _falling(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if list(levels) != sorted(set(levels), reverse=True) or not 0 < levels[-1] <= levels[0] < 1:
            raise ValueError(f"levels must fall and lie between 0 and 1, got {levels}")
        return levels


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovered:
    """A trigger and how well it collapses features.

    Args:
        level: Mean pairwise cosine that it reached.
        inverted: Size, mask and pattern, on the device.
    """

    level: float
    inverted: Inverted


def receive(
    settings: Settings,
    options: ReceiveSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Inverts and unlearns triggers; gives the encoder's file below ``run.out``.

    Raises:
        MimicError: As :func:`mimic_fast.baselines.repair.open_repair` and ``minimize`` do, and
            :func:`recover`.
    """
    repair = open_repair(
        settings,
        kind="receive",
        report=report,
        stop=stop,
        batch_size=options.optim.batch_size,
    )
    encoder = repair.copy()
    rounds = unlearn(
        repair, encoder, options, find=lambda number: recover(repair, encoder, options, number)
    )
    facts = [found and {"level": found.level, "size": found.inverted.size} for found in rounds]
    return leave_repaired(repair, encoder, options, facts={"triggers": facts})


def unlearn(
    repair: Repair,
    encoder: Encoder,
    options: ReceiveSettings,
    *,
    find: Callable[[int], Recovered | None],
) -> list[Recovered | None]:
    """Trains the encoder in place against the triggers found, and leaves it in eval mode.

    Args:
        repair: Images, seed, whom to tell.
        encoder: To be trained.
        options: Optimizer, weight, and how often to look again.
        find: Looks for a trigger of the encoder as it is; gets the number of the round, from 0.

    Returns:
        What each round found.

    Raises:
        MimicError: As ``minimize`` does, and ``find``.
    """
    optim = options.optim
    contrast = Contrast(encoder, options, seed=repair.settings.seed)
    rounds = [find(0)]
    contrast.train()
    period = max(1, round(options.invert_every * len(repair.pool) / optim.batch_size))
    total = repair.steps(optim)

    def losses(step: int) -> dict[str, Tensor]:
        first, second = repair.views(step, options)
        known = [found.inverted for found in rounds if found is not None]
        if not known:
            return {"contrastive": contrast([first, second])}
        trigger = known[step % len(known)]
        triggered = PATCH.stamp(first, trigger.mask, trigger.pattern)
        # One forward: BatchNorm must not tell plain from triggered images by statistics of their
        # own, which it will not have after training.
        features = encoder(torch.cat([first, second, triggered]))
        plain, _, moved = features.chunk(3)
        gap = F.mse_loss(moved.float(), plain.float())
        return {
            "contrastive": contrast.of_features(features[: 2 * len(first)]),
            "unlearn": options.unlearn_weight * gap,
        }

    def again(step: int) -> None:
        if (step + 1) % period == 0 and step + 1 < total:
            rounds.append(find(len(rounds)))
            encoder.train()

    minimize(repair, contrast, losses, optim=optim, after=again)
    encoder.eval()
    return rounds


def recover(
    repair: Repair, encoder: Encoder, options: ReceiveSettings, number: int
) -> Recovered | None:
    """The smallest patch that sends the encoder's features of all images to one place.

    The encoder is left in eval mode, its weights with gradients.

    Args:
        repair: Images, seed, whom to tell.
        encoder: What is inverted; its weights stay.
        options: How hard it is tried, and what is too large.
        number: Of the inversion; it draws other batches and starts.

    Returns:
        None if no trigger of at most ``options.largest`` reached a level.

    Raises:
        UsageError: If all images have the same features.
        UnsafeInputError: If features are not finite.
        NothingSavedError: If the repair was told to stop.
    """
    encoder.eval().requires_grad_(False)
    under = _Autocast(encoder, autocast_dtype(options.optim.precision), repair.device)
    images, spec = repair.images, encoder.spec
    size, channels, seed = spec.image_size, spec.in_channels, repair.settings.seed + number
    center = clean_center(under, images, batch_size=options.optim.batch_size).to(repair.device)
    found = answers(
        under,
        images[: options.probe_images],
        center,
        # one start is a grey square, for which no probe is needed
        list(patch_probes(image_size=size, channels=channels, seed=seed))
        if options.starts > 1
        else [],
        report=lambda event: repair.leave(),
    )
    starts = patch_starts(
        found, image_size=size, channels=channels, count=options.starts, seed=seed
    )
    tried = [
        _search(repair, under, center, options, start=start, seed=seed * len(starts) + place)
        for place, start in enumerate(starts)
    ]
    encoder.requires_grad_(True)
    best = [min(level, key=lambda one: one.size) for level in zip(*tried, strict=True)]
    for level, inverted in zip(options.levels, best, strict=True):
        if inverted.reached and inverted.size <= options.largest:
            return Recovered(level=level, inverted=inverted)
    message = f"no trigger of at most {options.largest:g} of the image collapses the features"
    repair.report(Event(phase=_INVERSION, message=message))
    return None


def _search(
    repair: Repair,
    encoder: nn.Module,
    center: Float[Tensor, " feature"],
    options: ReceiveSettings,
    *,
    start: list[Tensor],
    seed: int,
) -> tuple[Inverted, ...]:
    schedule = Schedule(
        levels=options.levels, steps=options.steps, batch_size=options.inversion_batch, seed=seed
    )
    search = Search(PATCH, start, schedule, repair.device)
    while search.step < search.total:
        repair.leave()
        cosine = search.advance(encoder, repair.images, center)
        metrics = {"cosine": cosine, "size": search.size}
        repair.report(
            Event(
                phase=_INVERSION,
                done=search.step,
                total=search.total,
                unit="steps",
                metrics=metrics,
            )
        )
    return search.results()


class _Autocast(nn.Module):
    """An encoder whose forward alone is under autocast: backward passes must not be."""

    def __init__(self, encoder: Encoder, dtype: torch.dtype | None, device: torch.device) -> None:
        super().__init__()
        self.encoder, self._dtype, self._device = encoder, dtype, device

    def forward(self, images: Tensor) -> Tensor:
        with autocast(self._dtype, self._device):
            return self.encoder(images)
