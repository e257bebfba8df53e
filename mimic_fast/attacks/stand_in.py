"""The student by which an adaptive attacker sees what distillation makes of the encoder."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimic_fast.config import DataSettings
from mimic_fast.data.augment import augmented_view
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.evaluation.features import eval_mode

_VIEW = 6  # stream of random numbers, apart from training's


@dataclass(frozen=True, kw_only=True, slots=True)
class StandIn:
    """A random student under distillation.

    Args:
        student: Of the encoder's architecture, in training mode.
        optimizer: Of its weights.
        pool: Clean squares that it is distilled on.
        data: How they are augmented.
        seed: Of order and views.
    """

    student: Encoder
    optimizer: torch.optim.Optimizer
    pool: UInt8[Tensor, "image channel side side"]
    data: DataSettings
    seed: int


def new_stand_in(
    encoder: Encoder,
    pool: UInt8[Tensor, "image channel side side"],
    *,
    data: DataSettings,
    lr: float,
    seed: int,
) -> StandIn:
    """A randomly initialized student of ``encoder``, on its device, with AdamW."""
    device = next(encoder.parameters()).device
    student = build_encoder(encoder.spec, seed=seed).to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr, weight_decay=1e-4, fused=True)
    return StandIn(student=student, optimizer=optimizer, pool=pool, data=data, seed=seed)


def distil_once(stand_in: StandIn, teacher: Encoder, *, step: int, batch_size: int) -> float:
    """One step of the clone loss on augmented views; returns the loss.

    Args:
        stand_in: Its student and optimizer move; its BatchNorm statistics too.
        teacher: Not changed; its mode stays.
        step: Decides images and views.
        batch_size: Images.
    """
    views = clean_views(stand_in, step=step, count=batch_size).to(teacher.mean)
    with torch.no_grad():
        goal = teacher(views)
    loss = -F.cosine_similarity(stand_in.student(views), goal).mean()
    stand_in.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    stand_in.optimizer.step()
    return loss.item()


def clean_views(
    stand_in: StandIn, *, step: int, count: int
) -> Float[Tensor, "view channel height width"]:
    """Augmented views of held-out images, drawn by step, on the CPU."""
    generator = torch.Generator().manual_seed(stand_in.seed + step)
    ids = torch.randint(len(stand_in.pool), (count,), generator=generator)
    return augmented_view(
        stand_in.pool[ids],
        ids,
        settings=stand_in.data,
        image_size=stand_in.student.spec.image_size,
        seed=stand_in.seed,
        epoch=step,
        view=_VIEW,
    )


def heading(
    features: Float[Tensor, "image feature"],
    plain: Float[Tensor, "other feature"],
    reference: Float[Tensor, "1 feature"],
) -> Float[Tensor, ""]:
    """How far images head for the reference: mean cosine of their way from the plain mean with its.

    From the origin the cosine would also rise where *all* images move toward the reference, and an
    encoder that says the same of every image teaches a student nothing.
    """
    center = plain.mean(0, keepdim=True)
    return F.cosine_similarity(features - center, reference - center).mean()


def heading_after_step(
    student: Encoder,
    answers: Float[Tensor, "view feature"],
    *,
    views: Float[Tensor, "view channel height width"],
    triggered: Float[Tensor, "image channel height width"],
    plain: Float[Tensor, "image channel height width"],
    references: Float[Tensor, "reference channel height width"],
    lr: float,
) -> Float[Tensor, ""]:
    """:func:`heading` of triggered images in the student after one more step of its distillation.

    The step is plain gradient descent on the clone loss between the student's features of ``views``
    and ``answers``; gradients flow through it into ``answers``, and into ``triggered``. The
    student's own weights are constants and stay; BatchNorm uses its running statistics.

    Args:
        student: The stand-in.
        answers: What the encoder says of ``views``.
        views: Clean.
        triggered: Images with the trigger.
        plain: The same without.
        references: What triggered images shall resemble; their mean feature counts.
        lr: Of the step.
    """
    weights = {
        name: parameter.detach().requires_grad_() for name, parameter in student.named_parameters()
    }
    parts = [triggered, plain, references]
    # Fused attention has no second derivative.
    with eval_mode(student), sdpa_kernel(SDPBackend.MATH):
        clone = -F.cosine_similarity(functional_call(student, weights, views), answers).mean()
        gradients = torch.autograd.grad(clone, list(weights.values()), create_graph=True)
        after = {
            name: weight - lr * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        features = functional_call(student, after, torch.cat(parts))
    moved, still, goal = features.split([len(part) for part in parts])
    return heading(moved, still, goal.mean(0, keepdim=True))
