"""Joint histograms and mutual information of all layers, pairs and shuffles in one Triton launch.

Same functions and results as in ``reference.py``: counts bit for bit, information in float32; asked
for information alone, counts never leave the chip. There are two ways to count:

* one pair a program, in shared memory: matched pairs, and all pairs of more than 16 bins;
* the pairs of two blocks of directions, as a product of one-hot codes on the tensor cores.
"""

from collections.abc import Iterator

import torch
import triton
from jaxtyping import Float, Float32, Int32, Int64, UInt8
from torch import Tensor

from mimic_fast.kernels.mi_plan import (
    PRODUCT_BINS,
    plan_counts,
    plan_edges,
    plan_information,
    plan_product,
)
from mimic_fast.kernels.mi_plan import aot_cases as aot_cases

_ROLLS = 256  # most rolls a launch: they are kernel arguments


def edge_codes(
    values: Float[Tensor, "direction image"], edges: Float[Tensor, "direction edge"]
) -> UInt8[Tensor, "direction image"]:
    """Bin of every value; see :func:`reference.edge_codes`."""
    values, edges = _rows(values), _rows(edges)
    directions, images = values.shape
    codes = torch.empty(directions, images, dtype=torch.uint8, device=values.device)
    if codes.numel():
        aligned = _all_aligned(images, values.stride(0))
        plan = plan_edges(edges.shape[1] - 1, values.dtype, aligned=aligned)
        blocks = triton.cdiv(images, plan.constants["BLOCK"])
        plan.kernel[(directions * blocks,)](
            values,
            edges,
            codes,
            images,
            values.stride(0),
            edges.stride(0),
            blocks,
            **plan.constants,
            num_warps=plan.num_warps,
        )
    return codes


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
    """Joint bin counts of matched pairs; see :func:`reference.joint_histogram`."""
    if groups is not None:
        groups = groups.to(x_codes.device).contiguous()
    shape = (len(rolls), num_groups, len(x_codes), bins, bins)
    counts = torch.empty(shape, dtype=torch.int32, device=x_codes.device)
    span = images or (0, x_codes.shape[1])
    return _pair_counts(x_codes, y_codes, groups, counts, span, rolls, crossed=False)


