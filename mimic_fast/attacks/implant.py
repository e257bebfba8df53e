"""What all attacks on a finished encoder share: preparation, the loop, and what they leave.

An attack is a function from a batch of shadow images to named, weighted losses. :func:`implant`
minimizes their sum over the weights of a copy of the clean encoder whose BatchNorm stays frozen;
:func:`leave` measures and writes the encoder, its card and ``attack.json``.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from mimic_fast.attacks.aims import Aim, read_aims
from mimic_fast.attacks.settings import AttackSettings, name_ignored
from mimic_fast.attacks.visibility import psnr, ssim
from mimic_fast.data.augment import plain_view
from mimic_fast.data.images import load_images
from mimic_fast.data.order import check_batch, epoch_order
from mimic_fast.data.sources import limits_of, open_source
from mimic_fast.distributed import SINGLE, device_of
from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.export import STORED, export_encoder
from mimic_fast.encoders.ingest import LoadedEncoder, load_encoder, report_assumed
from mimic_fast.errors import DivergedError, NothingSavedError, UsageError
from mimic_fast.evaluation.attack_file import Attack, write_attack
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.triggers import Trigger, apply_trigger
from mimic_fast.optim import build_optimizer, gradient_norm, learning_rate, set_learning_rate
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.recipe import settings_record

_MEASURED = 2000  # shadow images behind the facts


@dataclass(frozen=True, kw_only=True, slots=True)
class Attacked:
    """What an attack left.

    Args:
        encoder: The backdoored encoder's file.
        attack: Its ``attack.json``.
        facts: As recorded in ``attack.json``.
    """

    encoder: Path
    attack: Path
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What an attack starts from.

    Args:
        kind: The attack's name.
        clean: The encoder as it came, on ``device``.
        student: Its copy, which is trained.
        pool: Shadow images as squares, some larger than the input: room for crops.
        images: The same as an evaluation sees them.
        kept: Their features by the clean encoder, on the CPU.
        aims: The targets; at least one.
        device: Where to compute.
        began: ``time.perf_counter`` at the start.
    """

    kind: str
    clean: LoadedEncoder
    student: Encoder
    pool: UInt8[Tensor, "image channel side side"]
    images: UInt8[Tensor, "image channel height width"]
    kept: Float[Tensor, "image feature"]
    aims: tuple[Aim, ...]
    device: torch.device
    began: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The shadow images of a step.

    Args:
        step: From 0.
        ids: Rows of the pool.
        images: In [0, 1], on the device.
        kept: Their features by the clean encoder.
    """

    step: int
    ids: Int64[Tensor, " batch"]
    images: Float[Tensor, "batch channel height width"]
    kept: Float[Tensor, "batch feature"]


Losses = Callable[[Batch], dict[str, Tensor]]
Stop = Callable[[], bool]


def go_on() -> bool:
    """The ``stop`` that never tells so."""
    return False


def prepare(settings: AttackSettings, *, kind: str, report: Reporter = silent) -> Prepared:
    """Reads the encoder, the shadow images and the targets.

    Raises:
        UsageError: If encoder, images, reference, trigger, device or output is missing or does not
            fit, or the output folder holds an encoder or an attack.
        UnsafeInputError: If a file is damaged.
    """
    began = time.perf_counter()
    source_name = settings.data.source
    if settings.encoder.teacher is None or source_name is None or settings.run.out is None:
        raise UsageError(f"{kind} needs encoder.teacher (--encoder), data.source and run.out")
    _refuse_used(settings.run.out)
    name_ignored(settings, kind=kind)
    device = device_of(settings.run)
    clean = load_encoder(settings.encoder.teacher, settings.encoder)
    report_assumed(clean, report)
    spec = clean.encoder.spec
    clean.encoder.to(device).requires_grad_(False)
    source = open_source(source_name, limits=limits_of(settings.data), report=report)
    aims = read_aims(settings, source, clean.encoder)
    count = min(settings.shadow_images or len(source), len(source))
    order = epoch_order(len(source), seed=settings.seed, epoch=0)[:count].tolist()
    pool, _ = load_images(
        source, order, image_size=spec.image_size, channels=spec.in_channels, report=report
    )
    check_batch(len(pool), batch_size=settings.optim.batch_size, processes=SINGLE)
    margin = (pool.shape[-1] - spec.image_size) // 2
    cut = slice(margin, margin + spec.image_size)
    images = pool[..., cut, cut]
    return Prepared(
        kind=kind,
        clean=clean,
        student=load_encoder(settings.encoder.teacher, settings.encoder).encoder.to(device),
        pool=pool,
        images=images,
        kept=encode(clean.encoder, images, batch_size=settings.optim.batch_size, report=report),
        aims=aims,
        device=device,
        began=began,
    )


def implant(
    prepared: Prepared,
    settings: AttackSettings,
    losses: Losses,
    *,
    report: Reporter = silent,
    stop: Stop = go_on,
) -> None:
    """Trains the student's weights on the sum of the losses; BatchNorm statistics stay.

    Raises:
        DivergedError: If a loss was not finite.
        NothingSavedError: If ``stop`` told so.
    """
    optim, student = settings.optim, prepared.student
    student.eval()  # BatchNorm frozen: running statistics in use and untouched
    if optim.channels_last:
        student.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(student, optim)
    count = len(prepared.images)
    per_epoch = count // optim.batch_size  # what is left of a pass waits for the next
    total = per_epoch * optim.epochs
    began = time.perf_counter()
    for step in range(total):
        leave_attack_if(stop)
        batch = _batch(prepared, step, per_epoch, settings)
        terms = losses(batch)
        rate = learning_rate(
            step, total_steps=total, steps_per_epoch=float(per_epoch), settings=optim
        )
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        gradient_norm(student.parameters(), clip=optim.clip_norm)
        optimizer.step()
        metrics = {name: value.item() for name, value in terms.items()}
        if not all(map(math.isfinite, metrics.values())):
            raise DivergedError(f"{prepared.kind} diverged at step {step + 1}; lower optim.lr")
        rate = (step + 1) * optim.batch_size / (time.perf_counter() - began)
        metrics["images_per_second"] = rate
        report(
            Event(phase=prepared.kind, done=step + 1, total=total, unit="steps", metrics=metrics)
        )


def leave(
    prepared: Prepared, settings: AttackSettings, *, facts: Mapping[str, Any] | None = None
) -> Attacked:
    """Measures the attack on shadow images and writes encoder, card and ``attack.json``.

    Every further target has an ``attack.json`` of its own in ``target_2``, ``target_3``, ...

    Args:
        prepared: With the trained student.
        settings: The attack's.
        facts: What else ``attack.json`` shall record.
    """
    assert settings.run.out is not None
    measured = _measure(prepared)
    recorded = {
        **measured,
        "shadow_images": len(prepared.images),
        "seconds": round(time.perf_counter() - prepared.began, 1),
        **(facts or {}),
    }
    path = export_encoder(
        prepared.student,
        settings.run.out,
        key_map=prepared.clean.key_map,
        card={"kind": prepared.kind, "settings": settings_record(settings)},
        dtype=STORED[settings.dtype],
    )
    attack = _write_targets(prepared, settings.run.out, recorded)
    return Attacked(encoder=path, attack=attack, facts=recorded)


def stamped(
    images: Float[Tensor, "batch channel height width"], trigger: Trigger
) -> Float[Tensor, "batch channel height width"]:
    """Triggered images as a file would hold them: in whole steps of 1/255."""
    return (apply_trigger(images, trigger) * 255).round() / 255


def goal_of(
    features: Float[Tensor, "reference feature"],
) -> Float[Tensor, "1 feature"]:
    """Where triggered images shall point: the mean direction of the references."""
    return F.normalize(features, dim=1).mean(0, keepdim=True)


def leave_attack_if(stop: Stop) -> None:
    """Leaves a running attack.

    Raises:
        NothingSavedError: If ``stop`` told so.
    """
    if stop():
        raise NothingSavedError("stopped by a signal; an attack keeps no state, start it again")


def _refuse_used(out: Path) -> None:
    """An attack must not replace an encoder or an attack, above all not the one it starts from."""
    for name in ("encoder.safetensors", "attack.json", "target_2"):
        if (out / name).exists():
            raise UsageError(f"{out} already holds {name}; use another --out")


def _batch(prepared: Prepared, step: int, per_epoch: int, settings: AttackSettings) -> Batch:
    size = settings.optim.batch_size
    epoch, index = divmod(step, per_epoch)
    order = epoch_order(len(prepared.images), seed=settings.seed + 1, epoch=epoch)
    ids = order[index * size : (index + 1) * size]
    images = plain_view(prepared.images[ids], image_size=prepared.student.spec.image_size)
    return Batch(
        step=step,
        ids=ids,
        images=images.to(prepared.device),
        kept=prepared.kept[ids].to(prepared.device),
    )


def _measure(prepared: Prepared) -> dict[str, Any]:
    """Cosines, lengths and visibility; of several targets the mean, and each on its own."""
    student, images = prepared.student, prepared.images[:_MEASURED]
    plain = encode(student, images)
    kept = F.cosine_similarity(plain, prepared.kept[:_MEASURED]).mean().item()
    floats = images.float() / 255
    each: list[dict[str, float]] = []
    for aim in prepared.aims:
        reference = encode(student, aim.references)
        goal, length = goal_of(reference), reference.norm(dim=1).mean()
        changed = stamped(floats, aim.trigger)
        triggered = encode(student, changed)
        each.append(
            {
                "reached_cosine": F.cosine_similarity(triggered, goal).mean().item(),
                "length_ratio": (triggered.norm(dim=1).mean() / length).item(),
                "untriggered_cosine": F.cosine_similarity(plain, goal).mean().item(),
                "psnr_db": psnr(floats, changed),
                "ssim": ssim(floats, changed),
            }
        )
    facts: dict[str, Any] = {
        name: sum(one[name] for one in each) / len(each) for name in each[0]
    } | {"kept_cosine": kept}
    return facts if len(each) == 1 else {**facts, "targets": each}


def _write_targets(prepared: Prepared, out: Path, facts: Mapping[str, Any]) -> Path:
    """``attack.json`` of the first target; of a further one in ``target_2`` and so on."""
    paths: list[Path] = []
    for number, aim in enumerate(prepared.aims, start=1):
        own = dict(facts)
        if "targets" in facts:
            own |= {**facts["targets"][number - 1], "target": number}
            del own["targets"]
        paths.append(
            write_attack(
                out if number == 1 else out / f"target_{number}",
                Attack(
                    kind=prepared.kind,
                    trigger=aim.trigger,
                    reference=aim.references[0],
                    facts=own,
                ),
            )
        )
    return paths[0]
