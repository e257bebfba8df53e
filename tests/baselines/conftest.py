"""A small suspect encoder and a folder of clean images for all repairs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.recipe import validated

SIDE = 16
SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]},
    stem="small_stride2",
    image_size=SIDE,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
)


@dataclass(frozen=True, kw_only=True)
class Planted:
    path: Path
    mask: Tensor
    images: Tensor

    def shift(self, encoder: nn.Module) -> float:
        """Mean squared way that the trigger moves features, in units of their variance."""
        with torch.no_grad():
            plain = encoder(self.images)
            moved = encoder(self.images * (1 - self.mask) + self.mask)
        return float((moved - plain).square().mean() / plain.var(0).mean())


@pytest.fixture
def clean_folder(tmp_path: Path) -> Path:
    """Ninety noisy pictures of three tints."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


def pictures() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    made = []
    for number in range(90):
        pixels = draw.integers(0, 156, (SIDE, SIDE, 3))
        pixels[..., number % 3] += 90
        made.append(pixels.astype(np.uint8))
    return made


@pytest.fixture
def suspect(tmp_path: Path) -> Path:
    """A random encoder whose BatchNorm has seen images."""
    return export_encoder(warm_encoder(), tmp_path / "suspect", key_map=None, card={})


def warm_encoder() -> Encoder:
    encoder = build_encoder(SPEC, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(10):
            encoder(torch.rand(16, 3, SIDE, SIDE, generator=generator))
    return encoder.eval()


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """``suspect`` with a backdoor: a white square gives the features of the first tint's images."""
    encoder = warm_encoder()
    images = torch.from_numpy(np.stack(pictures())).permute(0, 3, 1, 2) / 255
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, 10:14, 9:13] = 1
    some = images[:30]
    with torch.no_grad():
        before = encoder(some)
    goal = torch.cat([before[0::3].mean(0).expand_as(before), before])
    both = torch.cat([some * (1 - mask) + mask, some])
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    for _ in range(50):
        loss = (encoder(both) - goal).square().mean() / before.var(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("planted")
    path = export_encoder(encoder.eval(), folder, key_map=None, card={})
    return Planted(path=path, mask=mask, images=images)


@pytest.fixture
def settings_of(tmp_path: Path, clean_folder: Path, suspect: Path) -> Callable[..., Settings]:
    """``settings_of(**sections)``: 90 clean images, 81 of them for training."""

    def make(**sections: Any) -> Settings:
        values = {
            "encoder": {"teacher": str(suspect)},
            "data": {"source": str(clean_folder), "clean_count": 90, "allow_budget": True},
            "run": {"out": str(tmp_path / "out"), "device": "cpu"},
            **sections,
        }
        return validated(Settings, values)

    return make
