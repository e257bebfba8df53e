"""The adaptive attacker: one who expects the encoder to be distilled into a random student.

What a defender carries over is what the teacher says of clean images, so the backdoor must show
there. In the manner of the attacks that survive distillation (Ge et al., "Anti-Distillation
Backdoor Attacks", ACM MM 2021; SCAR, bi-level with a surrogate student), this is BadEncoder with a
stand-in student that is distilled on held-out clean images while the encoder is attacked, and

* the trigger's content is optimized, within its mask, to move clean encoder and stand-in toward the
  reference: what an encoder shares with its imitation, another imitation will share;
* ``survive``: after one unrolled step of the stand-in's distillation, triggered images head for the
  reference in the stand-in, seen from the plain images' mean; the gradient tells the encoder what
  to answer on clean images (first order: the weights before that step are constants);
* ``attention``: at every tap triggered images get the reference's attention map, so that attention
  transfer carries the backdoor along.

For measuring defenses; see docs/attacks.md for intended use.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from mimic_fast import ops
from mimic_fast.attacks.aims import Aim
from mimic_fast.attacks.badencoder import badencoder_losses
from mimic_fast.attacks.implant import (
    Attacked,
    Batch,
    Losses,
    Prepared,
    Stop,
    go_on,
    implant,
    leave,
    leave_attack_if,
    prepare,
)
from mimic_fast.attacks.settings import AttackSettings
from mimic_fast.attacks.stand_in import (
    StandIn,
    clean_views,
    distil_once,
    heading,
    heading_after_step,
    new_stand_in,
)
from mimic_fast.data.augment import plain_view
from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.taps import TappedEncoder, attention_free_taps, default_taps
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.stamping import Trigger
from mimic_fast.evaluation.triggers import apply_trigger
from mimic_fast.progress import Event, Reporter, silent

_MEASURED = 1000  # images behind the fact on the stand-in
_APART = 10**6  # added to the step: views of the unrolled step are not those of the distillation


class AdaptiveSettings(AttackSettings):
    """An adaptive attack; ``trigger`` gives the place and what its content starts from."""

    trigger: str = Field(
        default="random_patch", description="a trigger's name (docs/attacks.md) or its file"
    )
    bound: float = Field(
        default=16 / 255, gt=0, le=1, description="largest change by a trigger that is added"
    )
    trigger_steps: int = Field(
        default=150, ge=0, description="steps of the trigger on clean encoder and stand-in"
    )
    trigger_lr: float = Field(
        default=0.05, gt=0, description="a step of the trigger, pixel values of [0, 1]"
    )
    refine_lr: float = Field(
        default=0.005, ge=0, description="the same while the encoder is trained; 0: no change"
    )
    held_out: float = Field(
        default=0.2, gt=0, le=0.5, description="share of the shadow images for the stand-in"
    )
    stand_in_steps: int = Field(
        default=400, ge=1, description="steps of distilling the stand-in before the attack"
    )
    stand_in_lr: float = Field(default=3e-3, gt=0, description="its learning rate (AdamW)")
    survive_weight: float = Field(
        default=0.5, ge=0, description="weight of heading for the target in the stand-in"
    )
    survive_images: int = Field(
        default=32, ge=2, description="images in an unrolled step, and triggered ones after it"
    )
    unroll_lr: float = Field(default=0.5, gt=0, description="step size of the unrolled step")
    attention: float = Field(
        default=0.2, ge=0, description="weight of the attention maps, mean over taps"
    )


def adaptive(
    settings: AdaptiveSettings, *, report: Reporter = silent, stop: Stop = go_on
) -> Attacked:
    """Implants a backdoor made to survive distillation; writes encoder, card and ``attack.json``.

    The facts add ``stand_in_heading``: the cosine between triggered images' way from the plain mean
    and the reference's, in the stand-in, which never saw one.

    Raises:
        UsageError, UnsafeInputError, DivergedError, NothingSavedError: As
            :func:`badencoder` does.
    """
    if settings.others:
        raise UsageError("adaptive optimizes one trigger for one reference; leave others out")
    prepared, held_out = _split(prepare(settings, kind="adaptive", report=report), settings)
    stand_in = new_stand_in(
        prepared.student, held_out, data=settings.data, lr=settings.stand_in_lr, seed=settings.seed
    )
    size = settings.optim.batch_size
    for step in range(settings.stand_in_steps):
        leave_attack_if(stop)
        loss = distil_once(stand_in, prepared.clean.encoder, step=step, batch_size=size)
        done = Event(
            phase="stand-in",
            done=step + 1,
            total=settings.stand_in_steps,
            unit="steps",
            metrics={"clone": loss},
        )
        report(done)
    pattern = prepared.aims[0].trigger.pattern
    _optimize_trigger(prepared, stand_in, settings, report, stop)
    losses = _losses(prepared, stand_in, settings)
    implant(prepared, settings, losses, report=report, stop=stop)
    whole = ((pattern.detach() * 255).round() / 255).cpu()
    aim = prepared.aims[0]
    trigger = replace(aim.trigger, pattern=whole, mask=aim.trigger.mask.cpu())
    prepared = replace(prepared, aims=(replace(aim, trigger=trigger),))
    return leave(prepared, settings, facts=_facts(prepared, stand_in))


def _split(prepared: Prepared, settings: AdaptiveSettings) -> tuple[Prepared, Tensor]:
    """Shadow images for the attack and, apart from them, squares for the stand-in.

    The trigger becomes one that can be optimized.
    """
    cut = len(prepared.pool) - max(2, round(settings.held_out * len(prepared.pool)))
    if cut < settings.optim.batch_size:
        raise UsageError(
            f"optim.batch_size {settings.optim.batch_size} exceeds the {cut} shadow images that "
            "held_out leaves; give more images or a smaller batch"
        )
    aim = prepared.aims[0]
    pattern = aim.trigger.pattern.clone().to(prepared.device).requires_grad_()
    trigger = replace(
        aim.trigger, name="adaptive", pattern=pattern, mask=aim.trigger.mask.to(prepared.device)
    )
    rest = replace(
        prepared,
        pool=prepared.pool[:cut],
        images=prepared.images[:cut],
        kept=prepared.kept[:cut],
        aims=(Aim(trigger=trigger, references=aim.references),),
    )
    return rest, prepared.pool[cut:]


def _optimize_trigger(
    prepared: Prepared,
    stand_in: StandIn,
    settings: AdaptiveSettings,
    report: Reporter,
    stop: Stop,
) -> None:
    """Lets the trigger move the clean encoder and the stand-in toward the reference."""
    aim = prepared.aims[0]
    encoders = (prepared.clean.encoder, stand_in.student.eval())
    some = prepared.images[:_MEASURED]
    plain = [encode(one, some).to(prepared.device) for one in encoders]
    goals = [_mean_feature(one, aim.references).to(prepared.device) for one in encoders]
    generator = torch.Generator().manual_seed(settings.seed)
    size, total = settings.optim.batch_size, settings.trigger_steps
    for step in range(total):
        leave_attack_if(stop)
        ids = torch.randint(len(prepared.images), (size,), generator=generator)
        images = plain_view(prepared.images[ids], image_size=prepared.student.spec.image_size)
        seen = apply_trigger(images.to(prepared.device), aim.trigger)
        headings = [
            heading(one(seen), still, goal)
            for one, still, goal in zip(encoders, plain, goals, strict=True)
        ]
        loss = -torch.stack(headings).mean()
        (gradient,) = torch.autograd.grad(loss, aim.trigger.pattern)
        rate = settings.trigger_lr * (1 - step / total)
        _move(aim.trigger, gradient, step=rate, bound=settings.bound)
        metrics = {"encoder": headings[0].item(), "stand_in": headings[1].item()}
        report(Event(phase="trigger", done=step + 1, total=total, unit="steps", metrics=metrics))
    stand_in.student.train()


def _losses(prepared: Prepared, stand_in: StandIn, settings: AdaptiveSettings) -> Losses:
    """BadEncoder's terms, ``survive`` and ``attention``; the stand-in goes on learning between."""
    aim, student = prepared.aims[0], prepared.student
    pattern, size = aim.trigger.pattern, settings.survive_images
    references = aim.references.to(prepared.device) / 255
    attention_distance = _attention_distance(prepared, settings)

    def more(batch: Batch, _: list[Tensor], __: Tensor) -> dict[str, Tensor]:
        seen = apply_trigger(batch.images[:size], aim.trigger)
        terms: dict[str, Tensor] = {}
        if settings.survive_weight > 0:
            views = clean_views(stand_in, step=_APART + batch.step, count=size).to(seen)
            reached = heading_after_step(
                stand_in.student,
                student(views),
                views=views,
                triggered=seen,
                plain=batch.images[:size],
                references=references,
                lr=settings.unroll_lr,
            )
            terms["survive"] = -reached * settings.survive_weight
        if settings.attention > 0:
            terms["attention"] = attention_distance(seen) * settings.attention
        return terms

    terms = badencoder_losses(prepared, settings, more=more)

    def losses(batch: Batch) -> dict[str, Tensor]:
        if pattern.grad is not None:  # of the step before
            _move(aim.trigger, pattern.grad, step=settings.refine_lr, bound=settings.bound)
            pattern.grad = None
        student.eval()
        step = settings.stand_in_steps + batch.step
        distil_once(stand_in, student, step=step, batch_size=settings.optim.batch_size)
        return terms(batch)

    return losses


