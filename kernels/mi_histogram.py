"""Joint histograms and mutual information of all layers, pairs and shuffles in one Triton launch.

Same functions and results as in ``reference.py``: counts bit for bit, information in float32 within
1e-6 nats or so; asked for information alone, counts never leave the chip. Two ways to count:

* a pair at a time, in shared memory: matched pairs, and all pairs of more than 16 bins;
* the pairs of two blocks of directions, as a product of one-hot codes on the tensor cores.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32, Int64, UInt8
from torch import Tensor

from mimic_fast.kernels import mi_cross_kernels as cross
from mimic_fast.kernels import mi_histogram_kernels as pair
from mimic_fast.kernels.aot_case import AotCase

PRODUCT_BINS = 16  # most bins for which the one-hot product is the faster way
_LARGEST_TILE = 4096  # counts that a program holds
_ROLLS = 256  # most rolls a launch: they are kernel arguments


def edge_codes(
    values: Float[Tensor, "direction image"], edges: Float[Tensor, "direction edge"]
) -> UInt8[Tensor, "direction image"]:
    """Bin of every value; see :func:`reference.edge_codes`."""
    values, edges = _dense(values), _dense(edges)
    directions, images = values.shape
    codes = torch.empty(directions, images, dtype=torch.uint8, device=values.device)
    if codes.numel():
        constants, warps = _edge_plan(edges.shape[1] - 1, values.dtype)
        blocks = triton.cdiv(images, constants["BLOCK"])
        pair.edge_codes_kernel[(directions * blocks,)](
            values, edges, codes, images, values.stride(0), edges.stride(0), blocks,
            **constants, num_warps=warps,
        )  # fmt: skip
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
    pairs, total = x_codes.shape
    shape = (len(rolls), num_groups, pairs, bins, bins)
    counts = torch.empty(shape, dtype=torch.int32, device=x_codes.device)
    if groups is not None:
        groups = groups.to(x_codes.device).contiguous()
    span = images or (0, total)
    _launch_pair_counts(x_codes, y_codes, groups, counts, span, rolls=rolls, is_cross=False)
    return counts


def cross_histogram(
    x_codes: UInt8[Tensor, "x_direction image"],
    y_codes: UInt8[Tensor, "y_direction image"],
    *,
    bins: int,
    rolls: tuple[int, ...] = (0,),
) -> Int32[Tensor, "roll x_direction y_direction bins bins"]:
    """Joint bin counts of every first direction with every second."""
    first, second, images = len(x_codes), len(y_codes), x_codes.shape[1]
    shape = (len(rolls), first, second, bins, bins)
    counts = torch.empty(shape, dtype=torch.int32, device=x_codes.device)
    if bins <= PRODUCT_BINS:
        _launch_cross(cross.cross_counts_kernel, x_codes, y_codes, counts, bins=bins, rolls=rolls)
    else:
        grouped = counts.view(len(rolls), 1, first * second, bins, bins)
        span = (0, images)
        _launch_pair_counts(x_codes, y_codes, None, grouped, span, rolls=rolls, is_cross=True)
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
    _launch_pair_information(x_codes, y_codes, information, bins=bins, rolls=rolls, is_cross=False)
    return information


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
        kernel = cross.cross_information_kernel
        _launch_cross(kernel, x_codes, y_codes, information, bins=bins, rolls=rolls)
    else:
        _launch_pair_information(
            x_codes, y_codes, information, bins=bins, rolls=rolls, is_cross=True
        )
    return information
