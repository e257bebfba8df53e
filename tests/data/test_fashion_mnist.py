import hashlib
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from mimic_fast.data.fashion_mnist import (
    SHA256,
    fetch_fashion_mnist,
    open_fashion_mnist,
)
from mimic_fast.data.items import CorruptItemError
from mimic_fast.data.sources import open_source, open_split
from mimic_fast.errors import MachineError, UnsafeInputError, UsageError
from mimic_fast.files import user_cache

FETCH = (
    "import pathlib, sys; from mimic_fast.data.fashion_mnist import fetch_fashion_mnist as fetch; "
    "fetch(cache=pathlib.Path(sys.argv[1]), installed=pathlib.Path(sys.argv[2]), mirrors=[])"
)


def assert_whole(files) -> None:
    assert set(files) == set(SHA256)
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[name]


@pytest.mark.parametrize(("split", "per_class"), [("train", 6000), ("test", 1000)])
def test_open_gives_every_image_and_label(fashion_files, split, per_class):
    source = open_source(f"fashion-mnist:{split}")
    assert source.labels is not None
    assert [source.labels.count(label) for label in range(10)] == [per_class] * 10
    assert len(source) == 10 * per_class
    assert source.keys[-1] == f"{split}/{10 * per_class - 1:05d}"
    assert open_split("fashion-mnist", split).keys == source.keys


def test_open_decodes_the_stored_pixels(fashion_files):
    source = open_fashion_mnist("test")
    stored = fashion_files["t10k-images-idx3-ubyte"].read_bytes()
    for index in (0, 9_999):
        expected = stored[16 + 784 * index : 16 + 784 * (index + 1)]
        decoded = source.decode(source.read(index))
        assert (decoded.shape, decoded.dtype) == ((1, 28, 28), torch.uint8)
        assert bytes(decoded.flatten().tolist()) == expected
    with pytest.raises(CorruptItemError, match="holds 3 bytes"):
        source.decode(b"abc")


def test_fetch_from_the_installed_package(fashion_archives, tmp_path):
    events = []
    files = fetch_fashion_mnist(cache=tmp_path, installed=fashion_archives, report=events.append)
    assert_whole(files)
    assert [event.message for event in events] == [
        f"Fashion-MNIST fetched (installed package) into {tmp_path / 'fashion-mnist'}"
    ]
    assert sorted(path.name for path in (tmp_path / "fashion-mnist").iterdir()) == sorted(
        [*SHA256, ".lock"]
    )


def test_fetch_again_is_quick_and_writes_nothing(fashion_files):
    before = {name: path.stat().st_mtime_ns for name, path in fashion_files.items()}
    start = time.perf_counter()
    files = fetch_fashion_mnist()
    assert time.perf_counter() - start < 1
    assert {name: path.stat().st_mtime_ns for name, path in files.items()} == before


def test_fetch_from_archives_put_into_the_cache(fashion_archives, tmp_path):
    shutil.copytree(fashion_archives, tmp_path / "fashion-mnist")
    assert_whole(fetch_fashion_mnist(cache=tmp_path, installed=tmp_path / "absent", mirrors=[]))


def test_fetch_repairs_a_damaged_cache(fashion_archives, tmp_path):
    files = fetch_fashion_mnist(cache=tmp_path, installed=fashion_archives)
    damaged = files["train-images-idx3-ubyte"]
    with damaged.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"changed")
    assert_whole(fetch_fashion_mnist(cache=tmp_path, installed=fashion_archives))


def test_fetch_refuses_other_content(fashion_archives, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no apt-get
    other = tmp_path / "archives"
    shutil.copytree(fashion_archives, other)
    shutil.copy(other / "t10k-labels-idx1-ubyte.gz", other / "train-labels-idx1-ubyte.gz")
    with pytest.raises(
        UnsafeInputError, match="train-labels-idx1-ubyte has SHA-256 0402a96d92fd, expected"
    ):
        fetch_fashion_mnist(cache=tmp_path, installed=other, mirrors=[])
    assert not list((tmp_path / "fashion-mnist").glob("*ubyte"))


def test_fetch_without_any_way_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError) as caught:
        fetch_fashion_mnist(cache=tmp_path, installed=tmp_path / "absent", mirrors=[])
    message = str(caught.value)
    assert "apt-get is not installed" in message
    assert "install the Debian package dataset-fashion-mnist" in message
    assert "train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz" in message
    assert message.endswith(f"into {tmp_path / 'fashion-mnist'}")
    assert "\n" not in message


def test_fetch_by_two_processes_at_once(fashion_archives, tmp_path):
    command = [sys.executable, "-c", FETCH, str(tmp_path), str(fashion_archives)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert (process.returncode, output) == (0, b"")
    assert_whole(fetch_fashion_mnist(cache=tmp_path, installed=tmp_path / "absent", mirrors=[]))
    assert len(list((tmp_path / "fashion-mnist").iterdir())) == 5


def test_fetch_removes_what_a_killed_process_left(fashion_archives, tmp_path):
    folder = tmp_path / "fashion-mnist"
    (folder / ".apt-old" / "lists").mkdir(parents=True)
    (folder / ".apt-young").mkdir()
    (folder / ".train-images-idx3-ubyte.abc").write_bytes(b"half")
    for name in (".apt-old", ".train-images-idx3-ubyte.abc"):
        os.utime(folder / name, (time.time() - 7200, time.time() - 7200))
    fetch_fashion_mnist(cache=tmp_path, installed=fashion_archives)
    left = {path.name for path in folder.iterdir()}
    assert left == {*SHA256, ".lock", ".apt-young"}


def test_fetch_where_nothing_can_be_written_raises(fashion_archives, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"cannot write .*make the cache folder .* writable"):
        fetch_fashion_mnist(cache=tmp_path / "file", installed=fashion_archives)


def test_user_cache_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache().is_relative_to(tmp_path)
    assert user_cache().name == "mimic_fast"
