"""Launches of the histogram kernels: constants and warps, and the ones that production has.

The launchers and the ahead-of-time compiler take both from here, so that what was checked for
spills is what runs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

from mimic_fast.kernels.aot_case import AotCase
from mimic_fast.kernels.mi_cross_kernels import cross_counts_kernel, cross_information_kernel
from mimic_fast.kernels.mi_histogram_kernels import (
    edge_codes_kernel,
    pair_counts_kernel,
    pair_information_kernel,
)

PRODUCT_BINS = 16  # most bins for which the one-hot product is the faster way
_CELLS = 1024  # most counts of a program: AMD's histogram keeps them in the registers of a warp
_CASE_BINS = (4, 8, 12, 16, 24, 32, 64)
_CASE_ROLLS = 20  # shuffled pairings
_CASE_GROUPS = 20  # jackknife groups
_ALIGNED = "16 codes a lane, but on AMD 8, as its histogram takes registers for each"
_ROLLED = "a rolled row is not aligned: its codes are read byte by byte"
_RAGGED = "rows of any number of images are not aligned"
_GROUPED = "8 bytes of group an image are most of what is read; they take the registers"
_PRODUCT = "codes are read byte by byte, each once for a block of directions: rolled or not"
_FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MULTIPLES = ("start", "stop", "images", "x_stride", "y_stride", "values_stride")  # of 16
_PLAIN = ("edges_stride", "blocks", "pairs", "first", "second", "x_blocks", "y_blocks")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One launch.

    Args:
        kernel: The ``triton.jit`` function.
        constants: Values of the constexpr arguments.
        num_warps: Warps a program.
        note: Why not all codes move 16 bytes at a time, or empty.
    """

    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    note: str = ""


def plan_edges(bins: int, dtype: torch.dtype, *, aligned: bool) -> Plan:
    """Launch that bins values of ``dtype``; aligned: the images are a multiple of 16."""
    constants = {
        "BINS": bins,
        "STEPS": (bins - 1).bit_length(),
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK": 4096 if aligned else 1024,
    }
    note = "" if aligned else _RAGGED
    return Plan(kernel=edge_codes_kernel, constants=constants, num_warps=4, note=note)


