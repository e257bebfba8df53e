"""The losses of step B and their weighted total (arXiv:2406.03508 and its released demo)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mimic_fast import ops
from mimic_fast.config import LossSettings
from mimic_fast.distributed import Processes, gather_with_gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Terms of one step, each a scalar; ``attention`` and ``dense`` are weighted already."""

    total: Tensor
    clone: Tensor
    dense: Tensor
    attention: Tensor
    contrastive: Tensor
    byol: Tensor


def weighted_attention_loss(
    student_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    layer_weights: Sequence[float],
    *,
    settings: LossSettings,
) -> Float[Tensor, ""]:
    """Attention losses of all layers, weighted by lambda_l.

    Form ``sum``: lambda_l * a / N_l times the distance summed over the N_l positions; form
    ``mean``, the demo's expression: lambda_l * a times its mean over them. The two are the same
    number by construction, so that a = 1 is the demo's strength at any map size. A student map of
    another grid is interpolated to the teacher's.

    Args:
        student_maps: One feature map per tapped layer, shallow to deep.
        teacher_maps: The same layers of the teacher; no gradient flows into them.
        layer_weights: lambda_l = base + gain * p_l; a zero skips the layer.
        settings: Form, power and strength a.

    Raises:
        ValueError: If the three sequences differ in length.
    """
    if not len(student_maps) == len(teacher_maps) == len(layer_weights):
        raise ValueError(
            f"expected one map a layer on both sides, got {len(student_maps)} student maps, "
            f"{len(teacher_maps)} teacher maps and {len(layer_weights)} weights"
        )
    total = student_maps[0].new_zeros((), dtype=_wide(student_maps[0]))
    for student, teacher, weight in zip(student_maps, teacher_maps, layer_weights, strict=True):
        if weight == 0:
            continue
        if student.shape[2:] != teacher.shape[2:]:
            student = F.interpolate(student, teacher.shape[2:], mode="bilinear", antialias=True)
        form = settings.attention_form
        distance = ops.attention_loss(student, teacher, power=settings.attention_power, form=form)
        positions = teacher.shape[2] * teacher.shape[3] if form == "sum" else 1
        total = total + distance * (weight * settings.attention_weight / positions)
    return total


def contrastive_loss(
    first: Float[Tensor, "batch width"],
    second: Float[Tensor, "batch width"],
    *,
    temperature: float,
    processes: Processes,
) -> Float[Tensor, ""]:
    """NT-Xent over the global batch of all processes; this process's share of the mean.

    The mean over processes is the loss of one process on the joined batch, in value and gradient.
    """
    batch = first.shape[0]
    local = F.normalize(torch.cat([first, second]).to(_wide(first)), dim=1)
    candidates = gather_with_gradient(local, processes)
    start = processes.rank * 2 * batch
    selves = torch.arange(start, start + 2 * batch, device=local.device)
    positives = torch.cat([selves[batch:], selves[:batch]])
    return ops.nt_xent(local, candidates, positives, selves, temperature=temperature)


def total_loss(
    *,
    clone: Tensor,
    attention: Tensor,
    contrastive: Tensor,
    settings: LossSettings,
    dense: Tensor | None = None,
) -> Losses:
    """L = w_clone L_clone + sum_l lambda_l L_att,l + w_con L_con, and the dense clone loss."""
    total = settings.clone * clone + attention + settings.contrastive * contrastive
    if dense is None:
        dense = torch.zeros_like(total)
    return Losses(
        total=total + dense,
        clone=clone,
        dense=dense,
        attention=attention,
        contrastive=contrastive,
        byol=torch.zeros_like(total),  # minimized alone, see byol.py
    )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
