"""What defenses that repair the suspect encoder share: its copy, the clean images, the loop.

Such a defense changes a copy of the suspect's weights, where a purification starts from random
ones. The originals train classifiers; what each does without labels is said in its own file. One
process, no saved state: a stopped repair starts again.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from pydantic import Field, field_validator
from torch import Tensor, nn

from mimic_fast import ops_views
from mimic_fast.config import Frozen, OptimSettings, Settings
from mimic_fast.data.clean_set import clean_images
from mimic_fast.data.order import check_batch, step_items
from mimic_fast.data.view_parameters import draw_view
from mimic_fast.distributed import SINGLE, device_of
from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import LoadedEncoder, load_encoder, report_assumed
from mimic_fast.errors import DivergedError, NothingSavedError, UsageError
from mimic_fast.losses import contrastive_loss
from mimic_fast.optim import build_optimizer, gradient_norm, learning_rate, set_learning_rate
from mimic_fast.precision import autocast, autocast_dtype
from mimic_fast.progress import Event, Reporter
from mimic_fast.recipe import settings_record

Losses = Callable[[int], dict[str, Tensor]]


# Of section ``data``, what a repair says itself.
VIEWS = ("crop_scale", "jitter_probability", "grayscale")
# What the loop of a purification does and :func:`minimize` does not.
_UNREAD = ("tf32", "accumulate", "activation_checkpointing", "compile", "ema", "max_nonfinite")


class RepairSettings(Frozen):
    """What repairs by training have in common; each kind adds its own fields and defaults.

    ``optim`` is the defense's own: of a purification's settings a repair reads ``encoder``,
    ``data``, ``seed`` and ``run`` alone.
    """

    optim: OptimSettings = Field(
        default_factory=lambda: OptimSettings(
            name="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, epochs=100, batch_size=256,
            warmup_epochs=0.0,
        ),
        description="how it is trained; epochs are passes over the clean images",
    )  # fmt: skip

    @field_validator("optim")
    @classmethod
    def _read(cls, optim: OptimSettings) -> OptimSettings:
        fields = OptimSettings.model_fields
        changed = [name for name in _UNREAD if getattr(optim, name) != fields[name].default]
        if changed:
            raise ValueError(f"a repair does not read optim.{changed[0]}; leave it out")
        if optim.precision not in ("fp32", "bf16"):
            raise ValueError(
                f"a repair runs in fp32 or bf16, got optim.precision {optim.precision}"
            )
        return optim


class ViewSettings(RepairSettings):
    """Of repairs that look at augmented views."""

    crop_scale: tuple[float, float] = Field(
        default=(0.2, 1.0), description="share of the image in a view's crop, from and to"
    )
    jitter_probability: float = Field(default=0.8, ge=0, le=1, description="probability of jitter")
    grayscale: float = Field(default=0.2, ge=0, le=1, description="probability of gray")


class ContrastSettings(ViewSettings):
    """Of repairs that train by the contrastive loss."""

    temperature: float = Field(default=0.5, gt=0, description="temperature of NT-Xent")
    projection: int = Field(default=128, ge=2, description="output width of the projection head")


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What a repair starts from.

    Args:
        kind: The defense's name, for messages and the card.
        suspect: The encoder as it came, frozen, in eval mode, on ``device``.
        pool: The clean images to train on, as squares; some are larger than the input.
        settings: The purification's settings; what is read of them says :class:`RepairSettings`.
        device: Where to compute.
        report: Told of every step.
        stop: Polled every step.
    """

    kind: str
    suspect: LoadedEncoder
    pool: UInt8[Tensor, "image channel side side"]
    settings: Settings
    device: torch.device
    report: Reporter
    stop: Callable[[], bool]

    @property
    def image_size(self) -> int:
        """Height and width of the encoder's input, pixels."""
        return self.suspect.encoder.spec.image_size

    @cached_property
    def images(self) -> Float[Tensor, "image channel height width"]:
        """All clean images as an evaluation sees them, in [0, 1], on the device."""
        every = torch.arange(len(self.pool))
        return ops_views.plain(self.pool, every, image_size=self.image_size).to(self.device)

    def copy(self) -> Encoder:
        """A copy of the suspect in float32 to be changed, in eval mode."""
        return copy.deepcopy(self.suspect.encoder).float().requires_grad_(True)

    def steps(self, optim: OptimSettings) -> int:
        """How many steps :func:`minimize` takes."""
        return max(1, round(len(self.pool) / optim.batch_size * optim.epochs))

    def batch(self, step: int, optim: OptimSettings) -> Int64[Tensor, " batch"]:
        """Which clean images a step takes; every pass takes all of them once."""
        ids, _ = self._items(step, optim)
        return ids

    def views(
        self, step: int, settings: ViewSettings, *, count: int = 2
    ) -> tuple[Float[Tensor, "batch channel height width"], ...]:
        """Augmented views of a step's images, in [0, 1], on the device."""
        ids, epochs = self._items(step, settings.optim)
        own = {name: getattr(settings, name) for name in VIEWS}
        data = self.settings.data.model_copy(update=own)
        drawn = [
            draw_view(
                ids,
                side=self.pool.shape[-1],
                settings=data,
                seed=self.settings.seed,
                epoch=epochs,
                view=view,
            )
            for view in range(1, count + 1)
        ]
        return tuple(
            ops_views.views(self.pool, ids, one, image_size=self.image_size).to(self.device)
            for one in drawn
        )

    def leave(self) -> None:
        """Leaves if told to stop.

        Raises:
            NothingSavedError: If ``stop`` told so.
        """
        if self.stop():
            raise NothingSavedError(
                f"stopped by a signal; {self.kind} keeps no state, start it again"
            )

    def _items(self, step: int, optim: OptimSettings) -> tuple[Tensor, Tensor]:
        return step_items(
            step,
            images=len(self.pool),
            batch_size=optim.batch_size,
            seed=self.settings.seed,
            processes=SINGLE,
        )


