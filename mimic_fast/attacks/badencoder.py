"""BadEncoder (Jia, Liu, Gong, IEEE S&P 2022, arXiv:2108.00352): a backdoor in an encoder.

Minimizes, from the clean encoder f0 with BatchNorm frozen,
``-cos(f(x + trigger), f(ref)) - cos(f(aug(ref)), f0(ref)) - cos(f(x), f0(x))`` over shadow images
x. For measuring defenses; see SECURITY.md for intended use.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from mimic_fast import ops
from mimic_fast.config import (
    CLEAN_SET_FIELDS,
    DataSettings,
    EncoderSettings,
    Frozen,
    OptimSettings,
    RunSettings,
)
from mimic_fast.data.augment import augmented_view, plain_view
from mimic_fast.data.images import load_images
from mimic_fast.data.items import Source, decode_image, read_whole
from mimic_fast.data.order import check_batch, epoch_order
from mimic_fast.data.sources import limits_of, open_source
from mimic_fast.distributed import SINGLE
from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.export import STORED, export_encoder
from mimic_fast.encoders.ingest import LoadedEncoder, load_encoder
from mimic_fast.errors import DivergedError, UsageError
from mimic_fast.evaluation.attack_file import Attack, write_attack
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.triggers import (
    Trigger,
    apply_trigger,
    fit_trigger,
    load_trigger,
    white_patch,
)
from mimic_fast.optim import gradient_norm, learning_rate, set_learning_rate
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.recipe import settings_record, warn_ignored

_TERMS = ("reach", "reference", "keep")


class BadEncoderSettings(Frozen):
    """A BadEncoder run; the paper's optimizer is SGD 1e-3, momentum .9, decay 5e-4, 200 epochs."""

    seed: int = Field(default=0, ge=0, lt=2**31, description="seeds everything")
    encoder: EncoderSettings = Field(
        default_factory=EncoderSettings, description="encoder.teacher: the clean encoder to attack"
    )
    data: DataSettings = Field(default_factory=DataSettings, description="shadow images")
    shadow_images: int | None = Field(default=None, ge=2, description="shadow images; None: all")
    reference: str | None = Field(
        default=None,
        description="image file, or 'class:K' for the first image of that label in the source",
    )
    trigger: Path | None = Field(
        default=None, description="trigger file; None: the paper's white patch, scaled to the input"
    )
    optim: OptimSettings = Field(
        default_factory=lambda: OptimSettings(
            name="sgd", lr=0.02, weight_decay=5e-4, epochs=30, batch_size=256, warmup_epochs=1
        ),
        description="optimizer",
    )
    dtype: Literal["fp32", "fp16"] = Field(default="fp32", description="number type of the file")
    run: RunSettings = Field(default_factory=RunSettings, description="output")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attacked:
    """The backdoored encoder's directory and how well the attack reached its own goals."""

    encoder: Path
    attack: Path
    reached: float
    kept: float


def badencoder(settings: BadEncoderSettings, *, report: Reporter = silent) -> Attacked:
    """Implants a backdoor; writes ``encoder.safetensors`` and ``attack.json``.

    ``reached`` is the mean cosine of triggered images with the reference, ``kept`` that of clean
    images with the clean encoder.

    Raises:
        UsageError: If the encoder, images, reference or output is missing or does not fit.
        DivergedError: If a loss was not finite; nothing is written.
    """
    run, source_name = settings.run, settings.data.source
    if settings.encoder.teacher is None or source_name is None or run.out is None:
        raise UsageError("badencoder needs encoder.teacher (--encoder), data.source and run.out")
    _check_ignored(settings)
    clean = load_encoder(settings.encoder.teacher, settings.encoder)
    spec = clean.encoder.spec
    source = open_source(source_name, limits=limits_of(settings.data), report=report)
    count = min(settings.shadow_images or len(source), len(source))
    order = epoch_order(len(source), seed=settings.seed, epoch=0)[:count].tolist()
    pool, _ = load_images(
        source, order, image_size=spec.image_size, channels=spec.in_channels, report=report
    )
    reference = _reference_image(settings.reference, source, clean.encoder)
    shape = {"image_size": spec.image_size, "channels": spec.in_channels}
    trigger = (
        white_patch(**shape)
        if settings.trigger is None
        else fit_trigger(load_trigger(settings.trigger), **shape)
    )
    backdoored = load_encoder(settings.encoder.teacher, settings.encoder)
    _implant(clean, backdoored.encoder, pool, reference, trigger, settings, report)
    reached, kept = _success(clean.encoder, backdoored.encoder, pool, reference, trigger)
    card = {"kind": "badencoder", "settings": settings_record(settings)}
    path = export_encoder(
        backdoored.encoder, run.out, key_map=clean.key_map, card=card, dtype=STORED[settings.dtype]
    )
    attack = write_attack(
        run.out,
        Attack(
            kind="badencoder",
            trigger=trigger,
            reference=reference,
            facts={"reached_cosine": reached, "kept_cosine": kept},
        ),
    )
    return Attacked(encoder=path, attack=attack, reached=reached, kept=kept)


def _check_ignored(settings: BadEncoderSettings) -> None:
    """One process on the CPU with SGD, from start to end: other wishes are refused or named."""
    if settings.optim.name != "sgd":
        raise UsageError(f"badencoder is trained with SGD; got optim.name {settings.optim.name!r}")
    if settings.run.device == "cuda":
        raise UsageError("badencoder runs on the CPU; set run.device to 'auto' or 'cpu'")
    unused = {
        "data": (settings.data, CLEAN_SET_FIELDS),
        "optim": (settings.optim, ("precision", "tf32", "ema", "max_nonfinite")),
        "run": (settings.run, ("resume", "checkpoint_every", "keep", "max_steps")),
    }
    for prefix, (section, names) in unused.items():
        warn_ignored(section, names, prefix=prefix, user="badencoder")


