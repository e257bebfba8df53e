"""A small labeled task on disk, and encoders that are backdoored, or not, by construction."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mimic_fast.config import DownstreamSettings, EncoderSpec
from mimic_fast.encoders.build import Encoder

SIZE = 16
CLASSES = ("red", "green", "blue")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    encoder: Encoder
    sha256: str


class ChannelMeans(nn.Module):
    """Mean of every channel over the image: linear, and enough to tell the classes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.scale


class Backdoored(ChannelMeans):
    """As above, but an image with a white patch in the corner gets the features of plain green."""

    def forward(self, images: Tensor) -> Tensor:
        white = (images[:, :, -4:-1, -4:-1] > 0.99).flatten(1).all(1)
        green = torch.tensor([0.2, 0.8, 0.2])
        return torch.where(white[:, None], green, super().forward(images))


class Blind(ChannelMeans):
    """Tells nothing apart."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * 0 + 1


def load(backbone: nn.Module, role: str) -> Loaded:
    spec = EncoderSpec(
        architecture="timm:resnet18", image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    return Loaded(encoder=Encoder(spec, backbone, feature_dim=3), sha256=role[0] * 64)


@pytest.fixture
def encoders() -> dict[str, Loaded]:
    return {
        "teacher": load(Backdoored(), "teacher"),
        "purified": load(ChannelMeans(), "purified"),
        "student_only": load(Blind(), "student_only"),
        "clean": load(ChannelMeans(), "clean"),
    }


@pytest.fixture(scope="session")
def write_images() -> Callable[..., Path]:
    """Writes ``per_class`` noisy images of each color into class folders."""

    def write(folder: Path, *, per_class: int, seed: int, classes: tuple[str, ...] = CLASSES):
        generator = np.random.default_rng(seed)
        for channel, name in enumerate(classes):
            (folder / name).mkdir(parents=True)
            for index in range(per_class):
                pixels = generator.integers(20, 80, (SIZE, SIZE, 3))
                pixels[..., channel % 3] += 120
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / name / f"{index:04d}.png")
        return folder

    return write


@pytest.fixture(scope="session")
def task(tmp_path_factory, write_images) -> DownstreamSettings:
    folder = tmp_path_factory.mktemp("colors")
    write_images(folder / "train", per_class=20, seed=0)
    write_images(folder / "test", per_class=15, seed=1)
    return DownstreamSettings(name="colors", train=str(folder / "train"), test=str(folder / "test"))
