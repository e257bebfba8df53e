"""Compiles the Triton kernels for GPUs that are not there and reads what they take.

Every specialization that production launches is compiled ahead of time for NVIDIA's sm_80, sm_90,
sm_100 and AMD's gfx942 with the compilers of the Triton wheel. That proves that it compiles, what
it spills and how wide it moves data, neither that it is right (the interpreter does) nor fast.

Runs in a process that never had TRITON_INTERPRET set: ``mimic-fast aot --check`` starts one.
"""

import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from mimic_fast.kernels.aot_case import AotCase
from mimic_fast.kernels.aot_gate import WIDE, Resources, failures
from mimic_fast.kernels.machine_code import (
    MachineCode,
    accesses,
    instructions,
    read_gcn,
    read_sass,
    split_sass,
)

__all__ = ["TARGETS", "Resources", "compile_all", "failures", "production_cases"]

TARGETS: Mapping[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx942_large": GPUTarget("hip", "gfx942", 64),  # tensors of more than 2 GiB: other addressing
}
_BATCH = 16  # cases that are disassembled at once


def production_cases() -> list[AotCase]:
    """Every specialization that production launches."""
    from mimic_fast.kernels import distill_loss, mi_histogram

    cases = [*distill_loss.aot_cases(), *mi_histogram.aot_cases()]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two specializations of one name"
    return cases


def compile_all(
    cases: Sequence[AotCase], targets: Sequence[str] = tuple(TARGETS)
) -> Iterator[Resources]:
    """Compiles every case for every target, afresh, and yields what each takes.

    Raises:
        ValueError: If a target is unknown.
        RuntimeError: If this process interprets Triton kernels instead of compiling them.
    """
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        raise ValueError(f"unknown target {unknown[0]!r}; have: {', '.join(TARGETS)}")
    if knobs.runtime.interpret:
        raise RuntimeError(
            "this process interprets Triton kernels; compile them in one without TRITON_INTERPRET"
        )
    for start in range(0, len(cases), _BATCH):
        for target in targets:
            with tempfile.TemporaryDirectory() as folder, _settings(folder):
                rows = list(_compiled(cases[start : start + _BATCH], target, Path(folder)))
            yield from rows


@contextmanager
def _settings(folder: str) -> Iterator[None]:
    """Triton's settings while we compile: a cache of our own, and no line numbers.

    Line numbers change no instruction and take up to a fifth of the time.
    """
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = folder
        knobs.compilation.disable_line_info = True
        yield


def _compiled(cases: Sequence[AotCase], target: str, folder: Path) -> Iterator[Resources]:
    built: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for case in cases:
        options = {"num_warps": case.num_warps}
        if case.most_registers is not None and TARGETS[target].backend == "cuda":
            options["maxnreg"] = case.most_registers
        try:
            kernel = triton.compile(_source(case, target), TARGETS[target], options)
        except (TritonError, RuntimeError) as error:  # what Triton's stages raise
            errors[case.name] = " ".join(str(error).split())[-300:]
        else:
            built[case.name] = kernel
    codes = dict(zip(built, _machine_codes(list(built.values()), folder), strict=True))
    for case in cases:
        if case.name in built:
            yield _row(case, target, built[case.name], codes[case.name])
        else:
            yield Resources(case=case.name, target=target, error=errors[case.name])


def _row(case: AotCase, target: str, kernel: Any, code: MachineCode) -> Resources:
    every = accesses(kernel.asm["llir"])
    positions = _data_positions(case)
    # An access of unknown origin counts as data.
    data = [item for item in every if not item.arguments or item.arguments & positions]
    wide = [access for access in data if access.width >= WIDE]
    is_wide = case.data or (bool(case.narrow_on) and not target.startswith(case.narrow_on))
    narrowest = min((access.width for access in every), default=WIDE)
    return Resources(
        case=case.name,
        target=target,
        registers=code.registers,
        stack=code.stack,
        local_loads=code.local_loads,
        local_stores=code.local_stores,
        spilled=code.spilled,
        shared=kernel.metadata.shared,
        loads=sum(not access.store for access in data),
        wide_loads=sum(not access.store for access in wide),
        stores=sum(access.store for access in data),
        wide_stores=sum(access.store for access in wide),
        split=sum(count for width, count in code.widths.items() if width < min(WIDE, narrowest)),
        matrix=" ".join(code.matrix),
        global_atomics=code.global_atomics,
        data=is_wide,
        note="" if is_wide else case.note,
    )


def _source(case: AotCase, target: str) -> ASTSource:
    """The source as the launcher would specialize it on this target."""
    names = case.kernel.arg_names
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for name, *inner in case.divisible:
        attributes[(names.index(name), *map(int, inner))] = [["tt.divisibility", 16]]
    if target == "gfx942":
        for path, kind in _leaves(case):
            if kind.startswith("*"):
                attributes.setdefault(path, []).append(["tt.pointer_range", 32])
    return ASTSource(
        case.kernel,
        {name: case.signature[name] for name in names},
        constexprs=dict(case.constants),
        attrs=attributes,
    )


def _machine_codes(kernels: Sequence[Any], folder: Path) -> list[MachineCode]:
    """Machine code of kernels for one target."""
    if not kernels or "amdgcn" in kernels[0].asm:
        return [read_gcn(kernel.asm["amdgcn"]) for kernel in kernels]
    binaries = [instructions(kernel.asm["cubin"]) for kernel in kernels]
    architecture = kernels[0].metadata.target.arch
    (folder / "kernels.bin").write_bytes(b"".join(binaries))
    name = f"SM{architecture}{'a' if architecture >= 90 else ''}"  # with what only this one has
    sass = _output(
        knobs.nvidia.nvdisasm.path, "-ndf", "--binary", name, str(folder / "kernels.bin")
    )
    parts = split_sass(sass, [len(binary) for binary in binaries])
    return [
        read_sass(part, _usage(kernel, folder)) for part, kernel in zip(parts, kernels, strict=True)
    ]


def _usage(kernel: Any, folder: Path) -> str:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _leaves(case: AotCase) -> list[tuple[tuple[int, ...], str]]:
    """Position and type of every argument; the members of a tuple are arguments of their own."""

    def leaves(path: tuple[int, ...], kind: Any) -> Iterator[tuple[tuple[int, ...], str]]:
        if isinstance(kind, str):
            yield path, kind
        else:
            for index, inner in enumerate(kind):
                yield from leaves((*path, index), inner)

    return [
        leaf
        for index, name in enumerate(case.kernel.arg_names)
        for leaf in leaves((index,), case.signature[name])
    ]


def _data_positions(case: AotCase) -> frozenset[int]:
    """Positions, among the arguments that the compiled kernel takes, of the pointers to data."""
    names = case.kernel.arg_names
    taken = [(names[path[0]], kind) for path, kind in _leaves(case) if kind != "constexpr"]
    pointers = [(at, name, kind) for at, (name, kind) in enumerate(taken) if kind.startswith("*")]
    named = frozenset(at for at, name, _ in pointers if name in case.data_pointers)
    narrow = frozenset(at for at, _, kind in pointers if not kind.endswith(("32", "64")))
    return named or narrow or frozenset(at for at, _, _ in pointers)
