"""Which kernel of the fused distillation loss runs an activation, with which constants.

The launchers and the ahead-of-time compiler take both from here, so that what was checked for
spills is what runs.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import triton
import triton.language as tl

from mimic_fast.kernels.distill_blocks import plane_blocks, token_blocks, unrolled
from mimic_fast.kernels.distill_planes import (
    planes_bwd_kernel,
    planes_fwd_kernel,
    planes_power_kernel,
)
from mimic_fast.kernels.distill_tokens import (
    tokens_bwd_kernel,
    tokens_fwd_kernel,
    tokens_power_kernel,
)
from mimic_fast.kernels.layout import Layout

Clone = Literal["none", "cosine", "mse"]
MOST_ROW = 4096  # positions of a power map that stay in registers between its passes


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One launch.

    Args:
        kernel: The ``triton.jit`` function.
        blocks: Programs of an image: the axes of the grid after that of images.
        constants: Values of the constexpr arguments.
        num_warps: Warps a program.
        most_registers: A thread may take on NVIDIA; None: what ptxas weighs against occupancy.
        end: Where the loop of a program ends, an argument of the kernel; 0: it takes none.
        note: Why not all data moves 16 bytes at a time, or empty.
    """

    kernel: Any
    blocks: tuple[int, ...]
    constants: dict[str, Any]
    num_warps: int
    end: int
    note: str
    most_registers: int | None = None


@functools.lru_cache(maxsize=256)
def plan_powers(features: tuple[Layout, ...], itemsize: int, *, power: float) -> Plan:
    """Launch that computes the power maps of activations of one shape."""
    shape = _shape(features, features, itemsize, most_warps=4, tiles=_tiles(power))
    unused = ("TEACHER_IMAGE_STRIDES", "TEACHER_ROW_STRIDES", "GROUPS")
    constants = {name: value for name, value in shape.constants.items() if name not in unused}
    constants |= {"LAYERS": len(features), "POWER": float(power)}
    return Plan(
        kernel=tokens_power_kernel if features[0].kind == "tokens" else planes_power_kernel,
        blocks=(shape.blocks, len(features)),
        constants=constants,
        num_warps=shape.num_warps,
        end=features[0].channels,
        note=shape.note,
    )


@functools.lru_cache(maxsize=256)
def plan_forward(
    students: tuple[Layout, ...],
    teachers: tuple[Layout, ...],
    itemsize: int,
    *,
    power: float,
    clone: Clone,
    attention: bool,
    given: bool,
) -> Plan:
    """Launch of the forward pass; ``given``: the teachers' power maps are."""
    # Four or five sums an element: the squares of the cosine are the powers of p = 2 only.
    lanes = 32 if clone == "cosine" and attention and power != 2 else 64
    # Three sums of planes, folded to positions, leave room for one tile in flight.
    folded = clone == "cosine" and students[0].kind == "planes"
    tiles = 1 if folded else _tiles(power)
    shape = _shape(students, teachers, itemsize, most_warps=8, lanes=lanes, tiles=tiles)
    constants = shape.constants | _loss(power=power, clone=clone, attention=attention)
    constants |= {"LAYERS": len(students), "GIVEN": given}
    constants["BLOCK_ROW"] = min(MOST_ROW, triton.next_power_of_2(students[0].positions))
    return Plan(
        kernel=tokens_fwd_kernel if students[0].kind == "tokens" else planes_fwd_kernel,
        blocks=(len(students),),
        constants=constants,
        num_warps=shape.num_warps,
        end=shape.blocks * constants["GROUPS"],
        note=shape.note,
        # Left alone, ptxas saves a few registers by keeping one value on the stack.
        most_registers=128 if folded or (clone == "mse" and itemsize == 4) else None,
    )


