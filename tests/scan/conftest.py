"""Small encoders that are backdoored, or not, by construction, and settings for seconds of work."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.scan.settings import ScanSettings

SIZE = 16
SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]},
    stem="small_stride2",
    image_size=SIZE,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
SMALL = {
    "images": 64,
    "probe_images": 16,
    "batch_size": 16,
    "steps": 10,
    "patch_starts": 2,
    "additive_starts": 1,
}


class Coarse(nn.Module):
    """Features of a clean encoder: the image at 4 x 4, more or less."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 4).flatten(1) * self.scale


class Planted(Coarse):
    """As above; but white in a 4 x 4 corner, smoothly, takes over with a feature of its own."""

    def forward(self, images: Tensor) -> Tensor:
        features = super().forward(images)
        gate = torch.sigmoid(8 * (images[:, :, -5:-1, -5:-1].mean((1, 2, 3)) - 0.6))
        target = torch.zeros_like(features)
        target[:, 0] = 20
        return features * (1 - gate[:, None]) + target * gate[:, None]


def wrap(backbone: nn.Module) -> Encoder:
    spec = SPEC.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3})
    return Encoder(spec, backbone, feature_dim=48).eval().requires_grad_(False)


@pytest.fixture
def wrapped() -> Callable[[nn.Module], Encoder]:
    """Makes an encoder of a module that maps images to features."""
    return wrap


@pytest.fixture
def clean() -> Encoder:
    return wrap(Coarse())


@pytest.fixture
def planted() -> Encoder:
    return wrap(Planted())


@pytest.fixture
def pixels() -> Tensor:
    """Smooth random images in [0, 1], darker than white."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(96, 3, 4, 4, generator=draw) * 0.7
    return nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder of clean images."""
    path = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for number in range(80):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((SIZE, SIZE)).save(path / f"{number:03}.png")
    return path


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory) -> Callable[[int], Path]:
    """``encoder_file(seed)``: a small ResNet with random weights on disk."""
    root = tmp_path_factory.mktemp("encoders")

    def make(seed: int) -> Path:
        path = root / f"{seed}.safetensors"
        if not path.exists():
            encoder = build_encoder(SPEC, seed=seed).eval()
            export_encoder(encoder, root, name=str(seed), key_map=None, card={})
        return path

    return make


@pytest.fixture
def small(folder, encoder_file, tmp_path) -> ScanSettings:
    """Settings of a scan that takes seconds, into ``tmp_path / "scan"``."""
    values = {
        **SMALL,
        "encoder": {"teacher": encoder_file(0)},
        "data": {"source": str(folder)},
        "run": {"out": tmp_path / "scan", "device": "cpu", "checkpoint_every": 7},
    }
    return ScanSettings.model_validate(values)
