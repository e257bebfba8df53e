"""Self-supervised pre-training of a small encoder: SimCLR (arXiv:2002.05709) or BYOL (2006.07733).

Attacks need a clean encoder to start from, evaluations a clean reference, and the demo both. Runs
in any number of processes, as ``purify`` does; the student-only floor in one.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor

from mimic_fast.config import (
    CLEAN_SET_FIELDS,
    DataSettings,
    EncoderSpec,
    Frozen,
    LossSettings,
    OptimSettings,
    RunSettings,
    Settings,
)
from mimic_fast.data.images import load_images
from mimic_fast.data.items import Source
from mimic_fast.data.sources import limits_of, open_source
from mimic_fast.distributed import (
    Processes,
    restarted,
    start,
    wait_for_all,
)
from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.export import STORED, export_encoder
from mimic_fast.errors import UsageError
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.recipe import settings_record, warn_ignored
from mimic_fast.self_supervised import train_byol, train_contrastive
from mimic_fast.training import Trained
from mimic_fast.watch import process_0_alone

if TYPE_CHECKING:
    from accelerate import Accelerator

_BYOL_FIELDS = ("byol_momentum", "byol_hidden")


class PretrainSettings(Frozen):
    """A pre-training run; sections mean what they mean in a purification."""

    seed: int = Field(default=0, ge=0, lt=2**31, description="seeds everything")
    method: Literal["simclr", "byol"] = Field(
        default="simclr", description="what is learned from two views of every image"
    )
    byol_momentum: float = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="decay of BYOL's target at the first step, rising to 1 at the last; the "
        "paper's 0.996 is for a thousand epochs",
    )
    byol_hidden: int | None = Field(
        default=None,
        ge=2,
        description="hidden width of BYOL's projector and predictor; None: four times the "
        "features, at most the paper's 4096",
    )
    spec: EncoderSpec = Field(description="the encoder to build")
    data: DataSettings = Field(default_factory=DataSettings, description="images and augmentation")
    loss: LossSettings = Field(
        default_factory=lambda: LossSettings(clone=0, attention_weight=0, contrastive=1),
        description="temperature of NT-Xent; width of the projection, BYOL's too",
    )
    optim: OptimSettings = Field(
        default_factory=lambda: OptimSettings(epochs=15, batch_size=256), description="optimizer"
    )
    dtype: Literal["fp32", "fp16"] = Field(default="fp32", description="number type of the file")
    run: RunSettings = Field(default_factory=RunSettings, description="output and resuming")


Kind = TypeVar("Kind", bound=PretrainSettings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """A pre-trained encoder and where it was written."""

    encoder: Encoder
    path: Path
    trained: Trained


def pretrain(
    settings: PretrainSettings,
    *,
    world: int = 1,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Pretrained:
    """Pre-trains on all images of the source and writes ``encoder.safetensors`` with its card.

    Under torchrun every process calls it, and process 0 writes.

    Args:
        settings: Everything.
        world: Processes the launcher started (its WORLD_SIZE).
        report: Told of all progress.
        stop: Polled between steps; true saves the state and leaves.

    Raises:
        UsageError: If the source or the output directory is missing from the settings, the latter
            holds a run that is not to be resumed, nothing would be minimized, or processes or
            engine do not fit.
        StoppedError: If ``stop`` told so; the state is saved.
        DivergedError: If training diverged.
        MachineError: If the output directory cannot be written.
    """
    out = settings.run.out
    if settings.data.source is None or out is None:
        raise UsageError("pre-training needs data.source (--data) and run.out (--out)")
    settings, started = begin(settings, world=world, report=report)
    _, pool, _ = read_pool(settings, report=report)
    encoder, trained = pretrain_on(
        pool, settings, started=started, report=report, stop=stop, phase="pretrain"
    )

    def write(_: Callable[[], bool]) -> None:
        card = {"kind": "pretrained", "settings": settings_record(settings)}
        export_encoder(encoder, out, key_map=None, card=card, dtype=STORED[settings.dtype])

    process_0_alone(write, processes=started[1], stop=stop)
    return Pretrained(encoder=encoder, path=out / "encoder.safetensors", trained=trained)


def begin(
    settings: Kind, *, world: int, report: Reporter = silent
) -> "tuple[Kind, tuple[Accelerator, Processes]]":
    """Starts the processes of a pre-training; the settings as they hold for it.

    Raises:
        UsageError: If the settings name no loss, or a run directory that is not to be resumed, or
            the processes, engine or device asked for are not what runs.
    """
    if settings.method == "byol" and settings.run.engine != "ddp":
        raise UsageError(
            f"run.engine {settings.run.engine!r} cuts the student, and method 'byol' "
            "averages a whole one; use run.engine 'ddp'"
        )
    if settings.method == "simclr" and settings.loss.contrastive == 0:
        raise UsageError("SimCLR has no other loss: loss.contrastive must be above 0")
    accelerator, processes = start(settings.run, settings.optim, expected_world=world)
    if restarted(processes):
        run = settings.run.model_copy(update={"resume": "auto"})
        settings = settings.model_copy(update={"run": run})
    out = settings.run.out
    if out is not None and settings.run.resume == "never" and (out / "metrics.jsonl").exists():
        raise UsageError(f"{out} already holds a run; use --resume auto or another --out")
    wait_for_all(processes)  # all have looked for an earlier run before one writes
    _warn_ignored(settings)
    message = f"{processes.world} process(es) on {processes.device.type}, {settings.method}"
    report(Event(phase="start", message=message))
    return settings, (accelerator, processes)


def _warn_ignored(settings: PretrainSettings) -> None:
    user = "pre-training"
    # All images are kept in memory.
    unread = (*CLEAN_SET_FIELDS, "cache", "cache_dir")
    warn_ignored(settings.data, unread, prefix="data", user=user)
    warn_ignored(settings.loss, ("teacher_view",), prefix="loss", user=user)
    if settings.loss.clone or settings.loss.attention_weight:
        warnings.warn("pre-training ignores loss.clone and loss.attention_weight", stacklevel=3)
    if settings.method == "simclr":
        warn_ignored(settings, _BYOL_FIELDS, prefix="", user="method 'simclr'")
        return
    warn_ignored(settings.loss, ("temperature",), prefix="loss", user="method 'byol'")
    if settings.loss.contrastive != 1:
        warnings.warn("method 'byol' ignores loss.contrastive", stacklevel=3)


def read_pool(
    settings: PretrainSettings, *, report: Reporter = silent
) -> tuple[Source, UInt8[Tensor, "image channel side side"], tuple[int, ...]]:
    """The source, its images decoded as training takes them, and the places of these in it.

    Raises:
        UnsafeInputError: If no image can be decoded.
    """
    assert settings.data.source is not None
    source = open_source(settings.data.source, limits=limits_of(settings.data), report=report)
    report(Event(phase="load", message=f"{len(source)} images of {source.name}"))
    pool, kept = load_images(
        source,
        range(len(source)),
        image_size=settings.spec.image_size,
        channels=settings.spec.in_channels,
        report=report,
    )
    return source, pool, kept


def pretrain_on(
    pool: UInt8[Tensor, "image channel side side"],
    settings: PretrainSettings,
    *,
    started: "tuple[Accelerator, Processes]",
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
    phase: str,
) -> tuple[Encoder, Trained]:
    """Pre-trains on decoded images as the settings say, every process on its share.

    Args:
        pool: The same in all processes.
        settings: What :func:`begin` gave.
        started: What it gave beside.
        report: Told of every step.
        stop: Polled every step.
        phase: Name in progress reports.

    Raises:
        UsageError: If the processes have different images, or a saved state is of another run.
        StoppedError: If ``stop`` told so; the state is saved.
    """
    spec = settings.spec
    loss = {"clone": 0.0, "attention_weight": 0.0}
    if settings.method == "byol":
        loss["contrastive"] = 1.0  # what asks for two views
    run = Settings(
        seed=settings.seed,
        data=settings.data,
        loss=settings.loss.model_copy(update=loss),
        optim=settings.optim,
        run=settings.run,
    )
    if settings.method == "simclr":
        return train_contrastive(
            spec, pool, settings=run, started=started, report=report, stop=stop, phase=phase
        )
    return train_byol(
        spec,
        pool,
        momentum=settings.byol_momentum,
        hidden=settings.byol_hidden,
        settings=run,
        started=started,
        report=report,
        stop=stop,
        phase=phase,
    )
