"""Self-supervised pre-training of a small encoder with SimCLR (arXiv:2002.05709), in one process.

Attacks need a clean encoder to start from, evaluations a clean reference, and the demo both.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor, nn

from mimic_fast.config import (
    CLEAN_SET_FIELDS,
    DataSettings,
    EncoderSpec,
    EvaluationSettings,
    Frozen,
    LossSettings,
    OptimSettings,
    RunSettings,
    Settings,
)
from mimic_fast.data.images import load_images
from mimic_fast.data.items import Source
from mimic_fast.data.loader import TrainingImages
from mimic_fast.data.sources import limits_of, open_source
from mimic_fast.distributed import start
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.export import STORED, export_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import UsageError
from mimic_fast.mutual_information.finished_parts import tensor_digest
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.recipe import settings_json, settings_record, warn_ignored
from mimic_fast.step import Student
from mimic_fast.training import Task, Trained, train


class PretrainSettings(Frozen):
    """A pre-training run; sections mean what they mean in a purification."""

    seed: int = Field(default=0, ge=0, lt=2**31, description="seeds everything")
    spec: EncoderSpec = Field(description="the encoder to build")
    data: DataSettings = Field(default_factory=DataSettings, description="images and augmentation")
    loss: LossSettings = Field(
        default_factory=lambda: LossSettings(clone=0, attention_weight=0, contrastive=1),
        description="temperature and projection of NT-Xent",
    )
    optim: OptimSettings = Field(
        default_factory=lambda: OptimSettings(epochs=15, batch_size=256), description="optimizer"
    )
    dtype: Literal["fp32", "fp16"] = Field(default="fp32", description="number type of the file")
    run: RunSettings = Field(default_factory=RunSettings, description="output and resuming")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """A pre-trained encoder and where it was written."""

    encoder: Encoder
    path: Path
    trained: Trained


def pretrain(
    settings: PretrainSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Pretrained:
    """Pre-trains on all images of the source and writes ``encoder.safetensors`` with its card.

    Raises:
        UsageError: If the source or the output directory is missing from the settings, the latter
            holds a run that is not to be resumed, or nothing would be minimized.
        StoppedError: If ``stop`` told so; the state is saved.
    """
    if settings.data.source is None or settings.run.out is None:
        raise UsageError("pre-training needs data.source (--data) and run.out (--out)")
    _, pool, _ = read_pool(settings, report=report)
    encoder, trained = pretrain_on(pool, settings, report=report, stop=stop, phase="pretrain")
    card = {"kind": "pretrained", "settings": settings_record(settings)}
    path = export_encoder(
        encoder, settings.run.out, key_map=None, card=card, dtype=STORED[settings.dtype]
    )
    return Pretrained(encoder=encoder, path=path, trained=trained)


def read_pool(
    settings: PretrainSettings, *, report: Reporter = silent
) -> tuple[Source, UInt8[Tensor, "image channel side side"], tuple[int, ...]]:
    """The source, its images decoded as training takes them, and the places of these in it.

    Raises:
        UsageError: If the settings name no loss, or a run directory that is not to be resumed.
        UnsafeInputError: If no image can be decoded.
    """
    assert settings.data.source is not None
    out = settings.run.out
    if settings.loss.contrastive == 0:
        raise UsageError("pre-training has no other loss: loss.contrastive must be above 0")
    if out is not None and settings.run.resume == "never" and (out / "metrics.jsonl").exists():
        raise UsageError(f"{out} already holds a run; use --resume auto or another --out")
    warn_ignored(settings.data, CLEAN_SET_FIELDS, prefix="data", user="pre-training")
    warn_ignored(settings.loss, ("teacher_view",), prefix="loss", user="pre-training")
    if settings.loss.clone or settings.loss.attention_weight:
        warnings.warn("pre-training ignores loss.clone and loss.attention_weight", stacklevel=2)
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
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
    phase: str,
) -> tuple[Encoder, Trained]:
    """Pre-trains on decoded images as the settings say; ``phase`` names it in reports."""
    return train_contrastive(
        settings.spec, pool, settings=_as_run(settings), report=report, stop=stop, phase=phase
    )


def train_contrastive(
    spec: EncoderSpec,
    pool: UInt8[Tensor, "image channel side side"],
    *,
    settings: Settings,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
    phase: str,
    on_epoch: Callable[[int, nn.Module], None] | None = None,
) -> tuple[Encoder, Trained]:
    """SimCLR on ``pool`` from random weights seeded by ``settings.seed``.

    Args:
        spec: The encoder to build.
        pool: Decoded images.
        settings: Augmentation, temperature, optimizer; the loss weights must be contrastive only.
        report: Told of every step.
        stop: Polled every step.
        phase: Name in progress reports.
        on_epoch: Called with the epoch's number and the student.
    """
    accelerator, processes = start(settings.run, settings.optim, expected_world=1)
    encoder = build_encoder(spec, seed=settings.seed)
    student = Student(
        TappedEncoder(encoder, default_taps(encoder)),
        projection=settings.loss.projection,
        seed=settings.seed,
    )
    student.to(processes.device)
    task = Task(
        student=student,
        teacher=None,
        layer_weights=(),
        images=TrainingImages(squares=pool),
        fingerprint={
            "kind": phase,
            "spec": spec.model_dump(mode="json"),
            "images": tensor_digest(pool),
            "settings": _identity(settings),
        },
        out=settings.run.out,
    )
    trained = train(
        task,
        settings=settings,
        accelerator=accelerator,
        processes=processes,
        report=report,
        stop=stop,
        phase=phase,
        on_epoch=on_epoch,
    )
    return encoder.to(device="cpu", dtype=torch.float32).eval(), trained


def _as_run(settings: PretrainSettings) -> Settings:
    return Settings(
        seed=settings.seed,
        data=settings.data,
        loss=settings.loss.model_copy(update={"clone": 0.0, "attention_weight": 0.0}),
        optim=settings.optim,
        run=settings.run,
    )


def _identity(settings: Settings) -> str:
    run = RunSettings(max_steps=settings.run.max_steps)
    decisive = {"run": run, "evaluation": EvaluationSettings()}
    return settings_json(settings.model_copy(update=decisive))