@functools.lru_cache(maxsize=256)
def plan_backward(
    student: Layout,
    teacher: Layout,
    itemsize: int,
    *,
    power: float,
    clone: Clone,
    attention: bool,
    trunk: bool,
) -> Plan:
    """Launch of the backward pass of one layer."""
    shape = _shape([student], [teacher], itemsize, most_warps=4)
    unused = ("STRIDED", "OFFSETS", "UNROLL", "GROUPS")
    constants = {name: value for name, value in shape.constants.items() if name not in unused}
    for name in ("IMAGE_STRIDE", "ROW_STRIDE", "TEACHER_IMAGE_STRIDE", "TEACHER_ROW_STRIDE"):
        (constants[name],) = constants.pop(f"{name}S")
    constants |= _loss(power=power, clone=clone, attention=attention) | {"TRUNK": trunk}
    blocks = (shape.blocks,)
    if student.kind == "planes":
        tiles = triton.cdiv(student.channels, constants["V"] * constants["BLOCK_R"])
        constants["TILES"] = min(2, tiles, _tiles(power))
        blocks = (triton.cdiv(tiles, constants["TILES"]), shape.blocks)
    return Plan(
        kernel=tokens_bwd_kernel if student.kind == "tokens" else planes_bwd_kernel,
        blocks=blocks,
        constants=constants,
        num_warps=shape.num_warps,
        end=0,
        note=shape.note,
    )


def _tiles(power: float) -> int:
    """Most tiles in flight; logarithms and exponentials take the registers of the others."""
    return 3 if power in (1, 2, 3, 4) else 1


def _loss(*, power: float, clone: Clone, attention: bool) -> dict[str, Any]:
    planes = attention + 2 * (clone == "cosine")
    return {"POWER": float(power), "CLONE": clone, "ATTENTION": attention, "PLANES": planes}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """What all three passes over one shape share: ``blocks`` are those of an image's positions."""

    constants: dict[str, Any]
    blocks: int
    num_warps: int
    note: str


def _shape(
    students: Sequence[Layout],
    teachers: Sequence[Layout],
    itemsize: int,
    *,
    most_warps: int,
    lanes: int = 64,
    tiles: int = 3,
) -> _Shape:
    shape, every = students[0], [*students, *teachers]
    if shape.kind == "tokens":
        tile = token_blocks(
            shape.positions, shape.channels, itemsize, most_warps=most_warps, lanes=lanes
        )
        rows, piece, block = shape.positions, shape.channels, tile.block_n
        iterations = triton.cdiv(shape.channels, tile.block_c)
        sizes = {"N": shape.positions, "BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c}
        row_strides = [layout.stride_position for layout in every]
    else:
        dense = all(layout.stride_channel == layout.positions for layout in every)
        tile = plane_blocks(
            shape.positions,
            shape.channels,
            itemsize,
            dense=dense,
            most_warps=most_warps,
            lanes=lanes,
        )
        rows, block = triton.cdiv(shape.channels, tile.row), tile.block_p
        piece = shape.positions * math.gcd(tile.row, shape.channels)
        iterations = triton.cdiv(rows, tile.block_r)
        sizes = {"HW": shape.positions, "V": tile.row}
        sizes |= {"BLOCK_R": tile.block_r, "BLOCK_P": tile.block_p}
        row_strides = [layout.stride_channel * tile.row for layout in every]
    image_strides = [layout.stride_image for layout in every]
    note = ""
    if any(step * itemsize % 16 for step in (piece, *image_strides, *row_strides)):
        note = "rows do not start and end at multiples of 16 bytes"
    elif lanes < 64:
        note = "five sums an element leave a thread 8 bytes of data where warps are 64 wide"
    reach = (rows + 1) * max(piece, *row_strides)
    constants: dict[str, Any] = {
        "C": shape.channels,
        **sizes,
        "UNROLL": unrolled(iterations, most=tiles),
    }
    constants["GROUPS"] = triton.cdiv(iterations, constants["UNROLL"])
    constants["OFFSETS"] = tl.int32 if reach < 2**31 else tl.int64
    return _Shape(
        constants=constants | _tables(image_strides, row_strides),
        blocks=triton.cdiv(shape.positions, block),
        num_warps=tile.num_warps,
        note=note,
    )


def _tables(image_strides: list[int], row_strides: list[int]) -> dict[str, Any]:
    """Strides by layer, students' and teachers'; one entry where all layers agree."""
    layers = len(image_strides) // 2
    tables = {
        "IMAGE_STRIDES": tuple(image_strides[:layers]),
        "ROW_STRIDES": tuple(row_strides[:layers]),
        "TEACHER_IMAGE_STRIDES": tuple(image_strides[layers:]),
        "TEACHER_ROW_STRIDES": tuple(row_strides[layers:]),
    }
    if all(len(set(table)) == 1 for table in tables.values()):
        tables = {name: table[:1] for name, table in tables.items()}
    return {**tables, "STRIDED": len(tables["IMAGE_STRIDES"])}
