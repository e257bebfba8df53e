"""Reading compiled kernels: lines as Triton 3.8 writes them. What it compiles is in test_aot.py."""

import struct

import pytest

from mimic_fast.kernels.machine_code import (
    accesses,
    instructions,
    read_gcn,
    read_sass,
    split_sass,
)

HEADER = (
    "define ptx_kernel void @doubled(ptr addrspace(1) inreg readonly captures(none) %0, "
    "ptr addrspace(1) %1, i64 %2, ptr addrspace(1) readnone captures(none) %3) "
    "local_unnamed_addr #0 !dbg !4 {\n"
)


def found(*lines: str) -> list[tuple[bool, int, set[int]]]:
    text = HEADER + "".join(f"  {line}, !dbg !7\n" for line in lines) + "  ret void\n}\n"
    return [(access.store, access.width, set(access.arguments)) for access in accesses(text)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            'tail call { i32, i32, i32, i32 } asm sideeffect "mov.u32 $0, 0x0;\\0A\\09@$5 '
            'ld.global.v4.b32 { $0, $1, $2, $3 }, [ $4 + 0 ];", "=r,=r,=r,=r,l,b"'
            "(ptr addrspace(1) %0, i1 %9) #2",
            (False, 16, {0}),
        ),
        (
            'tail call i16 asm sideeffect "@$2 ld.global.L1::evict_last.b16 { $0 }, [ $1 + 0 ];", '
            '"=c,l,b"(ptr addrspace(1) %0, i1 %9) #2',
            (False, 2, {0}),
        ),
        (
            'tail call void asm sideeffect "@$3 st.global.v2.b32 [ $2 + 0 ], { $0, $1 };", '
            '"r,r,l,b"(i32 %8, i32 %9, ptr addrspace(1) %1, i1 %9) #2',
            (True, 8, {1}),
        ),
        (
            'tail call void asm sideeffect "cp.async.cg.shared.global [ $0 + 0 ], [ $1 + 0 ], '
            '0x10, $2;", "r,l,r"(ptr addrspace(3) nonnull %50, ptr addrspace(1) %1, i32 %5) #2',
            (False, 16, {1}),
        ),
        ("load <8 x i16>, ptr addrspace(1) %0, align 16", (False, 16, {0})),
        ("load float, ptr addrspace(1) %0, align 4", (False, 4, {0})),
    ],
)
def test_load_or_store_is_read_with_its_width(line, expected):
    line = line if "void" in line else f"%20 = {line}"

    assert found(line) == [expected]


def test_stores_and_buffer_calls_of_amd_are_read():
    assert found(
        "store <2 x float> %8, ptr addrspace(1) %1, align 8",
        "%32 = tail call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %1,"
        " i16 0, i64 2147483646, i32 159744)",
        "%33 = tail call <4 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v4i32(ptr addrspace(8) %32,"
        " i32 %80, i32 0, i32 0)",
        "tail call void @llvm.amdgcn.raw.ptr.buffer.store.f16(half %9, ptr addrspace(8) %32,"
        " i32 %80, i32 0, i32 0)",
    ) == [(True, 8, {1}), (False, 16, {1}), (True, 2, {1})]


def test_addresses_are_followed_to_the_arguments():
    assert found(
        "%10 = select i1 %9, ptr addrspace(1) %0, ptr addrspace(1) %1",
        "%11 = getelementptr inbounds [2 x i8], ptr addrspace(1) %10, i64 %2",
        "%12 = load i16, ptr addrspace(1) %11, align 2",
        "%13 = phi ptr addrspace(1) [ %1, %.lr.ph ], [ %14, %7 ]",
        "%14 = getelementptr i8, ptr addrspace(1) %13, i64 256",
        "%15 = load i16, ptr addrspace(1) %14, align 2",
        "%16 = ptrtoint ptr addrspace(1) %0 to i64",
        "%17 = add i64 %16, %2",
        "%18 = inttoptr i64 %17 to ptr addrspace(1)",
        "%19 = load i16, ptr addrspace(1) %18, align 2",
    ) == [(False, 2, {0, 1}), (False, 2, {1}), (False, 2, {0})]


def test_pointer_out_of_memory_has_no_known_origin():
    assert found(
        "%10 = load i64, ptr addrspace(1) %0, align 8",
        "%11 = inttoptr i64 %10 to ptr addrspace(1)",
        "%12 = load i16, ptr addrspace(1) %11, align 2",
    ) == [(False, 8, {0}), (False, 2, set())]


