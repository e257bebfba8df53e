"""Two tiny attacked encoders, a clean one and a labeled task: a comparison in seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimic_fast.comparison.settings import MatrixSettings
from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.evaluation.attack_file import Attack, write_attack
from mimic_fast.evaluation.triggers import white_patch
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
def files(tmp_path: Path) -> Path:
    """``clean/``, ``first/`` and ``second/`` with encoders, ``toy/`` with labeled images."""
    generator = torch.Generator().manual_seed(1)
    for seed, name in enumerate(("clean", "first", "second")):
        encoder = build_encoder(SPEC, seed=seed)
        with torch.no_grad():
            for _ in range(10):
                encoder(torch.rand(16, 3, SIDE, SIDE, generator=generator))
        export_encoder(encoder.eval(), tmp_path / name, key_map=None, card={})
        if name != "clean":
            reference = torch.full((3, SIDE, SIDE), 40 * seed, dtype=torch.uint8)
            trigger = white_patch(image_size=SIDE, channels=3)
            write_attack(
                tmp_path / name, Attack(kind="badencoder", trigger=trigger, reference=reference)
            )
    draw = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 10)):
        for label in range(2):
            folder = tmp_path / "toy" / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 156, (SIDE, SIDE, 3))
                pixels[..., label] += 90
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path


@pytest.fixture
def values(files: Path) -> Callable[..., dict[str, Any]]:
    """``values(**changes)``: a matrix of two attacks and three defenses as a TOML file has it."""

    def make(**changes: Any) -> dict[str, Any]:
        short = {"epochs": 2, "batch_size": 12, "warmup_epochs": 0}
        return {
            "data": {
                "source": str(files / "toy" / "train"),
                "clean_count": 90,
                "allow_budget": True,
            },
            "evaluation": {
                "downstream": [
                    {
                        "name": "toy",
                        "train": str(files / "toy" / "train"),
                        "test": str(files / "toy" / "test"),
                    }
                ]
            },
            "attacks": {
                name: {
                    "encoder": str(files / name / "encoder.safetensors"),
                    "clean": str(files / "clean" / "encoder.safetensors"),
                }
                for name in ("first", "second")
            },
            "defenses": {
                "none": {"kind": "none"},
                "hardened": {"kind": "purify", "settings": {"optim": short}},
                "floor": {"kind": "student_only", "settings": {"optim": short}},
            },
            **changes,
        }

    return make


@pytest.fixture
def matrix(values: Callable[..., dict[str, Any]]) -> Callable[..., MatrixSettings]:
    """``matrix(**changes)``: the same, validated."""
    return lambda **changes: validated(MatrixSettings, values(**changes))