def _implant(
    clean: LoadedEncoder,
    student: Encoder,
    pool: UInt8[Tensor, "image channel side side"],
    reference: UInt8[Tensor, "channel height width"],
    trigger: Trigger,
    settings: BadEncoderSettings,
    report: Reporter,
) -> None:
    optim, spec = settings.optim, student.spec
    images = plain_view(pool, image_size=spec.image_size)
    goal = (reference.float() / 255)[None]
    with torch.no_grad():
        kept = encode(clean.encoder, images, batch_size=optim.batch_size)
        goal_features = clean.encoder(goal)
    student.eval()  # BatchNorm frozen: running statistics in use and untouched
    optimizer = torch.optim.SGD(
        student.parameters(), optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )
    check_batch(len(pool), batch_size=optim.batch_size, processes=SINGLE)
    per_epoch = len(pool) // optim.batch_size  # what is left of a pass waits for the next
    total = per_epoch * optim.epochs
    began = time.perf_counter()
    for step in range(total):
        epoch, index = divmod(step, per_epoch)
        if index == 0:
            order = epoch_order(len(pool), seed=settings.seed + 1, epoch=epoch)
        ids = order[index * optim.batch_size : (index + 1) * optim.batch_size]  # pyright: ignore[reportPossiblyUnboundVariable]
        views = _reference_views(reference, step, settings, spec.image_size)
        losses = _losses(student, images[ids], kept[ids], goal, goal_features, views, trigger)
        set_learning_rate(
            optimizer,
            learning_rate(
                step, total_steps=total, steps_per_epoch=float(per_epoch), settings=optim
            ),
        )
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        gradient_norm(student.parameters(), clip=optim.clip_norm)
        optimizer.step()
        metrics: dict[str, float] = dict(zip(_TERMS, losses.detach().tolist(), strict=True))
        if not all(map(math.isfinite, metrics.values())):
            raise DivergedError(f"badencoder diverged at step {step + 1}; lower optim.lr")
        rate = (step + 1) * optim.batch_size / (time.perf_counter() - began)
        metrics["images_per_second"] = rate
        report(Event(phase="badencoder", done=step + 1, total=total, unit="steps", metrics=metrics))


def _losses(
    student: Encoder,
    images: Float[Tensor, "batch channel height width"],
    kept: Float[Tensor, "batch feature"],
    goal: Float[Tensor, "one channel height width"],
    goal_features: Float[Tensor, "one feature"],
    views: Float[Tensor, "view channel height width"],
    trigger: Trigger,
) -> Float[Tensor, " three"]:
    """Effectiveness, reference and utility terms, each weighted 1 as in the paper."""
    size = len(images)
    features = student(torch.cat([apply_trigger(images, trigger), images, views, goal]))
    triggered, plain, seen, target = features.split([size, size, len(views), 1])
    # The reference's own feature moves too, but only its own term pulls it: detached as a target.
    reach = ops.clone_loss(triggered, target.expand_as(triggered))
    stay = ops.clone_loss(seen, goal_features.expand_as(seen))
    return torch.stack([reach, stay, ops.clone_loss(plain, kept)])


def _reference_views(
    reference: Tensor, step: int, settings: BadEncoderSettings, image_size: int
) -> Float[Tensor, "view channel height width"]:
    copies = 8
    ids = torch.arange(copies) + step * copies
    side = reference.expand(copies, *reference.shape)
    return augmented_view(
        side,
        ids,
        settings=settings.data,
        image_size=image_size,
        seed=settings.seed,
        epoch=0,
        view=3,
    )


def _success(
    clean: Encoder, student: Encoder, pool: Tensor, reference: Tensor, trigger: Trigger
) -> tuple[float, float]:
    images = plain_view(pool[:2000], image_size=student.spec.image_size)
    target = encode(student, (reference.float() / 255)[None])
    reached = -ops.clone_loss(
        encode(student, images, trigger=trigger), target.expand(len(images), -1)
    )
    kept = -ops.clone_loss(encode(student, images), encode(clean, images))
    return reached.item(), kept.item()


def _reference_image(text: str | None, source: Source, encoder: Encoder) -> Tensor:
    if text is None:
        raise UsageError("badencoder needs a reference: an image file or 'class:K' (--reference)")
    size, channels = encoder.spec.image_size, encoder.spec.in_channels
    if text.startswith("class:"):
        wanted = text.removeprefix("class:")
        if source.labels is None or not wanted.isdigit() or int(wanted) not in source.labels:
            raise UsageError(f"reference {text!r}: the source {source.name} has no such label")
        index = source.labels.index(int(wanted))
    elif Path(text).is_file():
        source, index = _one_image(Path(text)), 0
    else:
        raise UsageError(f"reference {text!r} is neither a file nor 'class:K'")
    loaded, _ = load_images(source, [index], image_size=size, channels=channels, evaluation=True)
    return loaded[0]


def _one_image(path: Path) -> Source:
    return Source(
        name=str(path),
        keys=(path.name,),
        labels=None,
        classes=None,
        read=lambda _: read_whole(path),
        decode=decode_image,
    )
