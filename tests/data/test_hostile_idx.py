"""What may lie where Fashion-MNIST is looked for: nothing is parsed whose digest is not known."""

import gzip
import shutil
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimic_fast.data.fashion_mnist import SHA256, fetch_fashion_mnist
from mimic_fast.data.sources import open_source
from mimic_fast.errors import UnsafeInputError

IMAGES = "train-images-idx3-ubyte"
# Magic number of an idx file of bytes in three dimensions, then their sizes.
HEADER = bytes([0, 0, 8, 3])
CLAIM = HEADER + (2**20).to_bytes(4) + (2**10).to_bytes(4) * 2  # 2^40 pixels


@pytest.fixture
def nowhere_else(monkeypatch, tmp_path) -> None:
    """No package, no network, no apt-get: only the cache folder."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("mimic_fast.data.fashion_mnist.DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", [])


def put(cache: Path, archive: bytes) -> Path:
    """A cache folder as a user fills it by hand, every archive with the same content."""
    folder = cache / "fashion-mnist"
    folder.mkdir(parents=True)
    for name in SHA256:
        (folder / f"{name}.gz").write_bytes(archive)
    return folder


def refused(cache: Path) -> str:
    """The one line with which the content of a cache is refused; none of it is taken over."""
    folder = cache / "fashion-mnist"
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(UnsafeInputError) as caught:
        fetch_fashion_mnist(cache=cache, installed=cache / "absent", mirrors=[])
    assert len(str(caught.value).splitlines()) == 1
    assert {path.name for path in folder.iterdir()} - before <= {".lock"}
    shutil.rmtree(cache)
    return str(caught.value)


def bomb(size: int) -> bytes:
    """A gzip file of ``size`` zero bytes after an idx header."""
    squeeze = zlib.compressobj(9, wbits=31)
    parts = [squeeze.compress(HEADER)]
    parts += [squeeze.compress(bytes(2**20)) for _ in range(size // 2**20)]
    return b"".join(parts) + squeeze.flush()


def test_header_that_claims_two_to_the_forty_pixels_is_refused(tmp_path, nowhere_else):
    put(tmp_path / "cache", gzip.compress(CLAIM + bytes(784)))
    assert f"{IMAGES} has SHA-256" in refused(tmp_path / "cache")


def test_gzip_bomb_is_refused_unpacked_no_further_than_the_limit(tmp_path, nowhere_else):
    archive = bomb(256 * 2**20)
    assert len(archive) < 2**19
    put(tmp_path / "cache", archive)
    assert f"{IMAGES}.gz is truncated or too large" in refused(tmp_path / "cache")


def test_archive_of_a_terabyte_is_not_read_whole(tmp_path, nowhere_else):
    folder = put(tmp_path / "cache", gzip.compress(CLAIM))
    with (folder / f"{IMAGES}.gz").open("r+b") as file:
        file.truncate(2**40)  # sparse: takes no space
    assert f"{IMAGES} has SHA-256" in refused(tmp_path / "cache")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=500) | st.binary(max_size=100).map(lambda data: HEADER + data),
    packed=st.booleans(),
)
def test_random_archive_is_refused(tmp_path, nowhere_else, content, packed):
    put(tmp_path / "cache", gzip.compress(content) if packed else content)
    refused(tmp_path / "cache")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.none() | st.integers(0, 60),
    changes=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=3),
)
def test_mutated_archive_is_refused(tmp_path, nowhere_else, cut, changes):
    archive = bytearray(gzip.compress(CLAIM + bytes(1000), mtime=0))
    for at, value in changes:
        archive[at % len(archive)] = value
    put(tmp_path / "cache", bytes(archive[:cut]))
    refused(tmp_path / "cache")


def test_changed_file_in_the_cache_is_never_opened(fashion_archives, tmp_path, nowhere_else):
    cache = tmp_path / "cache"
    files = fetch_fashion_mnist(cache=cache, installed=fashion_archives, mirrors=[])
    data = bytearray(files[IMAGES].read_bytes())
    data[4:16] = CLAIM[4:16]
    files[IMAGES].write_bytes(data)
    (cache / "fashion-mnist" / f"{IMAGES}.gz").write_bytes(gzip.compress(bytes(data), 1))
    for name in set(SHA256) - {IMAGES}:
        shutil.copy(fashion_archives / f"{name}.gz", cache / "fashion-mnist")
    with pytest.raises(UnsafeInputError, match=rf"{IMAGES} has SHA-256 \w+, expected c59f468a2f67"):
        open_source("fashion-mnist:train", cache=cache)
