"""What every run through the whole program starts from: files on disk and real processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder

IMAGES = 100


@dataclass(frozen=True)
class Program:
    """``python -m mimic_fast ...`` in one directory, one thread, quiet."""

    directory: Path

    def start(self, *arguments: object, script: Path | None = None) -> subprocess.Popen[str]:
        """Starts the program, or a Python ``script`` in its place."""
        program = ["-m", "mimic_fast"] if script is None else [str(script)]
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        return subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            cwd=self.directory,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, *arguments: object, script: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return finished(self.start(*arguments, script=script))


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """What a process said by the time it ended; one that does not end fails the test."""
    try:
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


@pytest.fixture
def wait() -> Callable[[subprocess.Popen[str]], subprocess.CompletedProcess[str]]:
    return finished


def picture(number: int) -> Image.Image:
    """32 x 32 pixels: coarse random blobs, whose mean color tells even from odd, and some noise."""
    generator = np.random.default_rng(number)
    tint = np.array([60, 0, 30]) if number % 2 else np.array([0, 60, 10])
    coarse = generator.integers(0, 150, (4, 4, 3)) + tint
    pixels = np.kron(coarse, np.ones((8, 8, 1))) + generator.integers(0, 40, (32, 32, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labeled set of two classes in folders: train/ with 100 images, test/ with 40."""
    root = tmp_path_factory.mktemp("pictures")
    for split, first, count in (("train", 0, IMAGES), ("test", 1000, 40)):
        for number in range(first, first + count):
            folder = root / split / ("green", "red")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            picture(number).save(folder / f"{number:04d}.png")
    return root


@pytest.fixture(scope="session")
def resnet() -> EncoderSpec:
    return EncoderSpec(
        architecture="timm:resnet18",
        arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
        stem="small_stride2",
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, resnet: EncoderSpec) -> Path:
    """A small ResNet on disk."""
    folder = tmp_path_factory.mktemp("teacher")
    return export_encoder(build_encoder(resnet, seed=7).eval(), folder, key_map=None, card={})
