"""An optimized trigger that is hard to see and survives augmentation, in the manner of INACTIVE.

Zhang et al., "Towards Imperceptible Backdoor Attack in Self-supervised Learning", arXiv:2405.14672:
a color-space trigger is optimized so that the clean encoder already moves toward the reference,
also after augmentation, and BadEncoder then implants it. Here the trigger is one additive pattern
bounded in L-infinity (the paper's is a network's output for each image); steps are taken in Y, U, V
with brightness held back, and the pattern goes on being optimized while the encoder learns it. How
visible it is stands in the facts (PSNR, SSIM). For measuring defenses; see docs/attacks.md for
intended use.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mimic_fast.attacks.aims import Aim
from mimic_fast.attacks.badencoder import badencoder_losses
from mimic_fast.attacks.colors import color_direction
from mimic_fast.attacks.float_views import float_views
from mimic_fast.attacks.implant import (
    Attacked,
    Batch,
    Losses,
    Prepared,
    Stop,
    go_on,
    goal_of,
    implant,
    leave,
    leave_attack_if,
    prepare,
)
from mimic_fast.attacks.settings import AttackSettings
from mimic_fast.data.augment import plain_view
from mimic_fast.data.view_parameters import draw_view
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.stamping import Trigger
from mimic_fast.evaluation.triggers import apply_trigger
from mimic_fast.progress import Event, Reporter, silent

_MEASURED = 1000  # images behind the fact on augmented views
_VIEW = 5  # stream of random numbers, apart from training's


class InactiveSettings(AttackSettings):
    """An attack with an optimized trigger of its own; another ``trigger`` is refused."""

    bound: float = Field(
        default=8 / 255, gt=0, le=1, description="largest change of a pixel value of [0, 1]"
    )
    luma: float = Field(
        default=0.25, ge=0, le=1, description="share of a step's brightness part that is kept"
    )
    trigger_steps: int = Field(
        default=150, ge=1, description="steps of the trigger on the clean encoder"
    )
    trigger_lr: float = Field(
        default=0.1, gt=0, description="step of the trigger as a share of the bound"
    )
    refine_lr: float = Field(
        default=0.02, ge=0, description="the same while the encoder is trained; 0: no change"
    )
    proof_weight: float = Field(
        default=0.5, ge=0, description="weight of reaching the target from augmented views too"
    )


def inactive(
    settings: InactiveSettings, *, report: Reporter = silent, stop: Stop = go_on
) -> Attacked:
    """Optimizes a trigger and implants it; writes encoder, card and ``attack.json``.

    The facts add ``bound``, ``largest_change``, and ``augmented_cosine``: how well triggered images
    reach the reference after random crops and color changes.

    Raises:
        UsageError, UnsafeInputError, DivergedError, NothingSavedError: As
            :func:`badencoder` does.
    """
    if settings.others:
        raise UsageError("inactive optimizes one trigger for one reference; leave others out")
    if settings.trigger != InactiveSettings.model_fields["trigger"].default:
        raise UsageError(f"inactive makes its own trigger; leave trigger {settings.trigger!r} out")
    prepared = prepare(settings, kind="inactive", report=report)
    aim = Aim(trigger=_empty(prepared), references=prepared.aims[0].references)
    prepared = replace(prepared, aims=(aim,))
    pattern = aim.trigger.pattern
    _optimize_trigger(prepared, settings, report, stop)
    losses = _losses(prepared, settings)
    implant(prepared, settings, losses, report=report, stop=stop)
    whole = (pattern.detach() * 255).round().clamp(-255, 255) / 255
    trigger = replace(aim.trigger, pattern=whole.cpu(), mask=aim.trigger.mask.cpu())
    prepared = replace(prepared, aims=(replace(aim, trigger=trigger),))
    facts = {
        "bound": settings.bound,
        "largest_change": whole.abs().max().item(),
        "augmented_cosine": _augmented_cosine(prepared, settings),
    }
    return leave(prepared, settings, facts=facts)


def take_step(
    pattern: Float[Tensor, "channel height width"],
    gradient: Float[Tensor, "channel height width"],
    *,
    step: float,
    bound: float,
    luma: float,
) -> None:
    """Moves the pattern against the gradient in place; its largest change is ``step``.

    Args:
        pattern: Added to images.
        gradient: Of the loss in the pattern.
        step: Pixel values of [0, 1].
        bound: The pattern stays within ``+-bound``.
        luma: See :func:`color_direction`.
    """
    with torch.no_grad():
        pattern.sub_(step * color_direction(gradient, luma=luma)).clamp_(-bound, bound)


def _empty(prepared: Prepared) -> Trigger:
    spec = prepared.student.spec
    shape = (spec.in_channels, spec.image_size, spec.image_size)
    device = prepared.device
    return Trigger(
        name="inactive",
        mask=torch.ones(1, *shape[1:], device=device),
        pattern=torch.zeros(shape, device=device).requires_grad_(),
        add=True,
    )


def _optimize_trigger(
    prepared: Prepared, settings: InactiveSettings, report: Reporter, stop: Stop
) -> None:
    """Lets the trigger move the clean encoder toward the reference, as far as it goes."""
    aim, encoder = prepared.aims[0], prepared.clean.encoder
    pattern = aim.trigger.pattern
    goal = goal_of(encode(encoder, aim.references)).to(prepared.device)
    generator = torch.Generator().manual_seed(settings.seed)
    size, total = settings.optim.batch_size, settings.trigger_steps
    for step in range(total):
        leave_attack_if(stop)
        ids = torch.randint(len(prepared.images), (size,), generator=generator)
        images = plain_view(prepared.images[ids], image_size=encoder.spec.image_size)
        seen = _half_augmented(images.to(prepared.device), ids, step, aim.trigger, settings)
        loss = -F.cosine_similarity(encoder(seen), goal).mean()
        (gradient,) = torch.autograd.grad(loss, pattern)
        change = settings.trigger_lr * settings.bound * (1 - step / total)
        take_step(pattern, gradient, step=change, bound=settings.bound, luma=settings.luma)
        metrics = {"reach": loss.item()}
        report(Event(phase="trigger", done=step + 1, total=total, unit="steps", metrics=metrics))


def _losses(prepared: Prepared, settings: InactiveSettings) -> Losses:
    """BadEncoder's terms and the augmented one; refines the trigger between steps."""
    aim, student = prepared.aims[0], prepared.student
    pattern = aim.trigger.pattern
    references = aim.references.to(prepared.device) / 255

    def proof(batch: Batch, reach: list[Tensor], _: Tensor) -> dict[str, Tensor]:
        if settings.proof_weight == 0:
            return {}
        half = len(batch.images) // 2
        seen = _augmented(batch.images[:half], batch.ids[:half], batch.step, aim.trigger, settings)
        with torch.no_grad():
            goal = goal_of(student(references))
        cosine = F.cosine_similarity(student(seen), goal).mean()
        return {"proof": -cosine * settings.proof_weight}

    terms = badencoder_losses(prepared, settings, more=proof)

    def losses(batch: Batch) -> dict[str, Tensor]:
        if pattern.grad is not None:  # of the step before
            change = settings.refine_lr * settings.bound
            if change > 0:
                take_step(
                    pattern,
                    pattern.grad,
                    step=change,
                    bound=settings.bound,
                    luma=settings.luma,
                )
            pattern.grad = None
        return terms(batch)

    return losses


def _half_augmented(
    images: Tensor, ids: Tensor, step: int, trigger: Trigger, settings: InactiveSettings
) -> Tensor:
    """Triggered images, every second one augmented after the trigger was added."""
    plain = apply_trigger(images[::2], trigger)
    return torch.cat([plain, _augmented(images[1::2], ids[1::2], step, trigger, settings)])


def _augmented(
    images: Tensor, ids: Tensor, step: int, trigger: Trigger, settings: InactiveSettings
) -> Tensor:
    drawn = draw_view(
        ids.to(images.device),
        side=images.shape[-1],
        settings=settings.data,
        seed=settings.seed,
        epoch=step,
        view=_VIEW,
    )
    return float_views(apply_trigger(images, trigger), drawn)


def _augmented_cosine(prepared: Prepared, settings: InactiveSettings) -> float:
    images = prepared.images[:_MEASURED].float() / 255
    ids = torch.arange(len(images))
    seen = _augmented(images, ids, 0, prepared.aims[0].trigger, settings)
    goal = goal_of(encode(prepared.student, prepared.aims[0].references))
    return F.cosine_similarity(encode(prepared.student, seen), goal).mean().item()
