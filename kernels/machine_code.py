"""Reads what Triton compiled: LLVM IR for the argument that an access belongs to, and machine code.

Machine code has lost the names of pointers and uses its registers many times over, so an access is
attributed one step earlier, in LLVM IR, where every value is assigned once. Registers, spills and
the instructions themselves come from the machine code: NVIDIA's SASS, AMD's GCN.
"""

import bisect
import itertools
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_NAME = r"%[\w.$-]+"
_KERNEL = re.compile(r"^define [^@]*_kernel [^@]*@[\w.$]+\((.*)$", re.MULTILINE)
_PARAMETER = re.compile(rf"(ptr|\w+)\b[^%]*({_NAME})")
_DEFINITION = re.compile(rf"^\s*({_NAME}) = (.*)$", re.MULTILINE)
_POINTER = re.compile(rf"\bptr(?: addrspace\([0178]\))?(?: [a-z]+(?:\([^)]*\))?)* ({_NAME})")
_PHI_VALUE = re.compile(rf"\[ ({_NAME}), %")

# Triton writes NVIDIA's accesses as PTX inside of LLVM IR ...
_PTX = re.compile(r"\b(ld|st)(?:\.[\w:]+)*?\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[bsuf](\d+) ")
_ESCAPE = re.compile(r"\\[0-9A-F]{2}")  # of a line end or a tab
_PTX_ASYNC = re.compile(r"cp\.async\.c[ag]\.shared\.global.*?\], \[.*?\], (0x[0-9a-f]+)")
# ... and AMD's as loads, stores and calls.
_LOAD = re.compile(rf"= load (?:volatile |atomic )*(<.*?>|\w+), (ptr addrspace\(1\) {_NAME})")
_STORE = re.compile(
    rf"^\s*store (?:volatile |atomic )*(<.*?>|\w+) .*, (ptr addrspace\(1\) {_NAME})"
)
_BUFFER_LOAD = re.compile(r"call (<.*?>|\w+) @llvm\.amdgcn\.raw\.ptr\.buffer\.load\.\w+\((.*)")
_BUFFER_STORE = re.compile(r"@llvm\.amdgcn\.raw\.ptr\.buffer\.store\.\w+\((<.*?>|\w+) (.*)")
_TYPE = re.compile(r"(?:<(\d+) x )?(?:i(\d+)|(\w+))")
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}

