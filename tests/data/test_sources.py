import io
import tarfile
import warnings
from pathlib import Path

import pytest

from mimic_fast.data import video_source
from mimic_fast.data.items import CorruptItemError, Limits, Source
from mimic_fast.data.sources import open_source, open_split
from mimic_fast.errors import UsageError


def write_tar(path: Path, name: str, data: bytes) -> None:
    with tarfile.open(path, "w:") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path) -> Path:
    for part in ("train-0", "train-1", "test-0"):
        write_tar(tmp_path / f"{part}.tar", "1.png", part.encode())
    return tmp_path


def test_open_source_folder_of_shards_takes_all(shards):
    source = open_source(str(shards))
    assert source.keys == ("test-0/1", "train-0/1", "train-1/1")
    assert source.name == str(shards)


def test_open_source_glob_takes_what_matches(shards):
    assert open_source(f"{shards}/train-*.tar").keys == ("train-0/1", "train-1/1")
    assert open_source(f"{shards}/train-[1].tar").keys == ("train-1/1",)


def test_open_source_single_shard(shards):
    assert open_source(f"{shards}/test-0.tar").keys == ("test-0/1",)


def test_open_source_folder_of_images(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").write_bytes(b"x")
    source = open_source(str(tmp_path))
    assert (source.keys, source.classes) == (("cat/1.png",), ("cat",))


def test_open_source_name_with_glob_characters_is_first_a_path(tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"x")
    assert open_source(str(folder)).keys == ("1.png",)


@pytest.mark.parametrize("text", ["absent", "absent/*.tar", "absent.tar", "nothing-{0..9}.tar"])
def test_open_source_missing_raises_with_what_to_give(tmp_path, text):
    with pytest.raises(UsageError, match=r"does not exist; give an image folder, \.tar shards"):
        open_source(str(tmp_path / text))


def test_open_source_empty_folder_raises(tmp_path):
    with pytest.raises(UsageError, match="holds no image"):
        open_source(str(tmp_path))


def test_open_source_other_file_raises(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"x")
    (tmp_path / "video.mp4").write_bytes(b"x")
    for text in ("data.zip", "*.zip", "*.*"):
        with pytest.raises(UsageError, match=r"data\.zip is no \.tar shard"):
            open_source(str(tmp_path / text))


@pytest.fixture
def videos(monkeypatch, make_source) -> list[dict]:
    """What the videos' own opening was asked for; it is tested where it is."""
    calls: list[dict] = []

    def open_video(paths: list[Path], **settings) -> Source:
        calls.append({"paths": paths, **settings})
        return make_source(1)

    monkeypatch.setattr(video_source, "open_video", open_video)
    return calls


@pytest.mark.parametrize("text", ["a.mp4", "*.MKV", "", "[ab].mp4"])
def test_open_source_videos_are_opened_as_such(tmp_path, videos, text):
    names = ["a.mp4", "b.MKV", "deep/er/c.avi", "notes.txt", ".hidden.mp4"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    limits = Limits(max_pixels=9)
    open_source(f"{tmp_path}/{text}", cache=tmp_path / "cache", limits=limits)
    expected = {"a.mp4": [0], "*.MKV": [1], "": [0, 1, 2], "[ab].mp4": [0]}[text]
    (call,) = videos
    assert call["paths"] == [tmp_path / names[index] for index in expected]
    assert (call["name"], call["cache"]) == (f"{tmp_path}/{text}", tmp_path / "cache")
    assert call["limits"] == limits


def test_open_source_images_go_before_videos_with_a_warning(tmp_path, videos):
    (tmp_path / "1.png").write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_source(str(tmp_path)).keys == ("1.png",)
    (tmp_path / "1.mp4").write_bytes(b"x")
    with pytest.warns(UserWarning, match="1 images and 1 videos; the videos are left out"):
        assert open_source(str(tmp_path)).keys == ("1.png",)
    assert not videos


def test_open_source_shards_go_before_videos(shards, videos):
    (shards / "1.mp4").write_bytes(b"x")
    assert len(open_source(str(shards))) == 3
    assert not videos


def test_open_source_limits_hold_for_folders_and_shards(tmp_path, encode_image):
    data = encode_image(0, size=(9, 9))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(data)
    write_tar(tmp_path / "s.tar", "1.png", data)
    for text in ("images", "s.tar"):
        source = open_source(f"{tmp_path}/{text}", limits=Limits(max_pixels=80))
        with pytest.raises(CorruptItemError, match="more than the 80 allowed"):
            source.decode(source.read(0))
        source = open_source(f"{tmp_path}/{text}", limits=Limits(max_item_bytes=len(data) - 1))
        with pytest.raises(CorruptItemError, match=f"has {len(data)} bytes, more than"):
            source.read(0)
        source = open_source(f"{tmp_path}/{text}", limits=Limits(max_item_bytes=len(data)))
        assert source.encoded
        assert source.decode(source.read(0)).shape == (3, 9, 9)


@pytest.mark.parametrize("text", ["fashion-mnist", "fashion-mnist:", "fashion-mnist:valid"])
def test_open_source_built_in_without_split_raises(text):
    with pytest.raises(UsageError, match="built-in data is 'fashion-mnist:train' or"):
        open_source(text)


def test_open_split_of_shards(shards):
    train, test = open_split(str(shards), "train"), open_split(f"{shards}/", "test")
    assert train.keys == ("train-0/1", "train-1/1")
    assert test.keys == ("test-0/1",)
    assert open_source(train.name).keys == train.keys
    assert open_source(test.name).keys == test.keys
    with pytest.raises(CorruptItemError, match="more than the 3 allowed"):
        open_split(str(shards), "train", limits=Limits(max_item_bytes=3)).read(0)


def test_open_split_of_subfolders(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / f"{part}.png").write_bytes(b"x")
    source = open_split(str(tmp_path), "test")
    assert (source.keys, source.classes) == (("cat/test.png",), ("cat",))
    assert open_source(source.name).keys == source.keys


def test_open_split_missing_raises(tmp_path):
    with pytest.raises(UsageError, match=r"has no part 'train'; expected a subfolder 'train' or"):
        open_split(str(tmp_path), "train")
    with pytest.raises(UsageError, match="does not exist; give a folder or 'fashion-mnist'"):
        open_split(str(tmp_path / "absent"), "train")


def test_open_split_of_reference_data_has_every_image(shared_data):
    train = open_split(str(shared_data / "gtsrb"), "train")
    assert (len(train), len(set(train.keys))) == (12_998, 12_998)
    assert train.labels is not None
    assert set(train.labels) == set(range(43))
    assert train.decode(train.read(12_997)).shape == (3, 32, 32)
    assert len(open_split(str(shared_data / "gtsrb"), "test")) == 4018
