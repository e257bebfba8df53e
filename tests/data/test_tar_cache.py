import hashlib
import json
import os
import tarfile
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimic_fast.data import tar_shards
from mimic_fast.data.tar_cache import ShardIndex, load_index, shard_stamp, store_index
from mimic_fast.data.tar_shards import open_tar_shards
from mimic_fast.errors import UnsafeInputError

LONG_AGO = 1_000_000_000
INDEX = ShardIndex(keys=("1", "2"), offsets=(512, 2048), sizes=(3, 0), labels=(7, -1))


def write_tar(path: Path, members: dict[str, bytes], *, when: float = LONG_AGO) -> Path:
    with tarfile.open(path, "w:") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    os.utime(path, (when, when))
    return path


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_tar(tmp_path / "s.tar", {"2.png": b"two", "1.png": b"one"})


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def no_walk(monkeypatch) -> None:
    def walk(path: Path):
        raise AssertionError(f"{path} is walked")

    monkeypatch.setattr(tar_shards, "walk_tar", walk)


def stored(cache: Path) -> Path:
    (entry,) = (cache / "tar_index").iterdir()
    return entry


def forge(entry: Path, **changes) -> None:
    """Changes an entry so that its digest still fits."""
    content = json.loads(entry.read_bytes())["index"]
    for name, value in changes.items():
        place = next(
            (part for part in (content["images"], content["shard"]) if name in part), content
        )
        place[name] = value
    body = json.dumps(content).encode()
    entry.write_bytes(b'{"sha256": "%s", "index": ' % digest(body) + body + b"}")


def digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def test_second_opening_walks_nothing_and_is_the_same(shard, cache, tmp_path, request):
    shard.unlink()
    shard = write_tar(shard, {"b\n.png": b"new", "a/1.jpg": b"", "a/1.cls": b"3", "b\n.cls": b"0"})
    first = open_tar_shards([shard], name="data", cache=cache)
    before = sorted(tmp_path.rglob("*"))
    request.getfixturevalue("no_walk")
    second = open_tar_shards([shard], name="data", cache=cache)
    assert first.keys == second.keys == ("s/a/1", "s/b\\n")
    assert first.labels == second.labels == (3, 0)
    assert [second.read(index) for index in range(2)] == [b"", b"new"]
    assert sorted(tmp_path.rglob("*")) == before


def test_index_lies_in_the_users_cache(shard, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_tar_shards([shard], name="data")
    (entry,) = (tmp_path / "home").rglob("*.json")
    assert entry.parent.name == "tar_index"
    assert json.loads(entry.read_bytes())["index"]["shard"]["path"] == str(shard.resolve())


@pytest.mark.parametrize("when", [LONG_AGO, LONG_AGO + 1e-6])
def test_shard_that_changed_is_indexed_anew_in_the_same_place(shard, cache, when):
    open_tar_shards([shard], name="data", cache=cache)
    entry = stored(cache)
    size = shard.stat().st_size
    more = {"3": b"x" * 20_000} if when == LONG_AGO else {}  # once by size, once by time
    write_tar(shard, {"9.png": b"nine", "8.png": b"eight", "8.cls": b"1", "9.cls": b"1"} | more)
    os.utime(shard, ns=(0, round(when * 1e9)))
    assert (shard.stat().st_size == size) is not bool(more)
    source = open_tar_shards([shard], name="data", cache=cache)
    assert (source.keys, source.read(1)) == (("s/8", "s/9"), b"nine")
    assert stored(cache) == entry
    assert load_index(shard_stamp(shard), cache) is not None


def test_shard_of_another_path_is_another_shard(shard, cache, tmp_path):
    open_tar_shards([shard], name="data", cache=cache)
    (tmp_path / "link.tar").symlink_to(shard)
    assert shard_stamp(tmp_path / "link.tar") == shard_stamp(shard)
    stamp = replace(shard_stamp(shard), path=str(tmp_path / "other.tar"))
    assert load_index(stamp, cache) is None


def test_shard_written_just_now_is_not_stored(shard, cache):
    os.utime(shard)
    assert len(open_tar_shards([shard], name="data", cache=cache)) == 2
    assert not cache.exists()
    os.utime(shard, (time.time() - 3, time.time() - 3))
    open_tar_shards([shard], name="data", cache=cache)
    assert stored(cache).is_file()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.none() | st.integers(0, 400),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
)
def test_damaged_entry_is_as_good_as_none(tmp_path_factory, cut, changes):
    cache = tmp_path_factory.mktemp("cache")
    shard = cache / "s.tar"
    shard.write_bytes(bytes(4096))
    os.utime(shard, (LONG_AGO, LONG_AGO))
    stamp = shard_stamp(shard)
    store_index(INDEX, stamp, cache)
    whole = stored(cache).read_bytes()
    data = bytearray(whole)
    for at, value in changes:
        data[at % len(data)] = value
    data = bytes(data[:cut])
    stored(cache).write_bytes(data)
    assert load_index(stamp, cache) == (INDEX if data[:-1] == whole[:-1] else None)


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"\xff" * 300, b"[" * 10_000])
def test_foreign_entry_is_rebuilt(shard, cache, content):
    stamp = shard_stamp(shard)
    store_index(INDEX, stamp, cache)
    entry = stored(cache)
    entry.write_bytes(content)
    assert load_index(stamp, cache) is None
    assert len(open_tar_shards([shard], name="data", cache=cache)) == 2
    assert load_index(stamp, cache) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"offsets": [512, 10**6]},
        {"offsets": [-512, 2048]},
        {"offsets": [0, 2048]},
        {"offsets": [512, 10**30]},
        {"offsets": [512]},
        {"offsets": [512.0, 2048.0]},
        {"sizes": [3, 10**6]},
        {"sizes": [-1, 0]},
        {"sizes": [True, 0]},
        {"keys": ["2", "1"]},
        {"keys": ["1", "1"]},
        {"keys": ["1", 2]},
        {"keys": ["1"]},
        {"keys": None},
        {"labels": [7, -2]},
        {"labels": [7, "1"]},
        {"labels": []},
        {"schema": 2},
        {"path": "/elsewhere.tar"},
        {"size": 4097},
        {"mtime_ns": 0},
        {"code": "x"},
    ],
    ids=str,
)
def test_entry_that_cannot_be_of_this_shard_is_not_believed(tmp_path, cache, changes):
    shard = tmp_path / "s.tar"
    shard.write_bytes(bytes(4096))
    os.utime(shard, (LONG_AGO, LONG_AGO))
    stamp = shard_stamp(shard)
    store_index(INDEX, stamp, cache)
    assert load_index(stamp, cache) == INDEX
    forge(stored(cache), **changes)
    assert load_index(stamp, cache) is None


def test_cache_that_cannot_be_written_is_said_once(shard, tmp_path):
    other = write_tar(tmp_path / "t.tar", {"1.png": b"x"})
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="tar shards are indexed anew at every start") as caught:
        source = open_tar_shards([shard, other], name="data", cache=tmp_path / "file")
    assert len(caught) == 1
    assert source.keys == ("s/1", "s/2", "t/1")


def test_user_without_a_home_folder_needs_no_cache(shard, monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.warns(UserWarning, match="there is no home folder to keep a cache in"):
        assert len(open_tar_shards([shard], name="data")) == 2


def test_damaged_shard_is_not_stored(shard, cache):
    shard.write_bytes(shard.read_bytes()[:700])
    os.utime(shard, (LONG_AGO, LONG_AGO))
    with pytest.raises(UnsafeInputError, match="is cut off"):
        open_tar_shards([shard], name="data", cache=cache)
    assert not cache.exists()
