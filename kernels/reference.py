"""Oracles of every op in plain PyTorch: they read like the formulas and run everywhere.

Each computes in the input's dtype or wider (float16 and bfloat16 are raised to float32 first: a sum
of squares over 1024 channels overflows float16 at a standard deviation of 8) and is differentiated
by autograd.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32, Int64, UInt8
from torch import Tensor

ATTENTION_EPSILON = 1e-6  # added to the L2 norm, as in the authors' demo


def attention_map(
    feature_map: Float[Tensor, "batch channel height width"], *, power: float = 2.0
) -> Float[Tensor, "batch position"]:
    """Normalized spatial attention map A / (||A||_2 + 1e-6) with A = sum_c |F_c|^p.

    Zagoruyko and Komodakis, arXiv:1612.03928, as used by the MIMIC demo.

    Args:
        feature_map: Output of one tapped layer.
        power: p, at least 1.
    """
    wide = _widened(feature_map)
    powers = wide.square() if power == 2 else wide.abs().pow(power)
    flat = powers.sum(dim=1).flatten(1)
    return flat / (flat.norm(dim=1, keepdim=True) + ATTENTION_EPSILON)


def attention_loss(
    student_map: Float[Tensor, "batch channel height width"],
    teacher_map: Float[Tensor, "batch teacher_channel height width"],
    *,
    power: float = 2.0,
    form: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, ""]:
    """Squared distance of normalized attention maps, averaged over the batch.

    Args:
        student_map: Of the student.
        teacher_map: Of the teacher; no gradient flows into it.
        power: p, at least 1.
        form: ``sum`` over positions, in [0, 2]; ``mean`` over positions, the authors' demo.
    """
    student = attention_map(student_map, power=power)
    teacher = attention_map(teacher_map, power=power).detach()
    squared = (student - teacher).square()
    return (squared.sum(dim=1) if form == "sum" else squared.mean(dim=1)).mean()


def clone_loss(
    student: Float[Tensor, "batch feature"], teacher: Float[Tensor, "batch feature"]
) -> Float[Tensor, ""]:
    """Negative mean cosine of student and teacher features: [-1, 1]; -1 where they agree."""
    return -F.cosine_similarity(_widened(student), _widened(teacher).detach(), dim=1).mean()


def nt_xent(
    anchors: Float[Tensor, "anchor width"],
    candidates: Float[Tensor, "candidate width"],
    positives: Int[Tensor, " anchor"],
    selves: Int[Tensor, " anchor"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Normalized temperature-scaled cross entropy (SimCLR, arXiv:2002.05709, eq. 1).

    Args:
        anchors: L2-normalized projections of this process.
        candidates: L2-normalized projections of all processes; they contain the anchors.
        positives: Row of ``candidates`` that is the other view of each anchor.
        selves: Row of ``candidates`` that is the anchor itself, left out of the sum.
        temperature: Divides the cosines.
    """
    # Autocast would round these cosines to bfloat16, three digits before they are exponentiated.
    with torch.autocast(anchors.device.type, enabled=False):
        logits = _widened(anchors) @ _widened(candidates).T / temperature
    own = F.one_hot(selves, candidates.shape[0]).bool()
    return F.cross_entropy(logits.masked_fill(own, -torch.inf), positives)


def joint_histogram(
    x_codes: UInt8[Tensor, "pair image"],
    y_codes: UInt8[Tensor, "pair image"],
    groups: Int64[Tensor, " image"],
    *,
    bins: int,
    num_groups: int,
) -> Int32[Tensor, "group pair bins bins"]:
    """Joint bin counts of every pair of directions, apart for every group of images.

    ``counts[g, p, i, j]`` is the number of images ``n`` with ``groups[n] == g``, ``x_codes[p, n] ==
    i`` and ``y_codes[p, n] == j``: integers, so that a sum over processes does not depend on its
    order.

    Args:
        x_codes: Bin of each image along the first direction of each pair, below ``bins``.
        y_codes: The same along the second direction.
        groups: Group of each image, below ``num_groups``.
        bins: K, bins per axis, at most 256.
        num_groups: Number of groups.

    Raises:
        ValueError: If a code is not below ``bins`` or a group not in ``0..num_groups - 1``.
    """
    pairs, images = x_codes.shape
    if x_codes.numel() and max(int(x_codes.max()), int(y_codes.max())) >= bins:
        raise ValueError(f"codes must be below bins = {bins}; bin them with the same K")
    if images and not 0 <= int(groups.min()) <= int(groups.max()) < num_groups:
        raise ValueError(f"groups must lie in 0..{num_groups - 1}; number them from 0")
    pair = torch.arange(pairs, device=x_codes.device)[:, None]
    cell = (groups * pairs + pair) * bins + x_codes
    cell = cell * bins + y_codes
    counts = torch.bincount(cell.flatten(), minlength=num_groups * pairs * bins * bins)
    return counts.to(torch.int32).view(num_groups, pairs, bins, bins)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
