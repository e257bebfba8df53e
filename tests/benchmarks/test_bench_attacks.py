"""The attacks' benchmark, run as its users run it, on encoders that are measured in seconds."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.bench_attacks import TOOK
from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.evaluation.attack_file import Attack, write_attack
from mimic_fast.evaluation.triggers import white_patch

ROOT = Path(__file__).parents[2]
SIDE = 16


@pytest.fixture
def encoders(tmp_path: Path) -> Path:
    """A clean encoder and two called attacked, all random."""
    spec = EncoderSpec(
        architecture="timm:resnet18",
        arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
        stem="small_stride2",
        image_size=SIDE,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    for seed, name in enumerate(("clean", "badencoder", "adaptive")):
        folder = tmp_path / "encoders" / name
        export_encoder(build_encoder(spec, seed=seed).eval(), folder, key_map=None, card={})
        if name != "clean":
            attack = Attack(
                kind=name,
                trigger=white_patch(image_size=SIDE, channels=3),
                reference=torch.full((3, SIDE, SIDE), 200, dtype=torch.uint8),
                targets={"toy": 1, "other": seed - 1},
                facts={"psnr_db": 12.5},
            )
            write_attack(folder, attack)
    return tmp_path / "encoders"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 20)):
        for name in ("a", "b"):
            folder = tmp_path / "toy" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "toy"


def test_rows_of_attacks_students_and_pairs(encoders, toy, tmp_path):
    out = tmp_path / "rows.csv"
    student = encoders / "clean" / "encoder.safetensors"
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "bench_attacks.py")),
        *("--encoders", str(encoders), "--downstream", f"toy={toy}", "--out", str(out)),
        *("--downstream", f"other={toy}"),
        *("--student", f"badencoder={student}", "--student", f"adaptive={student}"),
        *("--against", "badencoder", "--cache", str(tmp_path / "cache")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    found = {(row["impl"], row["mode"], row["metric"]): float(row["p50"]) for row in rows}
    for name in ("badencoder", "adaptive"):
        for role in ("teacher", "clean", "purified"):
            key = (f"{name}: {role}", "toy, linear")
            rate = found[*key, "attack_success_rate"]
            assert found[*key, "attack_success_rate_low"] <= rate
            assert rate <= found[*key, "attack_success_rate_high"]
            assert found[*key, "victims"] == 20
            assert found[*key, "labeled"] == 24
            assert 0 <= found[*key, "base_rate"] <= 1
        own = found[f"{name}: teacher", "toy, linear", "attack_success_rate"]
        assert found[f"{name}: teacher", "made", "took"] == (own >= TOOK)
        assert found[f"{name}: teacher", "made", "psnr_db"] == 12.5
        # The student is the clean encoder itself, so they agree in everything.
        student = (f"{name}: purified", "toy, linear")
        twins = {key[2]: value for key, value in found.items() if key[:2] == student}
        for metric, value in twins.items():
            assert found[f"{name}: clean", "toy, linear", metric] == value
    pair = ("adaptive minus badencoder", "toy")
    assert found[*pair, "attack_success_rate"] == 0
    assert "other: different targets cannot be paired" in done.stdout
    assert not [key for key in found if key[:2] == ("adaptive minus badencoder", "other")]
    assert found[*pair, "attack_success_rate_low"] < 0 < found[*pair, "attack_success_rate_high"]
