import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pytest

from mimic_fast.data.items import CorruptItemError
from mimic_fast.data.tar_shards import open_tar_shards
from mimic_fast.errors import UnsafeInputError, UsageError


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_shards_pair_images_with_labels_in_key_order(tmp_path):
    first = write_tar(
        tmp_path / "a-1.tar", {"2.cls": b"7\n", "2.jpg": b"two", "1.jpg": b"one", "1.cls": b" 3 "}
    )
    second = write_tar(tmp_path / "a-0.tar", {"1.png": b"zero", "1.cls": b"0"})
    source = open_tar_shards([first, second], name="data")
    assert source.keys == ("a-0/1", "a-1/1", "a-1/2")
    assert source.labels == (0, 3, 7)
    assert source.classes is None
    assert [source.read(index) for index in range(3)] == [b"zero", b"one", b"two"]


def test_shards_order_of_members_and_arguments_does_not_matter(tmp_path):
    members = {f"{index}.png": bytes([index]) for index in range(5)}
    one = write_tar(tmp_path / "one/s.tar", members)
    two = write_tar(tmp_path / "two/s.tar", dict(reversed(members.items())))
    assert open_tar_shards([one], name="x").keys == open_tar_shards([two], name="x").keys
    both = open_tar_shards([one, two], name="x")
    assert both.keys == open_tar_shards([two, one], name="x").keys
    assert both.keys[:2] == ("one/s/0", "one/s/1")
    assert len(set(both.keys)) == 10


def test_shards_key_ends_at_the_first_dot(tmp_path):
    members = {
        "./v1.5/item.seg.png": b"mask",
        "./v1.5/item.jpg": b"image",
        "./v1.5/item.cls": b"2",
        "v1.5/item.json": b"{}",
    }
    source = open_tar_shards([write_tar(tmp_path / "s.tar", members)], name="data")
    assert source.keys == ("s/v1.5/item",)
    assert source.read(0) == b"image"
    assert source.labels == (2,)


def test_shards_hostile_names_are_only_keys(tmp_path):
    members = {"../../escape.png": b"1", "/etc/absolute.png": b"2", "a/../b.png": b"3"}
    shard = write_tar(tmp_path / "in/s.tar", members)
    before = sorted(tmp_path.rglob("*"))
    source = open_tar_shards([shard], name="data")
    assert sorted(source.read(index) for index in range(3)) == [b"1", b"2", b"3"]
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/etc/absolute.png").exists()


def test_shards_image_in_two_forms_is_one_item(tmp_path):
    shard = write_tar(tmp_path / "s.tar", {"1.png": b"png", "1.jpg": b"jpg", "1.cls": b"0"})
    source = open_tar_shards([shard], name="data")
    assert (source.keys, source.read(0)) == (("s/1",), b"jpg")


def test_shards_class_names_come_from_the_file_beside(tmp_path):
    shard = write_tar(tmp_path / "s.tar", {"1.png": b"x", "1.cls": b"1"})
    (tmp_path / "classes.txt").write_text("cat\ndog\n\n")
    assert open_tar_shards([shard], name="data").classes == ("cat", "dog")
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(UsageError, match="has 1 lines but the labels go up to 1"):
        open_tar_shards([shard], name="data")


def test_shards_partial_labels_raise(tmp_path):
    shard = write_tar(tmp_path / "s.tar", {"1.png": b"x", "1.cls": b"1", "2.png": b"y"})
    with pytest.raises(UsageError, match=r"s/2 has no \.cls label although 1 of 2"):
        open_tar_shards([shard], name="data")


@pytest.mark.parametrize("text", [b"", b"cat", b"-1", b"1.5", b"9" * 12, b"\xff"])
def test_shards_label_that_is_no_index_raises(tmp_path, text):
    shard = write_tar(tmp_path / "s.tar", {"1.png": b"x", "1.cls": text})
    with pytest.raises(UsageError, match=r"1\.cls of .* must hold a class index"):
        open_tar_shards([shard], name="data")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_shards_compressed_raise(tmp_path, compress):
    shard = write_tar(tmp_path / "s.tar", {"1.png": b"x"})
    shard.write_bytes(compress(shard.read_bytes()))
    with pytest.raises(UsageError, match="is compressed and cannot be read in place"):
        open_tar_shards([shard], name="data")


def test_shards_damaged_or_cut_off_raise(tmp_path):
    shard = tmp_path / "s.tar"
    shard.write_bytes(b"this is no tar file" * 100)
    with pytest.raises(UnsafeInputError, match=r"s\.tar is no tar file"):
        open_tar_shards([shard], name="data")
    write_tar(shard, {"1.png": b"x" * 5000})
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(UnsafeInputError, match=r"s\.tar is cut off: '1\.png' is not all there"):
        open_tar_shards([shard], name="data")


def test_shards_without_images_or_missing_raise(tmp_path):
    shard = write_tar(tmp_path / "s.tar", {"1.txt": b"x", ".2.png": b"y"})
    with pytest.raises(UsageError, match="no image in 1 tar shards"):
        open_tar_shards([shard], name="data")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        open_tar_shards([tmp_path / "absent.tar"], name="data")
    with pytest.raises(UsageError, match="is given twice"):
        open_tar_shards([shard, shard], name="data")


def test_shards_cut_off_after_opening_give_a_corrupt_item(tmp_path):
    shard = write_tar(tmp_path / "s.tar", {"1.png": b"x" * 5000})
    source = open_tar_shards([shard], name="data")
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(CorruptItemError, match="ends after 2488 of 5000 bytes"):
        source.read(0)
