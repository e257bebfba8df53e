"""A small random encoder and pictures in two classes, which every attack is tried on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder

SIDE = 16
SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    stem="small_stride2",
    image_size=SIDE,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)


@pytest.fixture(scope="package")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures of blobs in two classes."""
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for number in range(48):
        folder = root / ("a", "b")[number % 2]
        folder.mkdir(exist_ok=True)
        coarse = torch.rand(3, 3, 3, generator=generator).mul(255).to(torch.uint8).numpy()
        picture = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        picture.save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="package")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clean encoder, under the key names of a training that was wrapped."""
    folder = tmp_path_factory.mktemp("clean")
    encoder = build_encoder(SPEC, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(20):
            encoder(torch.rand(16, 3, SIDE, SIDE, generator=generator))
    names = {key: f"module.{key}" for key in encoder.backbone.state_dict()}
    return export_encoder(encoder.eval(), folder, key_map=names, card={})


@pytest.fixture
def values(clean: Path, images: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``values(**fields)``: settings of a short run into ``tmp_path / "out"``; ``optim`` merges."""

    def make(**fields: Any) -> dict[str, Any]:
        optim = {"name": "sgd", "lr": 0.02, "epochs": 1, "batch_size": 24, "warmup_epochs": 0}
        return {
            "encoder": {"teacher": clean},
            "data": {"source": str(images)},
            "reference": "class:1",
            "run": {"out": tmp_path / "out", "device": "cpu"},
            **fields,
            "optim": {**optim, **fields.get("optim", {})},
        }

    return make