def _attention_distance(
    prepared: Prepared, settings: AdaptiveSettings
) -> Callable[[Tensor], Tensor]:
    """The distance of images' attention maps to the reference's in the clean encoder."""
    encoder = prepared.student
    taps = settings.encoder.taps or default_taps(encoder)
    flat = attention_free_taps(TappedEncoder(encoder, taps))
    tapped = TappedEncoder(encoder, tuple(tap for tap in taps if tap not in flat))
    reference = prepared.aims[0].references[:1].to(prepared.device) / 255
    with torch.no_grad():
        _, goals = TappedEncoder(prepared.clean.encoder, tapped.taps)(reference)

    def distance(images: Tensor) -> Tensor:
        _, maps = tapped(images)
        distances = [
            ops.attention_loss(own, goal.expand_as(own))
            for own, goal in zip(maps, goals, strict=True)
        ]
        return torch.stack(distances).mean()

    return distance


def _move(trigger: Trigger, gradient: Tensor, *, step: float, bound: float) -> None:
    """A signed step against the gradient, in place, inside what the trigger may be."""
    low, high = (-bound, bound) if trigger.add else (0.0, 1.0)
    with torch.no_grad():
        trigger.pattern.sub_(step * gradient.sign()).clamp_(low, high)


def _facts(prepared: Prepared, stand_in: StandIn) -> dict[str, float]:
    aim, student = prepared.aims[0], stand_in.student
    images = prepared.images[:_MEASURED].float() / 255
    seen = encode(student, apply_trigger(images, aim.trigger))
    goal = _mean_feature(student, aim.references)
    return {"stand_in_heading": heading(seen, encode(student, images), goal).item()}


def _mean_feature(encoder: Encoder, images: Tensor) -> Tensor:
    return encode(encoder, images).mean(0, keepdim=True)
