"""The floor: the same images and optimizer, no teacher."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from mimic_fast.baselines.student_only import VIEWS, student_only
from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.ingest import load_encoder

SPEC = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    stem="small_stride2",
    image_size=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)


@pytest.fixture
def pool() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (32, 3, 16, 16), generator=generator, dtype=torch.uint8)


def settings(**sections: Any) -> Settings:
    """A purification's, with every loss a purification can have."""
    return Settings.model_validate(
        {
            "loss": {"clone": 1, "attention_weight": 1, "harden": {"probability": 1.0}},
            "optim": {"epochs": 2, "batch_size": 16, "warmup_epochs": 0},
            "data": {"crop_scale": (0.5, 1.0), "jitter_probability": 0.0, "grayscale": 0.0},
            **sections,
        }
    )


def test_floor_is_written_and_trained_by_the_contrastive_loss_alone(pool, tmp_path):
    result = student_only(
        SPEC, pool, settings=settings(seed=4, run={"out": tmp_path, "device": "cpu"})
    )

    assert result.path == tmp_path / "encoder.safetensors"
    stored = load_encoder(tmp_path / "encoder.safetensors").encoder
    torch.testing.assert_close(stored.state_dict(), result.encoder.state_dict(), rtol=0, atol=0)
    assert result.trained.steps == 4
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["clone"] == row["attention"] == 0 for row in rows)
    assert all(row["loss"] == pytest.approx(row["contrastive"]) for row in rows)
    start = build_encoder(SPEC, seed=4).state_dict()["backbone.conv1.weight"]
    assert not torch.equal(result.encoder.state_dict()["backbone.conv1.weight"], start)
    card = json.loads((tmp_path / "encoder.json").read_text())
    assert card["kind"] == "student_only"
    views = {key: card["settings"]["data"][key] for key in VIEWS}
    assert views == {"crop_scale": [0.2, 1.0], "jitter_probability": 0.8, "grayscale": 0.2}
    assert card["settings"]["loss"]["contrastive"] == 1.0
    # Hardening would handicap the floor: what is compared with it must beat SimCLR at its best.
    assert card["settings"]["loss"]["harden"]["probability"] == 0.0


def test_floor_without_a_folder_writes_nothing(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = student_only(SPEC, pool, settings=settings(run={"device": "cpu"}))

    assert result.path is None
    assert list(tmp_path.iterdir()) == []