_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_SASS_GLOBAL = ("LD", "LDG", "LDGSTS", "ST", "STG")
_SASS_ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_GCN = re.compile(r"^\s+([a-z]\w+)", re.MULTILINE)
_GCN_GLOBAL = re.compile(r"(?:global|buffer|flat)_(?:load|store)_(?:lds_)?(\w+)")
_GCN_ATOMIC = re.compile(r"(?:global|buffer|flat)_atomic_\w+")
_GCN_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
_MATRIX = re.compile(r"[A-Z]*MMA|v_s?mfmac?_\w+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """One instruction that reads or writes global memory.

    Args:
        store: Whether it writes.
        width: Bytes a lane.
        arguments: Positions of the kernel arguments that its address comes from; none if it comes
            from elsewhere.
    """

    store: bool
    width: int
    arguments: frozenset[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineCode:
    """What the machine code of one kernel takes and does.

    Args:
        registers: Of a lane; on AMD its vector registers.
        stack: Bytes of memory that each lane has for itself.
        local_loads: Instructions that read such memory.
        local_stores: Instructions that write it.
        spilled: Registers that the compiler says it spilled; NVIDIA's does not say.
        widths: Instructions on global memory, atomics left out, by the bytes that a lane moves.
        matrix: Matrix instructions, those of the tensor cores.
        global_atomics: Atomic instructions on global memory.
    """

    registers: int
    stack: int
    local_loads: int
    local_stores: int
    spilled: int
    widths: dict[int, int]
    matrix: tuple[str, ...]
    global_atomics: int


def accesses(llvm_ir: str) -> list[Access]:
    """Reads and writes of global memory by a kernel in LLVM IR; atomics are left out."""
    kernel = _KERNEL.search(llvm_ir)
    assert kernel is not None, "LLVM IR without a kernel"
    parameters = {
        name: index if kind == "ptr" else None
        for index, (kind, name) in enumerate(_PARAMETER.findall(kernel[1]))
    }
    definitions = dict(_DEFINITION.findall(llvm_ir))
    return [
        Access(store=store, width=width, arguments=_origins(operands, definitions, parameters))
        for line in llvm_ir[kernel.end() :].splitlines()
        for store, width, operands in _accesses_of(line)
    ]


def instructions(cubin: bytes) -> bytes:
    """The machine code in one of NVIDIA's binaries, an ELF file: what ``nvdisasm --binary`` reads.

    Disassembling many kernels at once takes hardly longer than one.
    """
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [
        struct.unpack_from("<I20xQQ", cubin, table + index * size) for index in range(count)
    ]
    strings = sections[names][1]
    return b"".join(
        cubin[offset : offset + length]
        for name, offset, length in sections
        if cubin.startswith(b".text.", strings + name)
    )


def split_sass(sass: str, sizes: Sequence[int]) -> list[list[str]]:
    """Instructions of each kernel, such as ``LDG.E.128``, of kernels disassembled as one.

    Args:
        sass: What ``nvdisasm --binary`` prints.
        sizes: Bytes of each kernel, in order.
    """
    found: list[list[str]] = [[] for _ in sizes]
    ends = list(itertools.accumulate(sizes))
    for offset, name in _SASS.findall(sass):
        found[bisect.bisect_right(ends, int(offset, 16))].append(name)
    return found


def read_sass(names: Sequence[str], usage: str) -> MachineCode:
    """Reads NVIDIA's machine code.

    Args:
        names: Its instructions.
        usage: What ``cuobjdump --dump-resource-usage`` prints. Its LOCAL is 0 even with spills.
    """
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    parts = [name.split(".") for name in names]
    kinds = Counter(kind for kind, *_ in parts)
    widths = Counter(
        next((_SASS_WIDTHS[part] for part in rest if part in _SASS_WIDTHS), 4)
        for kind, *rest in parts
        if kind in _SASS_GLOBAL
    )
    return MachineCode(
        registers=used["REG"],
        stack=used["STACK"],
        local_loads=kinds["LDL"],
        local_stores=kinds["STL"],
        spilled=0,
        widths=dict(widths),
        matrix=tuple(sorted(filter(_MATRIX.fullmatch, kinds))),
        global_atomics=sum(kinds[name] for name in _SASS_ATOMICS),
    )


def read_gcn(assembly: str) -> MachineCode:
    """Reads AMD's machine code: assembly text with the metadata of the kernel."""
    facts = dict(re.findall(r"^\s+(?:- )?\.(\w+): +(\d+)$", assembly, re.MULTILINE))
    kinds = Counter(_GCN.findall(assembly))
    widths = Counter[int]()
    for name, count in kinds.items():
        if access := _GCN_GLOBAL.fullmatch(name):
            # everything else is bytes and halves: ubyte, sbyte_d16, short, ...
            widths[_GCN_WIDTHS.get(access[1], 1 if "byte" in access[1] else 2)] += count
    return MachineCode(
        registers=int(facts["vgpr_count"]),
        stack=int(facts["private_segment_fixed_size"]),
        local_loads=sum(kinds[name] for name in kinds if name.startswith("scratch_load")),
        local_stores=sum(kinds[name] for name in kinds if name.startswith("scratch_store")),
        spilled=int(facts["vgpr_spill_count"]) + int(facts["sgpr_spill_count"]),
        widths=dict(widths),
        matrix=tuple(sorted(filter(_MATRIX.fullmatch, kinds))),
        global_atomics=sum(kinds[name] for name in kinds if _GCN_ATOMIC.fullmatch(name)),
    )


def _accesses_of(line: str) -> Iterator[tuple[bool, int, str]]:
    """Of each access in a line: whether it stores, bytes a lane, operands with the address."""
    if " asm " in line:
        code, _, operands = line.rpartition('"(')
        code = _ESCAPE.sub(" ", code)
        for kind, vector, bits in _PTX.findall(code):
            yield kind == "st", int(vector or 1) * int(bits) // 8, operands
        for width in _PTX_ASYNC.findall(code):
            yield False, int(width, 16), operands
    elif access := _LOAD.search(line) or _BUFFER_LOAD.search(line):
        yield False, _width(access[1]), access[2]
    elif access := _STORE.search(line) or _BUFFER_STORE.search(line):
        yield True, _width(access[1]), access[2]


def _width(kind: str) -> int:
    """Bytes of an LLVM type such as ``<8 x i16>`` or ``float``."""
    found = _TYPE.match(kind)
    assert found is not None, kind
    return int(found[1] or 1) * (int(found[2]) if found[2] else _BITS[found[3]]) // 8


def _origins(
    operands: str, definitions: dict[str, str], parameters: dict[str, int | None]
) -> frozenset[int]:
    """Positions of the pointer arguments that the pointers among some operands derive from."""
    pending, seen, found = _POINTER.findall(operands), set[str](), set[int]()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in parameters:
            index = parameters[name]
            found |= set() if index is None else {index}
            continue
        source = definitions.get(name, "")
        if " asm " in source or source.startswith("load "):
            continue  # what an address owes to a value in memory is not followed
        if source.startswith("phi "):
            pending += _PHI_VALUE.findall(source)
        else:
            pending += _POINTER.findall(source) or re.findall(_NAME, source)
    return frozenset(found)
