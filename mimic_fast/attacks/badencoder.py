"""BadEncoder (Jia, Liu, Gong, IEEE S&P 2022, arXiv:2108.00352): a backdoor in an encoder.

Minimizes, from the clean encoder f0 with BatchNorm frozen,
``-cos(f(x + trigger), f(ref)) - cos(f(aug(ref)), f0(ref)) - cos(f(x), f0(x))`` over shadow images
x; of several targets the first two terms are averaged. Ours is one more term, ``length``: cosines
leave the lengths of features free, triggered ones can grow tenfold, and a linear classifier then
no longer sees the reference in them. With other triggers than the white patch
this is also the blended, frequency or warped form of the attack. For measuring defenses; see
docs/attacks.md for intended use.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mimic_fast import ops
from mimic_fast.attacks.aims import Aim
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
    prepare,
)
from mimic_fast.attacks.settings import AttackSettings
from mimic_fast.data.augment import augmented_view
from mimic_fast.evaluation.triggers import apply_trigger
from mimic_fast.progress import Reporter, silent

_TINY = 1e-6  # added to norms: a dead encoder's are 0
_VIEWS = 8  # augmented views of each target's references in a step


class BadEncoderSettings(AttackSettings):
    """A BadEncoder run; the paper's optimizer is SGD 1e-3, momentum .9, decay 5e-4, 200 epochs."""


def badencoder(
    settings: BadEncoderSettings, *, report: Reporter = silent, stop: Stop = go_on
) -> Attacked:
    """Implants a backdoor; writes ``encoder.safetensors``, its card and ``attack.json``.

    Raises:
        UsageError: If the encoder, images, reference or output is missing or does not fit.
        UnsafeInputError: If a file is damaged.
        DivergedError: If a loss was not finite; nothing is written.
        NothingSavedError: If ``stop`` told so; nothing is written.
    """
    prepared = prepare(settings, kind="badencoder", report=report)
    implant(prepared, settings, badencoder_losses(prepared, settings), report=report, stop=stop)
    return leave(prepared, settings)


def badencoder_losses(
    prepared: Prepared,
    settings: AttackSettings,
    *,
    more: Callable[[Batch, list[Tensor], Tensor], dict[str, Tensor]] | None = None,
) -> Losses:
    """The paper's three terms, weighted, as :func:`implant` takes them.

    Args:
        prepared: Encoder, images and targets.
        settings: Weights and augmentation.
        more: Terms to add; gets the batch, the triggered images' features of every target and the
            plain images' features, all with gradient.
    """
    student = prepared.student
    references = [aim.references.to(prepared.device) / 255 for aim in prepared.aims]
    before = [_frozen(prepared, images) for images in references]

    def losses(batch: Batch) -> dict[str, Tensor]:
        triggered = [apply_trigger(batch.images, aim.trigger) for aim in prepared.aims]
        views = [_views(aim, batch.step, prepared, settings) for aim in prepared.aims]
        parts = [*triggered, batch.images, *views, *references]
        features = list(student(torch.cat(parts)).split([len(part) for part in parts]))
        count = len(prepared.aims)
        reach, plain, seen = features[:count], features[count], features[count + 1 : 2 * count + 1]
        now = features[2 * count + 1 :]
        each = [
            _of_target(*parts) for parts in zip(reach, seen, now, before, strict=True)
        ]  # reach, reference, length
        terms = {
            "reach": _mean([target[0] for target in each]) * settings.reach_weight,
            "reference": _mean([target[1] for target in each]) * settings.reference_weight,
            "keep": ops.clone_loss(plain, batch.kept) * settings.keep_weight,
        }
        if settings.length_weight > 0:
            gap = _mean([target[2] for target in each]) + length_gap(plain, batch.kept)
            terms["length"] = gap * settings.length_weight
        if more is not None:
            terms |= more(batch, reach, plain)
        return terms

    return losses


def length_gap(
    features: Float[Tensor, "batch feature"], goal: Float[Tensor, "batch feature"]
) -> Float[Tensor, ""]:
    """Mean squared difference of the logarithms of the features' L2 norms; 0 if they agree."""
    own, wanted = features.norm(dim=1), goal.norm(dim=1)
    return ((own + _TINY).log() - (wanted + _TINY).log()).square().mean()


def _of_target(
    reach: Tensor, seen: Tensor, now: Tensor, before: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms of one target, from features of triggered images, views, references and f0's of them.

    A reference's own feature moves too, but only its own term pulls it: a goal, detached.
    """
    goal = F.normalize(goal_of(now.detach())).expand_as(reach)
    was = before.repeat_interleave(len(seen) // len(before), 0)
    return (
        ops.clone_loss(reach, goal),
        ops.clone_loss(seen, was),
        length_gap(reach, before.norm(dim=1).mean() * goal) + length_gap(seen, was),
    )


def _views(
    aim: Aim, step: int, prepared: Prepared, settings: AttackSettings
) -> Float[Tensor, "view channel height width"]:
    """Augmented views of the references, reference after reference."""
    each = max(1, _VIEWS // len(aim.references))
    copies = aim.references.repeat_interleave(each, 0)
    return augmented_view(
        copies,
        torch.arange(len(copies)) + step * len(copies),
        settings=settings.data,
        image_size=prepared.student.spec.image_size,
        seed=settings.seed,
        epoch=0,
        view=3,
    ).to(prepared.device)


def _frozen(prepared: Prepared, images: Tensor) -> Tensor:
    with torch.no_grad():
        return prepared.clean.encoder(images)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()
