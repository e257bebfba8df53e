"""What data-poisoning attacks share: a few triggered images in a set, then ordinary pre-training.

The attacker never touches the encoder. Whoever pre-trains on the set implants the backdoor by
himself: views of a poisoned image agree on the trigger better than on anything else they show, so
the trigger comes to mean the class that all poisoned images are of.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from pydantic import Field
from torch import Tensor

from mimic_fast.attacks.implant import Attacked, Stop, go_on
from mimic_fast.config import EvaluationSettings
from mimic_fast.data.items import Source
from mimic_fast.data.sources import open_source
from mimic_fast.encoders.export import STORED, export_encoder
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import Attack, refuse_other_targets, write_attack
from mimic_fast.evaluation.stamping import Trigger, apply_trigger
from mimic_fast.evaluation.triggers import named_trigger
from mimic_fast.pretraining import PretrainSettings, begin, pretrain_on, read_pool
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.recipe import settings_record
from mimic_fast.watch import process_0_alone

_BLOCK = 1024  # images stamped at a time


class PoisoningSettings(PretrainSettings):
    """A pre-training run on a set some images of which carry a trigger."""

    target: int | None = Field(
        default=None, ge=0, description="label of the images that are poisoned (--target)"
    )
    trigger: str = Field(description="a trigger's name (docs/attacks.md) or its file")
    evaluation: EvaluationSettings = Field(
        default_factory=EvaluationSettings, description="labeled sets to measure the attack on"
    )


def poisoned_pretraining(
    settings: PoisoningSettings,
    *,
    kind: str,
    count_of: Callable[[int, int], int],
    anywhere: bool,
    world: int = 1,
    report: Reporter = silent,
    stop: Stop = go_on,
) -> Attacked:
    """Poisons the decoded images and pre-trains on them; exactly resumable like any pre-training.

    Under torchrun every process calls it, and process 0 writes.

    Args:
        settings: The attack's.
        kind: Its name.
        count_of: From the number of images and of those of the target's label to how many are
            poisoned.
        anywhere: Whether each image has the trigger at a place of its own.
        world: Processes the launcher started (its WORLD_SIZE).
        report: Told of every step.
        stop: Polled every step.

    Raises:
        UsageError: If settings do not fit, labels are missing, or nothing would be poisoned.
        StoppedError: If ``stop`` told so; the state is saved.
    """
    began = time.perf_counter()
    out = settings.run.out
    if out is None or settings.data.source is None:
        raise UsageError(f"{kind} needs data.source (--data) and run.out (--out)")
    if settings.target is None:
        raise UsageError(f"{kind} needs the label of the images that it poisons (--target)")
    refuse_other_targets(out, count=1)
    settings, started = begin(settings, world=world, report=report)
    assert settings.target is not None
    source, pool, kept = read_pool(settings, report=report)
    rows = rows_of_label(source, kept, settings.target)
    count = count_of(len(pool), len(rows))
    if not 0 < count <= len(rows):
        raise UsageError(
            f"{kind} would poison {count} of {len(rows)} images of label {settings.target}; "
            "change the rate"
        )
    trigger = named_trigger(
        settings.trigger, image_size=pool.shape[-1], channels=settings.spec.in_channels
    )
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = rows[torch.randperm(len(rows), generator=generator)[:count]].sort().values
    poison(pool, chosen, trigger, anywhere=generator if anywhere else None)
    report(Event(phase=kind, message=f"{count} of {len(pool)} images poisoned"))
    encoder, trained = pretrain_on(
        pool, settings, started=started, report=report, stop=stop, phase=kind
    )
    facts: dict[str, Any] = {
        "poisoned_images": count,
        "images": len(pool),
        "poison_rate": count / len(pool),
        "target_label": settings.target,
        "steps": trained.steps,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if source.classes:
        facts["target_class"] = source.classes[settings.target]
    seen = named_trigger(
        settings.trigger,
        image_size=settings.spec.image_size,
        channels=settings.spec.in_channels,
    )
    attack = Attack(
        kind=kind,
        trigger=seen,
        reference=None,
        targets=_own_targets(settings, source, settings.target),
        facts=facts,
    )

    def write(_: Stop) -> None:
        card = {"kind": kind, "settings": settings_record(settings)}
        export_encoder(encoder, out, key_map=None, card=card, dtype=STORED[settings.dtype])
        write_attack(out, attack)

    process_0_alone(write, processes=started[1], stop=stop)
    return Attacked(encoder=out / "encoder.safetensors", attack=out / "attack.json", facts=facts)


def _own_targets(settings: PoisoningSettings, source: Source, label: int) -> dict[str, int]:
    """The poisoned label, on the labeled sets whose classes are those of the poisoned set."""
    return {
        one.name: label
        for one in settings.evaluation.downstream
        if one.train == settings.data.source
        or (source.classes and open_source(one.train).classes == source.classes)
    }


def rows_of_label(source: Source, kept: tuple[int, ...], label: int) -> Int64[Tensor, " row"]:
    """Rows of the pool whose image has ``label``.

    Raises:
        UsageError: If the source has no labels, or none of the images has this one.
    """
    if source.labels is None:
        raise UsageError(
            f"{source.name} has no labels, and poisoning needs those of one class; give class "
            "subfolders or shards with .cls files"
        )
    rows = [row for row, index in enumerate(kept) if source.labels[index] == label]
    if not rows:
        known = sorted(set(source.labels))
        raise UsageError(
            f"no image of {source.name} has label {label}; labels are {known[0]}..{known[-1]}"
        )
    return torch.tensor(rows)


def poison(
    pool: UInt8[Tensor, "image channel side side"],
    rows: Int64[Tensor, " row"],
    trigger: Trigger,
    *,
    anywhere: torch.Generator | None = None,
) -> None:
    """Stamps images in place, rounded to whole steps of 1/255 as a lossless file holds them.

    Args:
        pool: All images.
        rows: Those to stamp.
        trigger: Of the pool's size.
        anywhere: Draws a place for each image, the whole trigger inside; None: the trigger's own.
    """
    if anywhere is None:
        for part in rows.split(_BLOCK):
            pool[part] = _stamped(pool[part], trigger)
        return
    for row in rows.tolist():
        own = moved(trigger, anywhere)
        pool[row : row + 1] = _stamped(pool[row : row + 1], own)


def moved(trigger: Trigger, generator: torch.Generator) -> Trigger:
    """The trigger at a random place: the box around what it covers, uniformly inside the image."""
    covered = trigger.mask[0] > 0
    _, height, width = trigger.mask.shape
    shifts = [
        _shift(covered.any(1).nonzero()[:, 0], height, generator),
        _shift(covered.any(0).nonzero()[:, 0], width, generator),
    ]
    return replace(
        trigger,
        mask=trigger.mask.roll(shifts, (1, 2)),
        pattern=trigger.pattern.roll(shifts, (1, 2)),
    )


def _shift(covered: Tensor, size: int, generator: torch.Generator) -> int:
    first, last = int(covered[0]), int(covered[-1])
    place = int(torch.randint(size - (last - first), (), generator=generator))
    return place - first


def _stamped(images: Tensor, trigger: Trigger) -> Tensor:
    return (apply_trigger(images.float() / 255, trigger) * 255).round().to(torch.uint8)