def cross_histogram(
    x_codes: UInt8[Tensor, "x_direction image"],
    y_codes: UInt8[Tensor, "y_direction image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
) -> Int32[Tensor, "roll x_direction y_direction bins bins"]:
    """Joint bin counts of every first direction with every second."""
    shape = (len(rolls), len(x_codes), len(y_codes), bins, bins)
    counts = torch.empty(shape, dtype=torch.int32, device=x_codes.device)
    if bins <= PRODUCT_BINS:
        return _product(x_codes, y_codes, counts, bins, rolls)
    span = (0, x_codes.shape[1])
    _pair_counts(x_codes, y_codes, None, counts.flatten(1, 2)[:, None], span, rolls, crossed=True)
    return counts


def matched_information(
    x_codes: UInt8[Tensor, "pair image"],
    y_codes: UInt8[Tensor, "pair image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
) -> Float32[Tensor, "roll pair"]:
    """Plug-in mutual information of matched pairs, nats."""
    shape = (len(rolls), len(x_codes))
    information = torch.empty(shape, dtype=torch.float32, device=x_codes.device)
    return _pair_information(x_codes, y_codes, information, bins, rolls, crossed=False)


def cross_information(
    x_codes: UInt8[Tensor, "x_direction image"],
    y_codes: UInt8[Tensor, "y_direction image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
) -> Float32[Tensor, "roll x_direction y_direction"]:
    """Plug-in mutual information of every first direction with every second, nats."""
    shape = (len(rolls), len(x_codes), len(y_codes))
    information = torch.empty(shape, dtype=torch.float32, device=x_codes.device)
    if bins <= PRODUCT_BINS:
        return _product(x_codes, y_codes, information, bins, rolls)
    _pair_information(x_codes, y_codes, information.flatten(1), bins, rolls, crossed=True)
    return information


def _pair_counts(
    x_codes: Tensor,
    y_codes: Tensor,
    groups: Tensor | None,
    counts: Tensor,
    span: tuple[int, int],
    rolls: tuple[int, ...],
    *,
    crossed: bool,
) -> Tensor:
    """Fills ``counts`` [roll, group, pair, bin, bin] a pair at a time; returns them."""
    x_codes, y_codes = _rows(x_codes), _rows(y_codes)
    images = x_codes.shape[1]
    num_groups, pairs, bins = counts.shape[1:4]
    for part, out in _launches(rolls, counts):
        plan = plan_counts(
            bins,
            num_groups,
            len(part),
            grouped=groups is not None,
            crossed=crossed,
            aligned=_all_aligned(images, *span, *part),
        )
        tiles = triton.cdiv(num_groups * bins, plan.constants["ROWS"])
        plan.kernel[(len(part) * pairs * tiles,)](
            x_codes,
            y_codes,
            x_codes if groups is None else groups,
            out,
            packed_rolls(part, images),
            *span,
            images,
            x_codes.stride(0),
            y_codes.stride(0),
            pairs,
            len(y_codes),
            **plan.constants,
            num_warps=plan.num_warps,
        )
    return counts


def _pair_information(
    x_codes: Tensor,
    y_codes: Tensor,
    information: Tensor,
    bins: int,
    rolls: tuple[int, ...],
    *,
    crossed: bool,
) -> Tensor:
    """Fills ``information`` [roll, pair] a pair at a time; returns it."""
    x_codes, y_codes = _rows(x_codes), _rows(y_codes)
    images, pairs = x_codes.shape[1], information.shape[1]
    if not images:
        return information.zero_()
    for part, out in _launches(rolls, information):
        plan = plan_information(
            bins, len(part), crossed=crossed, aligned=_all_aligned(images, *part)
        )
        plan.kernel[(len(part) * pairs,)](
            x_codes,
            y_codes,
            out,
            packed_rolls(part, images),
            images,
            x_codes.stride(0),
            y_codes.stride(0),
            pairs,
            len(y_codes),
            **plan.constants,
            num_warps=plan.num_warps,
        )
    return information


def _product(
    x_codes: Tensor, y_codes: Tensor, out: Tensor, bins: int, rolls: tuple[int, ...]
) -> Tensor:
    """Fills ``out``, counts or information of [roll, first, second], by one-hot products."""
    x_codes, y_codes = _rows(x_codes), _rows(y_codes)
    images, first, second = x_codes.shape[1], len(x_codes), len(y_codes)
    if not images:
        return out.zero_()
    for part, target in _launches(rolls, out):
        plan = plan_product(bins, len(part), information=out.is_floating_point())
        x_blocks = triton.cdiv(first, plan.constants["DIRECTIONS"])
        y_blocks = triton.cdiv(second, plan.constants["DIRECTIONS"])
        plan.kernel[(len(part) * x_blocks * y_blocks,)](
            x_codes,
            y_codes,
            target,
            packed_rolls(part, images),
            images,
            x_codes.stride(0),
            y_codes.stride(0),
            first,
            second,
            x_blocks,
            y_blocks,
            **plan.constants,
            num_warps=plan.num_warps,
        )
    return out


def _launches(rolls: tuple[int, ...], out: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The rolls of each launch, with their part of the result: one, but for very many rolls."""
    if out.numel():
        for start in range(0, len(rolls), _ROLLS):
            yield rolls[start : start + _ROLLS], out[start : start + _ROLLS]


def packed_rolls(rolls: tuple[int, ...], images: int) -> tuple[int, ...]:
    """Rolls as kernel arguments: in 0..images - 1, then two bits.

    Triton compiles anew for an argument that is 1 or a multiple of 16. These are never either, so
    that other rolls do not need another kernel.
    """
    return tuple(((roll % images if images else 0) << 2) | 2 for roll in rolls)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose rows are dense."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _all_aligned(*offsets: int) -> bool:
    return all(offset % 16 == 0 for offset in offsets)
