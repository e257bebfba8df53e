"""The gate on compiled kernels. This file is also the program that compiles: in a process of its
own, since Triton interprets kernels in the one of the tests.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import triton
import triton.language as tl
from triton import knobs

from mimic_fast.kernels.aot import TARGETS, Resources, compile_all, failures
from mimic_fast.kernels.aot_case import AotCase

FEW = ("sm_90", "gfx942")


@triton.jit
def scaled(x_ptr, scale_ptr, out_ptr, rows, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for row in range(rows):
        scale = tl.load(scale_ptr + row)
        x = tl.load(x_ptr + row * BLOCK + offs).to(tl.float32)
        tl.store(out_ptr + row * BLOCK + offs, (x * scale).to(out_ptr.dtype.element_ty))


@triton.jit
def centered(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size, other=0.0)
    tl.store(out_ptr + offs, x - tl.sum(x) / size, mask=offs < size)


@triton.jit
def product(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    counts = tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile), out_dtype=tl.int32)
    tl.atomic_add(out_ptr + tile, counts)


@triton.jit
def picked(xs, y_ptr, layer, BLOCK: tl.constexpr):
    x_ptr = xs[0]
    if layer == 1:
        x_ptr = xs[1]
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def broken(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 1_000_000, "the block is too small")
    tl.store(x_ptr, 0.0)


def scaled_case(name: str, kind: str, **changes) -> AotCase:
    case = AotCase(
        name=name,
        kernel=scaled,
        signature={
            "x_ptr": f"*{kind}",
            "scale_ptr": "*fp32",
            "out_ptr": f"*{kind}",
            "rows": "i32",
            "BLOCK": "constexpr",
        },
        constants={"BLOCK": 2048},
        divisible=(("x_ptr",), ("scale_ptr",), ("out_ptr",)),
    )
    return replace(case, **changes)


def spilling_case(name: str, block: int) -> AotCase:
    """A warp that holds a whole row."""
    return AotCase(
        name=name,
        kernel=centered,
        signature={"x_ptr": "*fp32", "out_ptr": "*fp32", "size": "i32", "BLOCK": "constexpr"},
        constants={"BLOCK": block},
        divisible=(("x_ptr",), ("out_ptr",), ("size",)),
        num_warps=1,
    )


PRODUCT = AotCase(
    name="product",
    kernel=product,
    signature={"x_ptr": "*i8", "y_ptr": "*i8", "out_ptr": "*i32", "BLOCK": "constexpr"},
    constants={"BLOCK": 64},
    divisible=(("x_ptr",), ("y_ptr",), ("out_ptr",)),
)
PICKED = AotCase(
    name="picked",
    kernel=picked,
    signature={"xs": ("*fp16", "*fp16"), "y_ptr": "*fp16", "layer": "i32", "BLOCK": "constexpr"},
    constants={"BLOCK": 2048},
    divisible=(("xs", 0), ("xs", 1), ("y_ptr",)),
    data_pointers=("xs",),
)
BROKEN = AotCase(
    name="broken",
    kernel=broken,
    signature={"x_ptr": "*fp32", "BLOCK": "constexpr"},
    constants={"BLOCK": 16},
    divisible=(),
)
CASES: tuple[tuple[AotCase, tuple[str, ...]], ...] = (
    (scaled_case("wide", "fp16"), tuple(TARGETS)),
    (BROKEN, ("sm_80",)),
    (scaled_case("unaligned", "fp16", divisible=()), FEW),
    (scaled_case("unaligned by nature", "fp16", divisible=(), data=False, note="odd"), ("gfx942",)),
    (
        scaled_case(
            "narrow on AMD", "fp16", divisible=(), data=False, narrow_on=("gfx",), note="a"
        ),
        FEW,
    ),
    (scaled_case("unaligned store", "fp16", divisible=(("x_ptr",), ("scale_ptr",))), FEW),
    (scaled_case("float32", "fp32"), FEW),
    (scaled_case("float32 named", "fp32", data_pointers=("x_ptr", "out_ptr")), FEW),
    (PICKED, FEW),
    (PRODUCT, tuple(TARGETS)),
    (spilling_case("spilling sm_90", 8192), ("sm_90",)),
    (spilling_case("spilling gfx942", 32768), ("gfx942",)),
    (spilling_case("full gfx942", 16384), ("gfx942",)),
)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], Resources]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = [Resources(**json.loads(line)) for line in done.stdout.splitlines()]
    return {(row.case, row.target): row for row in found}


@pytest.mark.parametrize("target", TARGETS)
def test_lean_kernel_passes_the_gate_on_every_target(rows, target):
    row = rows["wide", target]

    assert failures(row) == ()
    assert 0 < row.registers < 64
    assert row.loads == row.wide_loads > 0
    assert row.stores == row.wide_stores > 0
    assert row.matrix == ""
    assert row.global_atomics == 0


def test_large_tensors_are_addressed_otherwise_on_amd(rows):
    assert replace(rows["wide", "gfx942_large"], target="gfx942") != rows["wide", "gfx942"]


@pytest.mark.parametrize("target", FEW)
def test_narrow_data_accesses_fail_the_gate(rows, target):
    row = rows["unaligned", target]

    assert row.wide_loads == row.wide_stores == 0
    assert failures(row) == (
        f"0 of {row.loads} data loads are 128-bit",
        f"0 of {row.stores} data stores are 128-bit",
    )


@pytest.mark.parametrize("target", FEW)
def test_narrow_stores_fail_where_loads_are_wide(rows, target):
    row = rows["unaligned store", target]

    assert failures(row) == (f"0 of {row.stores} data stores are 128-bit",)


def test_narrow_accesses_are_let_pass_where_the_case_says_why(rows):
    row = rows["unaligned by nature", "gfx942"]

    assert row.wide_loads == 0
    assert row.note == "odd"
    assert failures(row) == ()


def test_narrow_accesses_are_let_pass_only_on_the_targets_that_the_case_names(rows):
    assert len(failures(rows["narrow on AMD", "sm_90"])) == 2
    assert failures(rows["narrow on AMD", "gfx942"]) == ()
    assert rows["narrow on AMD", "sm_90"].note == ""


@pytest.mark.parametrize("target", FEW)
def test_side_tables_are_no_data_once_the_data_pointers_are_named(rows, target):
    row = rows["float32", target]

    assert failures(row) == (f"{row.wide_loads} of {row.loads} data loads are 128-bit",)
    assert failures(rows["float32 named", target]) == ()


@pytest.mark.parametrize("target", FEW)
def test_pointers_of_a_table_are_followed(rows, target):
    row = rows["picked", target]

    assert row.loads == row.wide_loads > 0
    assert row.stores == 0


def test_spilling_kernels_fail_the_gate(rows):
    nvidia, amd = rows["spilling sm_90", "sm_90"], rows["spilling gfx942", "gfx942"]

    assert nvidia.stack > 0
    assert nvidia.local_loads > 0
    assert nvidia.local_stores > 0
    assert amd.spilled > 0
    assert amd.stack > 0
    for row in (nvidia, amd):
        local = row.local_loads + row.local_stores
        assert failures(row) == (
            f"{row.spilled} registers spilled, {row.stack} bytes of stack, "
            f"{local} local memory instructions",
            f"{row.registers} registers, at most 128",
        )


def test_too_many_registers_without_a_spill_fail_the_gate(rows):
    row = rows["full gfx942", "gfx942"]

    assert row.stack == row.spilled == 0
    assert failures(row) == (f"{row.registers} registers, at most 128",)


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "IMMA"), ("sm_90", "IGMMA"), ("sm_100", "UTCIMMA"), ("gfx942", "v_mfma_i32_")],
)
def test_matrix_instructions_and_global_atomics_are_seen(rows, target, instruction):
    row = rows["product", target]

    assert row.matrix.startswith(instruction)
    assert row.global_atomics == 4096 // (256 if target == "gfx942" else 128)
    assert failures(row) == ()


def test_kernel_that_does_not_compile_fails_with_the_compilers_words(rows):
    (reason,) = failures(rows["broken", "sm_80"])

    assert reason.startswith("does not compile: ")
    assert "the block is too small" in reason


def test_shared_memory_beyond_the_target_fails_the_gate():
    fits = Resources(case="a", target="gfx942", shared=65_536, loads=1, wide_loads=1)

    assert failures(fits) == ()
    assert failures(replace(fits, shared=65_537)) == (
        "65537 bytes of shared memory, at most 65536",
    )


def test_rows_that_nothing_was_read_from_fail_the_gate():
    blank = Resources(case="a", target="sm_90")
    split = Resources(case="a", target="sm_90", loads=4, wide_loads=4, split=2)

    assert failures(blank) == ("no data access was recognized",)
    assert failures(split) == ("2 accesses are parts of wider ones",)


def test_process_that_interprets_kernels_is_refused():
    if not knobs.runtime.interpret:
        pytest.skip("kernels are compiled in this process")

    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        next(compile_all([PRODUCT]))


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="unknown target 'sm_70'; have: sm_80, "):
        next(compile_all([PRODUCT], ["sm_90", "sm_70"]))


if __name__ == "__main__":
    for name in TARGETS:
        for compiled in compile_all([case for case, targets in CASES if name in targets], [name]):
            sys.stdout.write(json.dumps(asdict(compiled)) + "\n")
