"""Batches taken in parts: gradients add up, and the contrastive loss still sees the whole batch.

NT-Xent compares every image with all others, so its parts are not parts of its sum. As in gradient
caching (Gao et al., arXiv:2101.06983) a first pass without gradients gives all projections, the
loss of the whole global batch gives the gradient at each, and the second pass pulls them along it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mimic_fast.config import LossSettings
from mimic_fast.data.loader import Batch
from mimic_fast.distributed import Processes
from mimic_fast.losses import contrastive_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A slice of this process's share of a batch.

    Args:
        batch: What the teacher sees, and the student's second view.
        student_view: The student's first view.
        pull: Gradient of the contrastive loss at the projections of both views, times the number of
            parts; None where the loss is computed in the part itself.
    """

    batch: Batch
    student_view: Tensor
    pull: tuple[Tensor, Tensor] | None = None


def split(batch: Batch, student_view: Tensor, parts: int) -> list[Part]:
    """Equal parts in the order of the batch; it divides evenly, as ``check_batch`` has seen."""
    size = len(batch.ids) // parts
    seconds = [None] * parts if batch.v2 is None else batch.v2.split(size)
    sights = [None] * parts if batch.sights is None else batch.sights.split(size)
    return [
        Part(batch=Batch(v1=v1, v2=v2, ids=ids, sights=seen), student_view=view)
        for v1, v2, ids, seen, view in zip(
            batch.v1.split(size),
            seconds,
            batch.ids.split(size),
            sights,
            student_view.split(size),
            strict=True,
        )
    ]


def pulled(
    student: nn.Module, parts: Sequence[Part], *, loss: LossSettings, processes: Processes
) -> tuple[Tensor, list[Part]]:
    """The contrastive loss of the whole batch, and the parts with its gradients.

    Exact where an image's projection depends on no other image of its part: with BatchNorm, the
    statistics are those of a part in both passes. Random layers draw the same in both.
    """
    first, second = (torch.cat(views).requires_grad_() for views in _projections(student, parts))
    value = contrastive_loss(first, second, temperature=loss.temperature, processes=processes)
    gradients = torch.autograd.grad(value, (first, second))
    slices = zip(*(g.mul(len(parts)).chunk(len(parts)) for g in gradients), strict=True)
    return value.detach(), [replace(p, pull=pull) for p, pull in zip(parts, slices, strict=True)]


@torch.no_grad()
def _projections(student: nn.Module, parts: Sequence[Part]) -> tuple[list[Tensor], list[Tensor]]:
    """Both views' projections, in float32 or wider; buffers and generators stay as they are."""
    before = [(buffer, buffer.clone()) for buffer in student.buffers()]
    device = parts[0].student_view.device
    first: list[Tensor] = []
    second: list[Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for part in parts:
            assert part.batch.v2 is not None
            _, projected = student(torch.cat([part.student_view, part.batch.v2]))
            wide = projected if projected.dtype == torch.float64 else projected.float()
            one, other = wide.split(len(part.student_view))
            first.append(one)
            second.append(other)
    for buffer, value in before:
        buffer.copy_(value)
    return first, second