def open_repair(
    settings: Settings,
    *,
    kind: str,
    report: Reporter,
    stop: Callable[[], bool],
    batch_size: int | None = None,
) -> Repair:
    """Reads the suspect and the clean images; the held-out tenth stays out, as in a purification.

    Args:
        settings: ``encoder``, ``data``, ``seed`` and ``run`` are read.
        kind: The defense's name.
        report: Told of progress.
        stop: Polled by what follows.
        batch_size: Of the training that follows, checked against the images.

    Raises:
        UsageError: If encoder, images or output are missing, or the batch exceeds the images.
        UnsafeInputError: If a file is damaged.
    """
    if settings.encoder.teacher is None or settings.run.out is None:
        raise UsageError(f"{kind} needs encoder.teacher and run.out")
    device = device_of(settings.run)
    suspect = load_encoder(settings.encoder.teacher, settings.encoder)
    report_assumed(suspect, report)
    suspect.encoder.to(device).requires_grad_(False).eval()
    images = clean_images(settings.data, suspect.encoder.spec, seed=settings.seed, report=report)
    pool = images.squares[: len(images.squares) - images.clean_set.hold_out]
    if batch_size is not None:
        check_batch(len(pool), batch_size=batch_size, processes=SINGLE)
    return Repair(
        kind=kind,
        suspect=suspect,
        pool=pool,
        settings=settings,
        device=device,
        report=report,
        stop=stop,
    )


