import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimic_fast.data.tar_index import DamagedTarError, walk_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PROPERTY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_tar(path: Path, members, *, layout: int = tarfile.PAX_FORMAT) -> Path:
    """Members are (name, bytes), or a ready TarInfo."""
    with tarfile.open(path, "w:", format=layout) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as archive:
        return [
            (member.name, member.offset_data, member.size) for member in archive if member.isreg()
        ]


def kind(name: str, type_: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type_, target
    return info


ALPHABET = st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=("Cs",))
PARTS = st.text(ALPHABET, min_size=1, max_size=60).filter(lambda part: part not in (".", ".."))
PATHS = st.lists(PARTS, min_size=1, max_size=5).map("/".join)


@PROPERTY
@given(
    st.lists(st.tuples(PATHS, st.binary(max_size=1500)), max_size=6),
    st.sampled_from(["gnu", "pax"]),
)
def test_walk_equals_tarfile(tmp_path, members, layout):
    path = write_tar(tmp_path / "a.tar", members, layout=FORMATS[layout])
    expected = by_tarfile(path)
    assert list(walk_tar(path)) == expected
    content = path.read_bytes()
    found = [content[offset : offset + size] for _, offset, size in walk_tar(path)]
    assert found == [data for _, data in members]


@pytest.mark.parametrize("layout", FORMATS)
def test_walk_long_names_equal_tarfile(tmp_path, layout):
    members = [("d" * 90 + "/" + "f" * 90 + ".png", b"1"), ("short.png", b"22"), ("g" * 99, b"")]
    path = write_tar(tmp_path / "a.tar", members, layout=FORMATS[layout])
    assert [name for name, _, _ in walk_tar(path)] == [name for name, _ in members]
    assert list(walk_tar(path)) == by_tarfile(path)


def test_walk_fractional_times_of_webdataset_writers_equal_tarfile(tmp_path):
    infos = []
    for index in range(3):
        info = kind(f"{index}.cls", tarfile.REGTYPE)
        info.mtime = 1_700_000_000.25 + index  # becomes a pax record before every member
        infos.append(info)
    path = write_tar(tmp_path / "a.tar", infos)
    assert list(walk_tar(path)) == by_tarfile(path)


def test_walk_links_devices_and_folders_are_left_out(tmp_path):
    members = [
        ("a.png", b"aaa"),
        kind("sym.png", tarfile.SYMTYPE, "/etc/passwd"),
        kind("hard.png", tarfile.LNKTYPE, "a.png"),
        kind("device.png", tarfile.CHRTYPE),
        kind("pipe.png", tarfile.FIFOTYPE),
        kind("folder.png", tarfile.DIRTYPE),
        ("b.png", b"bb"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    assert [name for name, _, _ in walk_tar(path)] == ["a.png", "b.png"]


def test_walk_size_in_base_256_is_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"abc"), ("b.png", b"de")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (3).to_bytes(11)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert list(walk_tar(path)) == [("a.png", 512, 3), ("b.png", 1536, 2)]


@pytest.mark.parametrize("size", [b"-0000000003\0", b"\xff" * 12, b"zzz\0", b"\x80" + b"\x7f" * 11])
def test_walk_forged_size_raises(tmp_path, size):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"abc"), ("b.png", b"de")])
    data = bytearray(path.read_bytes())
    data[124:136] = size.ljust(12, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with pytest.raises(DamagedTarError):
        list(walk_tar(path))


def test_walk_every_truncation_raises_or_ends_between_members(tmp_path):
    members = [("a.png", b"a" * 700), ("b" * 120 + ".png", b"b"), ("c.png", b"c" * 512)]
    path = write_tar(tmp_path / "a.tar", members)
    whole = path.read_bytes()
    full = list(walk_tar(path))
    ends = {offset + -(-size // 512) * 512 for _, offset, size in full}
    for length in range(0, len(whole) - 1024, 64):
        path.write_bytes(whole[:length])
        if length in ends:  # what a writer leaves that was stopped between members
            assert list(walk_tar(path)) == [row for row in full if row[1] < length]
        elif length < max(ends):
            with pytest.raises(DamagedTarError):
                list(walk_tar(path))


@PROPERTY
@given(st.binary(min_size=1, max_size=2000))
def test_walk_random_bytes_raises(tmp_path, data):
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" + data)
    with pytest.raises(DamagedTarError):
        list(walk_tar(path))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=6))
def test_walk_mutated_tar_stays_inside_the_file(tmp_path, changes):
    members = [("a.png", b"a" * 30), ("b" * 120 + ".png", b"b"), ("c.png", b"c")]
    path = write_tar(tmp_path / "a.tar", members)
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at] = value
    for start in range(0, 3072, 512):  # so that the change gets past the checksum
        block = data[start : start + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    path.write_bytes(data)
    try:
        rows = list(walk_tar(path))
    except DamagedTarError:
        return
    assert all(offset > 0 and 0 <= size <= len(data) - offset for _, offset, size in rows)


@pytest.mark.parametrize("record", [b"5 path=x\n", b"9999 path=x\n", b"path=x\n", b"9 path=xy"])
def test_walk_malformed_pax_header_raises(tmp_path, record):
    info = kind("pax", tarfile.XHDTYPE)
    info.size = len(record)
    path = tmp_path / "a.tar"
    header = info.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(
        header + record.ljust(512, b"\0") + kind("a", tarfile.REGTYPE).tobuf() + bytes(1024)
    )
    with pytest.raises(DamagedTarError, match="malformed pax"):
        list(walk_tar(path))


def test_walk_huge_name_header_is_not_read(tmp_path):
    info = kind("pax", tarfile.XHDTYPE)
    info.size = 2**30
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(2**30 + 4096)  # sparse: takes no space
    with pytest.raises(DamagedTarError, match="name header of 1073741824 bytes"):
        list(walk_tar(path))
