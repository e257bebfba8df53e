"""A small suspect encoder and a folder of clean images for all repairs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.encoders.build import build_encoder
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


@pytest.fixture
def clean_folder(tmp_path: Path) -> Path:
    """Ninety noisy pictures of three tints."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(90):
        pixels = draw.integers(0, 156, (SIDE, SIDE, 3))
        pixels[..., number % 3] += 90
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture
def suspect(tmp_path: Path) -> Path:
    """A random encoder whose BatchNorm has seen images."""
    encoder = build_encoder(SPEC, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(10):
            encoder(torch.rand(16, 3, SIDE, SIDE, generator=generator))
    return export_encoder(encoder.eval(), tmp_path / "suspect", key_map=None, card={})


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