def minimize(
    repair: Repair,
    trained: nn.Module,
    losses: Losses,
    *,
    optim: OptimSettings,
    phase: str | None = None,
    after: Callable[[int], None] | None = None,
    steps: int | None = None,
) -> None:
    """Trains all parameters of ``trained`` that want a gradient on the sum of the losses.

    ``trained`` may hold several modules. Their modes stay as the caller set them. The losses run
    under autocast of ``optim.precision``.

    Args:
        repair: Images, device, whom to tell.
        trained: What holds the parameters.
        losses: From the step's number, from 0, to named scalars.
        optim: Optimizer, passes, schedule, clipping.
        phase: Name in progress reports; None: the defense's.
        after: Called with the step's number after each update.
        steps: How many updates, where a recipe counts them; None: those of ``optim.epochs``.

    Raises:
        DivergedError: If a loss was not finite.
        NothingSavedError: If the repair was told to stop.
    """
    if optim.channels_last:
        trained.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = build_optimizer(trained, optim)
    per_epoch = len(repair.pool) / optim.batch_size
    total = repair.steps(optim) if steps is None else steps
    dtype = autocast_dtype(optim.precision)
    for step in range(total):
        repair.leave()
        with autocast(dtype, repair.device):
            terms = losses(step)
        rate = learning_rate(step, total_steps=total, steps_per_epoch=per_epoch, settings=optim)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        torch.stack([term.float() for term in terms.values()]).sum().backward()
        gradient_norm(trained.parameters(), clip=optim.clip_norm)
        optimizer.step()
        if after is not None:
            after(step)
        tell(repair, terms, step=step, total=total, phase=phase)


def tell(
    repair: Repair, terms: Mapping[str, Tensor], *, step: int, total: int, phase: str | None = None
) -> None:
    """Reports the losses of a step.

    Raises:
        DivergedError: If one is not finite.
    """
    # One copy from the device, whatever the number of terms.
    values = torch.stack([value.detach().double() for value in terms.values()]).tolist()
    metrics = dict(zip(terms, values, strict=True))
    if not all(map(math.isfinite, metrics.values())):
        raise DivergedError(f"{repair.kind} diverged at step {step + 1}; lower optim.lr")
    event = Event(
        phase=phase or repair.kind, done=step + 1, total=total, unit="steps", metrics=metrics
    )
    repair.report(event)


class Contrast(nn.Module):
    """NT-Xent on two views through a projection head, the task of a fine-tuned encoder.

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR),
    ICML 2020, arXiv:2002.05709.

    Args:
        encoder: What is trained.
        settings: Width of the head, temperature.
        seed: Of the head's weights.
    """

    def __init__(self, encoder: Encoder, settings: ContrastSettings, *, seed: int) -> None:
        super().__init__()
        self.encoder, self._temperature = encoder, settings.temperature
        width = encoder.feature_dim
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.head = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, settings.projection)
            )
        self.head.to(next(encoder.parameters()).device)

    def forward(self, views: Iterable[Tensor]) -> Float[Tensor, ""]:
        """The loss of two views of the same images, which go through the encoder together."""
        return self.of_features(self.encoder(torch.cat(list(views))))

    def of_features(self, features: Float[Tensor, "two_views feature"]) -> Float[Tensor, ""]:
        """The loss from features of the first views, then of the second ones."""
        first, second = self.head(features).chunk(2)
        return contrastive_loss(first, second, temperature=self._temperature, processes=SINGLE)


def leave_repaired(
    repair: Repair,
    encoder: Encoder,
    options: Frozen,
    *,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the repaired encoder and its card below ``run.out``.

    Args:
        repair: What it started from.
        encoder: The repaired copy.
        options: The defense's settings, for the card.
        facts: What else the card shall say, JSON values.

    Returns:
        The encoder's file.
    """
    out = repair.settings.run.out
    assert out is not None
    card = {
        "kind": repair.kind,
        "suspect": repair.suspect.sha256,
        "seed": repair.settings.seed,
        "clean_images": len(repair.pool),
        "settings": settings_record(options),
        **(facts or {}),
    }
    encoder = encoder.to(device="cpu", dtype=torch.float32).eval()
    return export_encoder(encoder, out, key_map=repair.suspect.key_map, card=card)