def plan_counts(
    bins: int, num_groups: int, num_rolls: int, *, grouped: bool, crossed: bool, aligned: bool
) -> Plan:
    """Launch that counts a pair at a time.

    Args:
        bins: K.
        num_groups: Groups of images.
        num_rolls: Pairings.
        grouped: Whether images have a group; else there is one.
        crossed: Whether every first direction meets every second, or its match alone.
        aligned: Whether all rolls, the images and the span of them are multiples of 16.
    """
    rows = min(num_groups * bins, _CELLS // bins)
    constants = {
        "BINS": bins,
        "GROUPS": num_groups,
        "GROUPED": grouped,
        "CROSS": crossed,
        "ALIGNED": aligned,
        "ROLLS": num_rolls,
        "ROWS": rows,
        "CELLS": triton.next_power_of_2(rows * bins),
    }
    if grouped:
        return _pair_plan(pair_counts_kernel, constants, block=1024, note=_GROUPED)
    return _pair_plan(pair_counts_kernel, constants, block=2048)


def plan_information(bins: int, num_rolls: int, *, crossed: bool, aligned: bool) -> Plan:
    """Launch that gives the information of a pair at a time; arguments as above."""
    width = triton.next_power_of_2(bins)
    rows = min(width, _CELLS // width)
    constants = {
        "BINS": bins,
        "WIDTH": width,
        "CROSS": crossed,
        "ALIGNED": aligned,
        "ROLLS": num_rolls,
        "ROWS": rows,
    }
    # A loop over parts of the table leaves fewer registers.
    block = 2048 if rows == width else 1024
    return _pair_plan(pair_information_kernel, constants, block=block)


def plan_product(bins: int, num_rolls: int, *, information: bool) -> Plan:
    """Launch that counts blocks of directions as a product of one-hot codes."""
    width = max(4, triton.next_power_of_2(bins))
    # The larger product halves the one-hot codes a pair, and takes all registers there are.
    side = 128 if information and width == 16 else 64
    constants = {
        "BINS": bins,
        "WIDTH": width,
        "ROLLS": num_rolls,
        "DIRECTIONS": side // width,
        "BLOCK": 128,
    }
    kernel = cross_information_kernel if information else cross_counts_kernel
    return Plan(kernel=kernel, constants=constants, num_warps=side // 16, note=_PRODUCT)


def aot_cases() -> list[AotCase]:
    """Specializations for ``aot.py``: K of 'auto' and 64, true pairings and shuffles."""
    return [*_edge_cases(), *_product_cases(), *_pair_cases()]


def _pair_plan(kernel: Any, constants: dict[str, Any], *, block: int, note: str = "") -> Plan:
    note = note or (_ALIGNED if constants["ALIGNED"] else _ROLLED)
    return Plan(kernel=kernel, constants=constants | {"BLOCK": block}, num_warps=4, note=note)


def _edge_cases() -> Iterator[AotCase]:
    for dtype, name in _FLOATS.items():
        types = {"values_ptr": f"*{name}", "edges_ptr": f"*{name}"}
        for aligned in (True, False):
            way = "" if aligned else " ragged"
            plan = plan_edges(16, dtype, aligned=aligned)
            yield _case(f"edge codes {name}{way}", plan, types, aligned=aligned)


def _product_cases() -> Iterator[AotCase]:
    for bins in (bins for bins in _CASE_BINS if bins <= PRODUCT_BINS):
        for rolls in (1, _CASE_ROLLS):
            plan = plan_product(bins, rolls, information=True)
            yield _case(f"information cross K{bins} R{rolls}", plan)
        yield _case(f"counts cross K{bins}", plan_product(bins, 1, information=False))


def _pair_cases() -> Iterator[AotCase]:
    for bins in _CASE_BINS:
        for crossed in (False, True)[: 1 + (bins > PRODUCT_BINS)]:
            for rolls in (1, _CASE_ROLLS):
                ways: dict[str, bool] = {"crossed": crossed, "aligned": rolls == 1}
                name = f"{'cross' if crossed else 'matched'} K{bins} R{rolls}"
                yield _case(f"information {name}", plan_information(bins, rolls, **ways))
                plan = plan_counts(bins, 1, rolls, grouped=False, **ways)
                yield _case(f"counts {name}", plan)
        plan = plan_counts(bins, _CASE_GROUPS, 1, grouped=True, crossed=False, aligned=True)
        yield _case(f"counts matched K{bins} by group", plan, {"group_ptr": "*i64"})
        plan = plan_information(bins, _CASE_ROLLS, crossed=False, aligned=False)
        yield _case(f"information matched K{bins} ragged", plan, aligned=False)


def _case(
    name: str,
    plan: Plan,
    types: Mapping[str, str] = MappingProxyType({}),
    *,
    aligned: bool = True,
) -> AotCase:
    """Aligned: images a multiple of 16, in rows that lie together."""
    known = {
        **dict.fromkeys(("x_ptr", "y_ptr", "group_ptr", "codes_ptr"), "*u8"),
        **dict.fromkeys((*_MULTIPLES, *_PLAIN), "i32"),
        "counts_ptr": "*i32",
        "information_ptr": "*fp32",
        "rolls": ("i32",) * plan.constants.get("ROLLS", 0),
        **types,
    }
    names = plan.kernel.arg_names
    # The kernels of the product specialize no number.
    numbers = _MULTIPLES if aligned and "DIRECTIONS" not in plan.constants else ()
    divisible = (name for name in names if name.endswith("_ptr") or name in numbers)
    return AotCase(
        name=f"mi {name}",
        kernel=plan.kernel,
        signature={argument: known.get(argument, "constexpr") for argument in names},
        constants=plan.constants,
        divisible=tuple((argument,) for argument in divisible),
        num_warps=plan.num_warps,
        data_pointers=("values_ptr", "x_ptr", "y_ptr", "codes_ptr"),
        data=not plan.note,
        note=plan.note,
    )
