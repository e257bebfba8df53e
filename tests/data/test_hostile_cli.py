"""Hostile data at the command line: exit 4, one line, and nothing written but the run."""

import gzip
import io
import os
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.launch.cli import run

QUICK = ("--set", "data.clean_fraction=1", "--allow-budget", "--device", "cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    spec = EncoderSpec(
        architecture="timm:resnet18",
        arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
        stem="small_stride2",
        image_size=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    encoder = build_encoder(spec, seed=3).eval()
    return export_encoder(encoder, tmp_path_factory.mktemp("teacher"), key_map=None, card={})


def cut_off(images: list[bytes]) -> bytes:
    return packed([("1.png", images[0]), ("2.png", images[1])])[:700]


def ambiguous(images: list[bytes]) -> bytes:
    return packed([("../1.png", images[0]), ("2.png", images[1]), ("../1.png", images[2])])


def all_corrupt(images: list[bytes]) -> bytes:
    return packed([("/etc/1.png", b""), ("../../2.png", images[0][:40]), ("3.jpg", b"\xff\xd8")])


def random_bytes(images: list[bytes]) -> bytes:
    return b"no shard at all " * 200


def packed(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize("command", ["purify", "locate"])
@pytest.mark.parametrize("make", [cut_off, ambiguous, all_corrupt, random_bytes])
def test_hostile_shard_is_exit_4_in_one_line(
    tmp_path, monkeypatch, capfd, teacher, encode_image, command: str, make: Callable
):
    inside = tmp_path / "a/b"
    inside.mkdir(parents=True)
    (inside / "s.tar").write_bytes(make([encode_image(seed, size=(16, 16)) for seed in range(3)]))
    os.utime(inside / "s.tar", (0, 0))  # so old that its index would be kept
    monkeypatch.setattr("mimic_fast.data.tar_cache.user_cache", lambda: tmp_path / "cache")
    monkeypatch.chdir(inside)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    with warnings.catch_warnings(action="ignore"):
        code = run([command, "--teacher", str(teacher), "--data", "s.tar", "--out", "run", *QUICK])

    out, err = capfd.readouterr()
    assert code == 4, err
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert "s.tar" in line
    assert line == err.splitlines()[-1]
    assert "Traceback" not in out + err
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    new = {path for path in set(after) - set(before) if not path.is_relative_to(inside / "run")}
    assert all(path.is_relative_to(tmp_path / "cache") for path in new)
    assert {path for path in before if path.is_file()} <= set(after)
    assert all(after[path] == before[path] for path in before if path.is_file())


def test_hostile_archive_of_built_in_data_is_exit_4(tmp_path, monkeypatch, capfd, teacher):
    from mimic_fast.data.fashion_mnist import SHA256

    folder = tmp_path / "cache/fashion-mnist"
    folder.mkdir(parents=True)
    for name in SHA256:
        (folder / f"{name}.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12))
    monkeypatch.setattr("mimic_fast.data.fashion_mnist.user_cache", lambda: tmp_path / "cache")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("mimic_fast.data.fashion_mnist.from_folder", only(folder))
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", [])

    data = ("--data", "fashion-mnist:train")
    code = run(["locate", "--teacher", str(teacher), *data, "--out", str(tmp_path / "run"), *QUICK])

    line = capfd.readouterr().err.splitlines()[-1]
    assert code == 4, line
    assert line.startswith("error: Fashion-MNIST cannot be fetched (cache: train-images")


def only(folder: Path) -> Callable[..., dict[str, bytes]]:
    """``from_folder`` where no other folder exists."""
    from mimic_fast.data.fashion_mnist_ways import from_folder

    return lambda place, names: from_folder(
        place if place == folder else folder.parent / "absent", names
    )
