"""What a compiled kernel may take: the limits behind ``mimic-fast aot --check``."""

from collections.abc import Mapping
from dataclasses import dataclass

REGISTER_LIMIT = 128  # of a lane, so that at least four warps find room on each scheduler
SHARED_LIMIT: Mapping[str, int] = {  # bytes that a program may take
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
    "gfx942_large": 64 << 10,
}
WIDE = 16  # bytes a lane of the widest access that all targets have: 128 bits
WIDE_SHARE = 0.99  # of the data accesses


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one specialization takes on one target.

    Args:
        case: Name of the specialization.
        target: One of :data:`TARGETS`.
        error: Why it does not compile, one line; all else is 0 then.
        registers: Of a lane; on AMD its vector registers.
        stack: Bytes of local memory of a lane.
        local_loads: Instructions that read local memory.
        local_stores: Instructions that write it.
        spilled: Spilled registers, as far as the compiler says so (AMD's does).
        shared: Bytes of shared memory of a program.
        loads: Instructions that load data, see :class:`AotCase`.
        wide_loads: Those of at least 128 bits a lane.
        stores: Instructions that store data.
        wide_stores: Those of at least 128 bits a lane.
        split: Accesses narrower than any that the last compiler was given: it took wide ones apart.
        matrix: Matrix instructions, those of the tensor cores, or empty.
        global_atomics: Atomic instructions on global memory.
        data: Whether data can be moved 128 bits at a time.
        note: Why not, or empty.
    """

    case: str
    target: str
    error: str = ""
    registers: int = 0
    stack: int = 0
    local_loads: int = 0
    local_stores: int = 0
    spilled: int = 0
    shared: int = 0
    loads: int = 0
    wide_loads: int = 0
    stores: int = 0
    wide_stores: int = 0
    split: int = 0
    matrix: str = ""
    global_atomics: int = 0
    data: bool = True
    note: str = ""


def failures(row: Resources) -> tuple[str, ...]:
    """What is wrong with one row, a phrase each; empty if nothing is."""
    if row.error:
        return (f"does not compile: {row.error}",)
    found = []
    local = row.local_loads + row.local_stores
    if row.spilled or row.stack or local:
        found.append(
            f"{row.spilled} registers spilled, {row.stack} bytes of stack, "
            f"{local} local memory instructions"
        )
    if row.registers > REGISTER_LIMIT:
        found.append(f"{row.registers} registers, at most {REGISTER_LIMIT}")
    if row.shared > SHARED_LIMIT[row.target]:
        found.append(f"{row.shared} bytes of shared memory, at most {SHARED_LIMIT[row.target]}")
    if row.data:
        if not row.loads + row.stores:
            found.append("no data access was recognized")
        for kind, wide, total in (
            ("loads", row.wide_loads, row.loads),
            ("stores", row.wide_stores, row.stores),
        ):
            if wide < WIDE_SHARE * total:
                found.append(f"{wide} of {total} data {kind} are 128-bit")
        if row.split:
            found.append(f"{row.split} accesses are parts of wider ones")
    return tuple(found)