def test_offset_out_of_memory_is_no_origin():
    assert found(
        "%10 = load i64, ptr addrspace(1) %0, align 8",
        "%11 = getelementptr i8, ptr addrspace(1) %1, i64 %10",
        "%12 = load i8, ptr addrspace(1) %11, align 1",
    ) == [(False, 8, {0}), (False, 1, {1})]


def test_shared_memory_and_atomics_are_no_accesses():
    assert (
        found(
            "%10 = load i32, ptr addrspace(3) %9, align 4",
            "store i32 %10, ptr addrspace(3) %9, align 4",
            '%11 = tail call i32 asm sideeffect "@$3 atom.global.gpu.acq_rel.add.u32 $0, '
            '[ $1 + 0 ], $2;", "=r,l,r,b"(ptr addrspace(1) %1, i32 %10, i1 %9) #2',
        )
        == []
    )


SASS = """
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/             @!UP0 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0040*/               @P1 STL [R1], R4 ;
        /*0050*/                   LDL.LU R4, [R1] ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
.L_x_1:
        /*0070*/                   REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0080*/                   IGMMA.64x64x32.S8.S8 R24, gdesc[UR8], R24 ;
        /*0090*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00a0*/                   REDUX.SUM UR4, R4 ;
"""
USAGE = " Function doubled:\n  REG:88 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:432 TEXTURE:0\n"


def test_machine_code_of_nvidia_is_counted():
    (names,) = split_sass(SASS, [0xB0])

    code = read_sass(names, USAGE)

    assert (code.registers, code.stack) == (88, 24)
    assert (code.local_loads, code.local_stores) == (1, 1)
    assert code.widths == {16: 2, 2: 1, 8: 1, 4: 1}
    assert code.matrix == ("IGMMA",)
    assert code.global_atomics == 1


def test_kernels_disassembled_as_one_are_parted_by_their_sizes():
    first, empty, second = split_sass(SASS, [0x20, 0, 0x90])

    assert first == ["LDC", "LDG.E.128.CONSTANT"]
    assert empty == []
    assert second[0] == "LDG.E.U16"
    assert len(second) == 9


def elf(**sections: bytes) -> bytes:
    """A file with these sections, laid out as in NVIDIA's binaries."""
    names = b"\0" + b"".join(f".{name.replace('_', '.')}\0".encode() for name in sections)
    body, headers = bytearray(64), []
    for name, content in (*sections.items(), ("", names)):
        text = f".{name.replace('_', '.')}\0".encode()
        headers.append(
            struct.pack("<I20xQQ", names.find(text) if name else 0, len(body), len(content))
        )
        body += content
    body[0x28:0x30] = struct.pack("<Q", len(body))
    body[0x3A:0x40] = struct.pack("<HHH", 64, len(headers), len(sections))
    return bytes(body) + b"".join(header.ljust(64, b"\0") for header in headers)


def test_instructions_are_the_text_sections_of_a_binary():
    binary = elf(text_doubled=b"abcd", nv_info=b"facts", text_helper=b"ef")

    assert instructions(binary) == b"abcdef"


GCN = """
\tbuffer_load_dwordx4 v[30:33], v52, s[8:11], 0 offen
\tglobal_load_dword v4, v[2:3], off
\tglobal_load_ushort v4, v[2:3], off
\tglobal_load_ubyte v4, v[2:3], off
\tflat_store_dwordx2 v[2:3], v[4:5]
\tglobal_store_dwordx4 v[12:13], v[8:11], off
\tscratch_store_dword off, v1, s0
\tscratch_load_dwordx2 v[1:2], off, s0
\tglobal_atomic_add_u32 v[2:3], v4, off
\tv_mfma_i32_32x32x16_i8 a[0:15], v[2:3], v[4:5], a[0:15]
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
  - .agpr_count:     16
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 2
    .vgpr_count:     42
    .vgpr_spill_count: 3
"""


def test_machine_code_of_amd_is_counted():
    code = read_gcn(GCN)

    assert (code.registers, code.stack, code.spilled) == (42, 12, 5)
    assert (code.local_loads, code.local_stores) == (1, 1)
    assert code.widths == {16: 2, 4: 1, 2: 1, 1: 1, 8: 1}
    assert code.matrix == ("v_mfma_i32_32x32x16_i8",)
    assert code.global_atomics == 1
