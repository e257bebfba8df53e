"""The benchmarks of the loaders run as scripts; what they measure here is not looked at."""

import csv
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shard(tmp_path) -> Path:
    """80 JPEG files of 40 x 50 pixels in a tar file."""
    path = tmp_path / "images-000.tar"
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index in range(80):
            data = io.BytesIO()
            pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data, "JPEG")
            info = tarfile.TarInfo(f"{index:06d}.jpg")
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))
    return path


def bench(script: str, *arguments: object) -> list[dict[str, str]]:
    """Rows that a script leaves in the file named last."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(csv.DictReader(Path(str(arguments[-1])).read_text().splitlines()))


def test_loaders_leave_rates_and_speedups(shard, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    quick = ("--rounds", 1, "--images", 24, "--batch", 8, "--calls", 1, "--size", 24)

    rows = bench("bench_loader.py", shard, *quick, "--out", tmp_path / "rows.csv")

    ours = {f"mimic_fast, {way}" for way in ("decoded once", "decoded every time", "DALI")}
    peers = {"Pillow + torchvision v2", "torchvision decoder + v2", "bare DALI"}
    for mode in ("two views", "two crops", "one image"):
        rates = {row["impl"] for row in rows if (row["mode"], row["metric"]) == (mode, "rate")}
        once = {"mimic_fast, decoded once"}
        assert rates == peers | (once if mode == "one image" else ours)
    assert all(float(row["p50"]) > 0 for row in rows)
    assert {row["metric"] for row in rows if row["impl"] in ours} == {
        "rate",
        "speedup over bare DALI",
        "speedup over Pillow + torchvision v2",
    }


@pytest.mark.slow
def test_overlap_leaves_what_a_run_waited(shard, tmp_path):
    teacher = ROOT / "mimic_fast" / "assets" / "demo_backdoored.safetensors"
    quick = ("--images", 80, "--batch", 4, "--steps", 3, "--preset", "mimic")

    rows = bench(
        *("bench_overlap.py", "--teacher", teacher, "--data", shard, *quick),
        *("--backends", "once", "every_time", "--out", tmp_path / "rows.csv"),
    )

    assert [(row["impl"], row["metric"]) for row in rows] == [
        (way, metric)
        for way in ("once", "every_time")
        for metric in ("waited", "waited for the first batch", "throughput")
    ]
    assert all(0 <= float(row["p50"]) < 1 for row in rows if row["metric"] != "throughput")
