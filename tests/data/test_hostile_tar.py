"""Tar shards made by somebody who means harm: one clear line, and nothing written."""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimic_fast.config import DataSettings
from mimic_fast.data.clean_set import draw_clean_set, write_clean_set
from mimic_fast.data.items import Limits, decode_image
from mimic_fast.data.sources import open_source
from mimic_fast.data.tar_shards import open_tar_shards
from mimic_fast.errors import UnsafeInputError, UsageError

ALL = DataSettings(clean_fraction=1, allow_budget=True)
PROPERTY = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def member(name: str, *, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_tar(path: Path, members: Sequence[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else member(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, with contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def home(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    return folder


NAMES = [
    "../../escape.png",
    "../" * 40 + "etc/cron.d/escape.png",
    "/absolute.png",
    "//host/share.png",
    "a/../../b.png",
    "C:\\windows\\b.png",
    "~/.ssh/authorized_keys.png",
    "$(touch escaped).png",
    "line\nbreak.png",
    "escape\x1b[2J.png",
    "%s%n{0}.png",
    "n" * 5000 + ".png",
]


@pytest.mark.parametrize("when", [0.0, None], ids=["index stored", "index not stored"])
def test_hostile_names_are_keys_and_nothing_is_written(tmp_path, home, encode_image, when):
    images = [encode_image(seed) for seed in range(len(NAMES))]
    (tmp_path / "in").mkdir()
    shard = write_tar(tmp_path / "in/s.tar", list(zip(NAMES, images, strict=True)))
    if when is not None:
        os.utime(shard, (when, when))
    before = tree(tmp_path)
    source = open_source(str(shard))
    clean_set = draw_clean_set(source, ALL, seed=0)
    assert sorted(source.read(index) for index in range(len(source))) == sorted(images)
    assert len(clean_set) == len(NAMES)
    assert all(key.startswith("s/") and key.splitlines() == [key] for key in source.keys)
    assert tree(tmp_path) == before
    written = {path.name for path in home.rglob("*")} - {".cache", "mimic_fast", "tar_index"}
    assert all(re.fullmatch(r"[0-9a-f]{64}\.json", name) for name in written)
    assert len(written) == (when is not None)


def test_hostile_names_reach_no_path_when_the_set_is_written(tmp_path, home, encode_image):
    shard = write_tar(tmp_path / "s.tar", [(name, encode_image(1)) for name in NAMES[:6]])
    before = tree(tmp_path)
    write_clean_set(draw_clean_set(open_source(str(shard)), ALL, seed=0), tmp_path / "run")
    assert set(tree(tmp_path)) - set(before) == {"run", "run/clean_set.json"}


@pytest.mark.parametrize(
    "twin",
    ["1.png", "./1.png", "1.PNG", "1.cls"],
)
def test_key_that_comes_twice_is_refused_by_name(tmp_path, twin):
    members = [("1.png", b"a"), ("1.cls", b"0"), (twin, b"0")]
    shard = write_tar(tmp_path / "s.tar", members)
    with pytest.raises(
        UnsafeInputError, match=rf"s\.tar holds '{re.escape(twin)}' twice"
    ) as caught:
        open_tar_shards([shard], name="data")
    assert "\n" not in str(caught.value)


def test_key_that_two_shards_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("b").mkdir()
    shards = [Path("b.tar"), Path("a/b.tar"), Path("b/x.tar")]
    for shard, name in zip(shards, ["x/1.png", "1.png", "1.png"], strict=True):
        write_tar(shard, [(name, b"x")])
    with pytest.raises(UnsafeInputError, match="holds two items of the key 'b/x/1'"):
        open_tar_shards(shards, name="data")


def test_names_that_differ_only_in_what_is_escaped_are_refused(tmp_path):
    shard = write_tar(tmp_path / "s.tar", [("a\n.png", b"1"), ("a\\n.png", b"2")])
    with pytest.raises(UnsafeInputError, match="twice"):
        open_tar_shards([shard], name="data")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
@pytest.mark.parametrize("target", ["/etc/passwd", "../../secret.png", "1.png", "2.png"])
def test_links_are_not_followed(tmp_path, kind, target):
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)
    link = member("2.png", kind=kind, target=target)
    shard = write_tar(folder / "s.tar", [(link, b""), ("1.png", b"one")])
    before = tree(tmp_path)
    source = open_tar_shards([shard], name="data")
    assert source.keys == ("s/1",)
    assert source.read(0) == b"one"
    assert tree(tmp_path) == before


def test_shard_of_links_only_has_no_image(tmp_path):
    link = member("1.png", kind=tarfile.SYMTYPE, target="/etc/passwd")
    shard = write_tar(tmp_path / "s.tar", [(link, b"")])
    with pytest.raises(UsageError, match="no image in 1 tar shards"):
        open_tar_shards([shard], name="data")


def test_empty_members_are_quarantined(tmp_path, encode_image):
    members = [(f"{index}.png", encode_image(index)) for index in range(3)]
    shard = write_tar(tmp_path / "s.tar", [*members, ("empty.png", b"")])
    clean_set = draw_clean_set(open_tar_shards([shard], name="data"), ALL, seed=0)
    assert clean_set.quarantined == (("s/empty", "is empty"),)
    assert len(clean_set) == 3


def test_shard_of_empty_members_is_refused_in_one_line(tmp_path):
    shard = write_tar(tmp_path / "s.tar", [(f"{index}.png", b"") for index in range(3)])
    with pytest.raises(UnsafeInputError, match=r"0 of 3 images can be decoded.* is empty$"):
        draw_clean_set(open_tar_shards([shard], name="data"), ALL, seed=0)


def bomb(side: int) -> bytes:
    """A whole PNG of ``side`` x ``side`` black pixels, one bit each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    squeeze = zlib.compressobj(9)
    rows = [squeeze.compress(bytes(1 + -(-side // 8))) for _ in range(side)]
    header = side.to_bytes(4) * 2 + b"\x01\x00\x00\x00\x00"
    body = b"".join(rows) + squeeze.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def test_bomb_is_quarantined_and_the_others_are_drawn(tmp_path, encode_image):
    packed = bomb(12_000)  # 144 million pixels
    assert len(packed) < 30_000
    claimed = bytearray(encode_image(9))
    claimed[16:24] = (60_000).to_bytes(4) * 2
    claimed[29:33] = zlib.crc32(bytes(claimed[12:29])).to_bytes(4)
    members = [(f"{index}.png", encode_image(index)) for index in range(3)]
    bombs = [("bomb.png", packed), ("claim.png", bytes(claimed))]
    shard = write_tar(tmp_path / "s.tar", members + bombs)
    clean_set = draw_clean_set(open_source(str(shard)), ALL, seed=0)
    reasons = dict(clean_set.quarantined)
    assert reasons.keys() == {"s/bomb", "s/claim"}
    assert reasons["s/bomb"] == "has 12000 x 12000 pixels, more than the 64000000 allowed"
    assert "3600000000 pixels" in reasons["s/claim"]
    assert len(clean_set) == 3


def test_limits_decide_what_is_too_large(tmp_path, encode_image):
    small, large = encode_image(0, size=(8, 8)), encode_image(0, size=(40, 40))
    shard = write_tar(tmp_path / "s.tar", [("a.png", small), ("b.png", small), ("c.png", large)])
    for limits, reason in (
        (Limits(max_pixels=1599), "has 40 x 40 pixels, more than the 1599 allowed"),
        (
            Limits(max_item_bytes=len(large) - 1),
            f"has {len(large)} bytes, more than the {len(large) - 1} allowed",
        ),
    ):
        clean_set = draw_clean_set(open_source(str(shard), limits=limits), ALL, seed=0)
        assert clean_set.quarantined == (("s/c", reason),)
    exact = Limits(max_pixels=1600, max_item_bytes=len(large))
    assert not draw_clean_set(open_source(str(shard), limits=exact), ALL, seed=0).quarantined


def test_size_that_is_claimed_and_not_there_is_refused(tmp_path):
    info = member("1.png")
    info.size = 2**40
    shard = tmp_path / "s.tar"
    shard.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UnsafeInputError, match=r"s\.tar is cut off: '1\.png' is not all there"):
        open_source(str(shard))


def test_huge_sparse_member_is_quarantined_unread(tmp_path, encode_image):
    info = member("huge.png")
    info.size = 2**40
    shard = write_tar(tmp_path / "s.tar", [("1.png", encode_image(1)), ("2.png", encode_image(2))])
    content = shard.read_bytes()
    with tarfile.open(shard) as archive:
        end = max(item.offset_data + -(-item.size // 512) * 512 for item in archive)
    with shard.open("wb") as file:
        file.write(content[:end] + info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(end + 512 + 2**40)  # sparse: takes no space
    clean_set = draw_clean_set(open_source(str(shard)), ALL, seed=0)
    assert clean_set.quarantined == (
        ("s/huge", "has 1099511627776 bytes, more than the 268435456 allowed"),
    )


def test_message_about_a_name_of_a_million_characters_is_short(tmp_path):
    name = "n" * 1_000_000 + ".png"
    for members in ([(name, b"x"), (name, b"y")], [(name[:-4] + ".cls", b"no number")]):
        shard = write_tar(tmp_path / "s.tar", members)
        with pytest.raises((UnsafeInputError, UsageError)) as caught:
            open_tar_shards([shard], name="data")
        assert len(str(caught.value)) < 500


def test_pipe_and_folder_named_like_a_shard_are_left_out(tmp_path, encode_image):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    write_tar(tmp_path / "s.tar", [("1.png", b"x")])
    assert open_source(str(tmp_path)).keys == ("s/1",)


VALID = [
    ("1.png", b"a" * 700),
    ("1.cls", b"3"),
    ("long/" + "b" * 120 + ".jpg", b"b"),
    ("long/" + "b" * 120 + ".cls", b"4"),
]


@PROPERTY
@given(
    cut=st.none() | st.integers(0, 9000),
    changes=st.lists(
        st.tuples(st.integers(0, 5500), st.binary(min_size=1, max_size=4)), max_size=5
    ),
    mend=st.booleans(),
)
def test_mutated_shard_opens_or_is_refused_in_one_line(tmp_path, cut, changes, mend):
    shard = write_tar(tmp_path / "s.tar", VALID)
    data = bytearray(shard.read_bytes())
    for at, value in changes:
        data[at : at + len(value)] = value
    for start in range(0, len(data), 512) if mend else ():  # past the checksum
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    shard.write_bytes(data[:cut])
    before = tree(tmp_path)
    message, source = "one line", None
    try:
        source = open_tar_shards([shard], name="data", cache=tmp_path / "cache")
    except (UnsafeInputError, UsageError) as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    if source is not None:
        assert len(set(source.keys)) == len(source)
        assert all(source.read(index) in data for index in range(len(source)))
    assert tree(tmp_path) == before


@PROPERTY
@given(st.binary(max_size=3000))
def test_random_bytes_are_no_shard(tmp_path, data):
    shard = tmp_path / "s.tar"
    shard.write_bytes(data)
    with pytest.raises((UnsafeInputError, UsageError)) as caught:
        open_tar_shards([shard], name="data", cache=tmp_path / "cache")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 511, b"no tar file " * 100])
def test_file_that_is_no_shard_is_exit_4(tmp_path, data):
    shard = tmp_path / "s.tar"
    shard.write_bytes(data)
    with pytest.raises(UnsafeInputError, match=r"s\.tar is no tar file"):
        open_tar_shards([shard], name="data")


def test_limits_end_where_pillow_refuses():
    with pytest.raises(UsageError, match="at most 178000000 pixels; got"):
        Limits(max_pixels=10**12)
    with pytest.raises(UnsafeInputError, match=r"decompression bomb|pixels"):
        decode_image(bomb(20_000), Limits(max_pixels=178_000_000))
