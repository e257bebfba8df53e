"""Oracles of every op in plain PyTorch: they read like the formulas and run everywhere.

Each computes in the input's dtype or wider (float16 and bfloat16 are raised to float32 first: a sum
of squares over 1024 channels overflows float16 at a standard deviation of 8) and is differentiated
by autograd.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int, Int32, Int64, UInt8
from torch import Tensor

ATTENTION_EPSILON = 1e-6  # added to the L2 norm, as in the authors' demo
MISSING = 255  # code of a value that has no bin: NaN, or outside the edges


def attention_map(
    feature_map: Float[Tensor, "batch ..."], *, power: float = 2.0, prefix: int = 0
) -> Float[Tensor, "batch position"]:
    """Normalized spatial attention map A / (||A||_2 + 1e-6) with A = sum_c |F_c|^p.

    Zagoruyko and Komodakis, arXiv:1612.03928, as used by the MIMIC demo.

    Args:
        feature_map: Output of one tapped layer: a map ``[B, C, H, W]`` or tokens ``[B, N, C]``.
        power: p, at least 1.
        prefix: Class and register tokens to leave out (tokens only).
    """
    return _normalized(power_map(feature_map, power=power, prefix=prefix))


def power_map(
    feature_map: Float[Tensor, "batch ..."], *, power: float = 2.0, prefix: int = 0
) -> Float[Tensor, "batch position"]:
    """The attention map before it is normalized, A = sum_c |F_c|^p; arguments as above."""
    wide = _widened(positions(feature_map, prefix=prefix))
    return (wide.square() if power == 2 else wide.abs().pow(power)).sum(dim=2)


def attention_loss(
    student_map: Float[Tensor, "batch ..."],
    teacher_map: Float[Tensor, "batch ..."],
    *,
    power: float = 2.0,
    form: Literal["sum", "mean"] = "sum",
    prefix: int = 0,
) -> Float[Tensor, ""]:
    """Squared distance of normalized attention maps, averaged over the batch.

    Args:
        student_map: Of the student.
        teacher_map: Of the teacher, any number of channels; no gradient flows into it.
        power: p, at least 1.
        form: ``sum`` over positions, in [0, 2]; ``mean`` over positions, the authors' demo.
        prefix: Class and register tokens to leave out (tokens only).
    """
    student = attention_map(student_map, power=power, prefix=prefix)
    teacher = attention_map(teacher_map, power=power, prefix=prefix).detach()
    squared = (student - teacher).square()
    return (squared.sum(dim=1) if form == "sum" else squared.mean(dim=1)).mean()


def clone_loss(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    *,
    kind: Literal["cosine", "mse"] = "cosine",
    prefix: int = 0,
) -> Float[Tensor, ""]:
    """Distance of student and teacher vectors, averaged over images and positions.

    Args:
        student: Features ``[B, D]``, or dense: tokens ``[B, N, C]`` or a map ``[B, C, H, W]``.
        teacher: The same of the teacher; no gradient flows into it.
        kind: ``cosine``: minus the mean cosine, in [-1, 1]; ``mse``: mean squared difference.
        prefix: Class and register tokens to leave out (tokens only).
    """
    own = _widened(positions(student, prefix=prefix))
    target = _widened(positions(teacher, prefix=prefix)).detach()
    if kind == "mse":
        return (own - target).square().mean()
    return -F.cosine_similarity(own, target, dim=2).mean()


def layer_losses(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."] | None,
    teacher_power: Float[Tensor, "batch position"] | None,
    weights: Float[Tensor, "2"],
    *,
    power: float = 2.0,
    clone: Literal["none", "cosine", "mse"] = "none",
    attention: bool = True,
    prefix: int = 0,
) -> Float[Tensor, "2 batch"]:
    """What the fused op computes of one layer, image by image: the oracle of its kernels.

    Row 0: ``weights[0] * sum_n (m_S - m_T)^2`` with the normalized attention maps m. Row 1:
    ``weights[1]`` times the clone loss of the image, averaged over its positions.

    Args:
        student: Tapped activation of the student.
        teacher: Of the teacher; None where its power map is all that is needed.
        teacher_power: :func:`power_map` of the teacher; None: computed here.
        weights: Of the attention and the clone loss.
        power: p of the attention map.
        clone: Kind of the dense clone loss.
        attention: Whether there is an attention loss; row 0 is zero otherwise.
        prefix: Class and register tokens to leave out (tokens only).
    """
    own = _widened(positions(student, prefix=prefix))
    rows = [own.new_zeros(own.shape[0]), own.new_zeros(own.shape[0])]
    target = None if teacher is None else _widened(positions(teacher, prefix=prefix)).detach()
    if attention:
        if teacher_power is None:
            assert teacher is not None
            teacher_power = power_map(teacher, power=power, prefix=prefix)
        distance = attention_map(student, power=power, prefix=prefix) - _normalized(
            teacher_power.detach()
        )
        rows[0] = weights[0] * distance.square().sum(dim=1)
    if clone != "none":
        assert target is not None
        if clone == "mse":
            rows[1] = weights[1] * (own - target).square().mean(dim=(1, 2))
        else:
            rows[1] = -weights[1] * F.cosine_similarity(own, target, dim=2).mean(dim=1)
    return torch.stack(rows)


def positions(
    activation: Float[Tensor, "batch ..."], *, prefix: int = 0
) -> Float[Tensor, "batch position channel"]:
    """Features, tokens or a map as vectors at positions; a view. Features have one position."""
    if activation.ndim == 2:
        return activation[:, None]
    if activation.ndim == 3:
        return activation[:, prefix:]
    return activation.flatten(2).transpose(1, 2)


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


def edge_codes(
    values: Float[Tensor, "direction image"], edges: Float[Tensor, "direction edge"]
) -> UInt8[Tensor, "direction image"]:
    """Bin of every value, K = edges - 1 bins a direction, as ``numpy.histogram`` has them.

    Bins hold their lower edge, the last one its upper edge too. NaN and what lies outside the edges
    get :data:`MISSING`, which no histogram counts as a bin.

    Args:
        values: Any float type.
        edges: Ascending; K + 1 of them, K at most 255 (256 bins leave no code for NaN).
    """
    bins = edges.shape[1] - 1
    codes = torch.searchsorted(edges.contiguous(), values.contiguous(), right=True) - 1
    codes = torch.where(values == edges[:, -1:], bins - 1, codes)
    inside = (values >= edges[:, :1]) & (values <= edges[:, -1:])
    return torch.where(inside, codes, MISSING).to(torch.uint8)


def equal_mass_codes(
    values: Float[Tensor, "direction image"], *, bins: int
) -> UInt8[Tensor, "direction image"]:
    """Bin of every image by its rank: K bins of equal mass, edges from all images given.

    Equal values always share a bin: an edge that would fall inside a run of ties moves to the
    nearer end of the run (bins may then be empty). Breaking ties by position would invent
    independence.
    """
    images = values.shape[1]
    ordered = values.sort(dim=1).values
    nominal = torch.arange(1, bins, device=values.device) * images // bins
    at_cut = ordered[:, nominal.clamp(max=max(0, images - 1))]
    run_start = torch.searchsorted(ordered, at_cut)
    run_end = torch.searchsorted(ordered, at_cut, right=True)
    cuts = torch.where(nominal - run_start <= run_end - nominal, run_start, run_end)
    below = torch.searchsorted(ordered, values)
    return torch.searchsorted(cuts, below, right=True).to(torch.uint8)


def joint_histogram(
    x_codes: UInt8[Tensor, "pair image"],
    y_codes: UInt8[Tensor, "pair image"],
    groups: Int64[Tensor, " image"] | None = None,
    *,
    bins: int,
    num_groups: int = 1,
    rolls: tuple[int, ...] = (0,),
    images: tuple[int, int] | None = None,
) -> Int32[Tensor, "roll group pair bins bins"]:
    """Joint bin counts of matched pairs of directions, apart for every group of images and roll.

    ``counts[r, g, p, i, j]`` is the number of images ``n`` in ``images`` with ``groups[n] == g``,
    ``x_codes[p, n] == i`` and ``y_codes.roll(rolls[r], 1)[p, n] == j``: integers, so that a sum
    over processes does not depend on its order. An image whose code is not below ``bins`` on either
    side (:data:`MISSING`) is not counted; what the counts lack are those.

    Args:
        x_codes: Bin of each image along the first direction of each pair.
        y_codes: The same along the second direction.
        groups: Group of each image, in ``0..num_groups - 1``; None: all in group 0.
        bins: K, bins per axis, 2 to 256.
        num_groups: Number of groups.
        rolls: Offsets of shuffled pairings; 0 is the true one.
        images: Count only images ``start..stop - 1``, of x; None: all.
    """
    pairs, total = x_codes.shape
    start, stop = images or (0, total)
    group = torch.zeros(total, dtype=torch.int64) if groups is None else groups
    group = group.to(x_codes.device)[start:stop]
    pair = torch.arange(pairs, device=x_codes.device)[:, None]
    tables = []
    for roll in rolls:
        x = x_codes[:, start:stop].long()
        y = y_codes.roll(roll, 1)[:, start:stop].long()
        cell = (((group * pairs + pair) * bins + x) * bins + y)[(x < bins) & (y < bins)]
        counts = torch.bincount(cell, minlength=num_groups * pairs * bins * bins)
        tables.append(counts.to(torch.int32).view(num_groups, pairs, bins, bins))
    return torch.stack(tables)


def cross_histogram(
    x_codes: UInt8[Tensor, "x_direction image"],
    y_codes: UInt8[Tensor, "y_direction image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
) -> Int32[Tensor, "roll x_direction y_direction bins bins"]:
    """Joint bin counts of every first direction with every second; arguments as above."""
    rows = [
        joint_histogram(x_codes, y[None].expand_as(x_codes), bins=bins, rolls=rolls)[:, 0]
        for y in y_codes
    ]
    return torch.stack(rows, dim=2)


def counted_information(counts: Int[Tensor, "*table bins bins"]) -> Float64[Tensor, "*table"]:
    """Plug-in mutual information of tables of counts as they stand, nats. Biased upward.

    With f(c) = c log c, I = log n + (sum f(n_xy) - sum f(n_x) - sum f(n_y)) / n; an empty table has
    none.
    """
    cells = _c_log_c(counts).sum(dim=(-2, -1))
    rows = _c_log_c(counts.sum(dim=-1)).sum(dim=-1)
    columns = _c_log_c(counts.sum(dim=-2)).sum(dim=-1)
    images = counts.sum(dim=(-2, -1)).clamp(min=1).double()
    return images.log() + (cells - rows - columns) / images


def matched_information(
    x_codes: UInt8[Tensor, "pair image"],
    y_codes: UInt8[Tensor, "pair image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
) -> Float64[Tensor, "roll pair"]:
    """Plug-in mutual information of matched pairs, nats; arguments as for their counts."""
    return counted_information(joint_histogram(x_codes, y_codes, bins=bins, rolls=rolls)[:, 0])


def cross_information(
    x_codes: UInt8[Tensor, "x_direction image"],
    y_codes: UInt8[Tensor, "y_direction image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
) -> Float64[Tensor, "roll x_direction y_direction"]:
    """Plug-in mutual information of every first direction with every second, nats."""
    return counted_information(cross_histogram(x_codes, y_codes, bins=bins, rolls=rolls))


def _c_log_c(counts: Int[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    wide = counts.double()
    return torch.special.xlogy(wide, wide)


def _normalized(power: Float[Tensor, "batch position"]) -> Float[Tensor, "batch position"]:
    return power / (power.norm(dim=1, keepdim=True) + ATTENTION_EPSILON)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
