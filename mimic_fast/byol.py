"""BYOL (Grill et al., arXiv:2006.07733): learning to predict a slow average of oneself.

The online student (encoder, projector, predictor) sees one view and predicts what the target makes
of the other. The target is an exponential moving average of online encoder and projector; no
gradient reaches it. Departs from the paper in three ways: both views are drawn alike, are one
forward, so that BatchNorm's statistics are of both (as in SimCLR here: half the all-reduces), and
the loss is the mean over the two directions, half the paper's sum.
"""

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mimic_fast import ops
from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.losses import Losses
from mimic_fast.step import Student
from mimic_fast.step_clock import StepClock

_PAPERS_HIDDEN = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Byol:
    """What it adds to a training run.

    Args:
        target: Average of the student without its predictor, never in eval mode: BatchNorm uses the
            batch's statistics, as in the paper's code.
        momentum: The average's decay at the first step; see :func:`momentum_at`.
    """

    target: Student
    momentum: float


def byol_student(tapped: TappedEncoder, *, hidden: int | None, width: int, seed: int) -> Student:
    """The online student: its head is projector and predictor, two MLPs of the same shape.

    Args:
        tapped: The encoder.
        hidden: Hidden width of both; None: four times the features, at most the paper's 4096.
        width: Output width of both.
        seed: Draws their weights.
    """
    student = Student(tapped, projection=0, seed=seed)
    features = tapped.encoder.feature_dim
    hidden = hidden or min(4 * features, _PAPERS_HIDDEN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "projector": mlp(features, hidden, width),
            "predictor": mlp(width, hidden, width),
        }
    student.projection = nn.Sequential(OrderedDict(parts))
    return student


def target_of(student: Student) -> Student:
    """A frozen copy of ``student`` without its predictor; equal names mean corresponding weights.

    Copied before anything is done to the student that a copy would share (process groups, clocks).
    """
    target = copy.deepcopy(student).requires_grad_(False)
    assert isinstance(target.projection, nn.Sequential)
    target.projection = target.projection[:1]
    return target


def byol_losses(
    student: nn.Module,
    target: Student,
    images: Float[Tensor, "images channel height width"],
    *,
    clock: StepClock,
) -> Losses:
    """Losses of a batch: student and target see both views once, the target without gradient.

    Args:
        student: Of :func:`byol_student`, wrapped for its processes.
        target: Its average.
        images: All first views, then all second views.
        clock: Told what takes the time.
    """
    with clock.section("teacher"), torch.no_grad():
        _, projected = target(images)
    with clock.section("student"):
        _, predicted = student(images)
    with clock.section("loss"):
        loss = byol_loss(predicted, projected)
        zero = torch.zeros_like(loss)
        return Losses(
            total=loss, clone=zero, dense=zero, attention=zero, contrastive=zero, byol=loss
        )


def byol_loss(
    predicted: Float[Tensor, "images width"], projected: Float[Tensor, "images width"]
) -> Float[Tensor, ""]:
    """Mean of 2 - 2 cos between every prediction and the target's projection of the other view.

    Eq. (2) of arXiv:2006.07733, averaged over both directions. A mean over images: the mean over
    processes with as many each is that of the joined batch, in value and gradient.

    Args:
        predicted: Of all first views, then of all second views.
        projected: In the same order; no gradient flows into it.

    Returns:
        Scalar in [0, 4], dimensionless.
    """
    first, second = projected.chunk(2)
    return 2 + 2 * ops.clone_loss(predicted, torch.cat([second, first]))


def momentum_at(done: float, *, first: float) -> float:
    """1 - (1 - first) (cos(pi done) + 1) / 2: from ``first`` to 1 over the run.

    Args:
        done: Share of the run's steps that came before, 0..1.
        first: Momentum of the first step.
    """
    return 1 - (1 - first) * (math.cos(math.pi * done) + 1) / 2


@torch.no_grad()
def follow(byol: Byol, student: Student, *, done: float, bad: Tensor) -> None:
    """Target <- m target + (1 - m) student, unless the step was skipped; asks nothing of the host.

    Args:
        byol: Whose target moves.
        student: Behind the optimizer's step.
        done: Share of the run's steps that came before this one, 0..1.
        bad: 1 where the step was skipped, else 0; on the device.
    """
    online = dict(student.named_parameters())
    averaged = dict(byol.target.named_parameters())
    targets: list[Tensor] = list(averaged.values())
    sources: list[Tensor] = [online[name] for name in averaged]
    share = (1 - bad.double()) * (1 - momentum_at(done, first=byol.momentum))
    moves = torch._foreach_sub(sources, targets)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_mul_(moves, share.to(moves[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(targets, moves)  # pyright: ignore[reportPrivateImportUsage]


def mlp(features: int, hidden: int, width: int) -> nn.Sequential:
    """A projector or predictor: linear, BatchNorm, ReLU, linear; in and out ``[B, .]``."""
    # BatchNorm takes away what a bias in front of it adds; the paper's code has none behind either.
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, width, bias=False),
    )
