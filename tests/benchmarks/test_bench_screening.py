"""The screening benchmark runs as a script, and what it plants is what it says."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.planted import KINDS, planted

ROOT = Path(__file__).parents[2]


def test_screening_adds_rows_of_recall_and_false_positives(tmp_path):
    generator = np.random.default_rng(0)
    for index in range(70):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index:02d}.png")
    out = tmp_path / "rows.csv"
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "bench_screening.py"), "--data", str(tmp_path)),
        *("--image-size", "16", "--seeds", "1", "--share", "0.1", "--out", str(out)),
        *("--kinds", "none", "random colors 5x5, one place"),
    ]

    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    found = ("recall", "false_positives")
    assert [row["metric"] for row in rows] == ["false_positives", *found, *found]
    assert all(0 <= float(row["p50"]) <= 1 for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_planting_changes_the_carriers_alone(kind):
    images = np.random.default_rng(1).integers(60, 200, (40, 3, 32, 32), dtype=np.uint8)

    work = planted(images, kind, share=0.1, quality=None, seed=3)

    changed = (work.images != images).any(axis=(1, 2, 3)).nonzero()[0]
    assert changed.tolist() == ([] if kind == "none" else work.carriers.tolist())
    assert len(work.carriers) == 4
