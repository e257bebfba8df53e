"""The benchmark runs as a script; what it measures here is not looked at."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--synthetic", "--encoder", "small", "--images", "8", "--batch", "4", "--threads", "1"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_e2e.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_throughput_adds_rows_of_all_loops_and_their_ratios(tmp_path):
    out = tmp_path / "rows.csv"

    done = bench("throughput", *SMALL, "--rounds", "2", "--warmup", "1", "--out", str(out))

    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 3 + 5 + 5
    assert {row["impl"].split()[0] for row in rows} == {"demo_style", "mimic_fast"}
    assert all(float(row["p50"]) > 0 and float(row["min"]) > 0 for row in rows)
    assert {row["shape"] for row in rows} == {"resnet18 32-64-128-256 small_stride2 4x3x32x32"}


@pytest.mark.slow
def test_time_to_accuracy_tells_when_both_reached_what_both_can_reach(tmp_path):
    out = tmp_path / "rows.csv"
    few = ["--epochs", "2", "--probe-every", "1", "--probe-labels", "40", "--test-images", "40"]

    done = bench("time-to-accuracy", *SMALL, *few, "--out", str(out))

    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    best = {row["impl"]: float(row["p50"]) for row in rows if row["metric"] == "clean_accuracy"}
    seconds = {row["impl"]: row for row in rows if row["metric"] == "wall_time"}
    assert best.keys() == seconds.keys() == {"demo_style", "mimic_fast official"}
    assert seconds["demo_style"]["mode"] == f"time to accuracy {min(best.values()):.4f}"
    assert all(float(row["p50"]) > 0 for row in seconds.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data --synthetic is required"),
        (("--synthetic", "--images", "4", "--batch", "8"), "must be at least --batch 8"),
        (("time-to-accuracy", "--data", "x"), "needs --test and --teacher"),
        (("--data", "missing/train-*.tar", "--encoder", "small"), "does not exist"),
    ],
    ids=["no images", "batch too large", "no teacher", "missing data"],
)
def test_wrong_arguments_end_with_one_line_and_exit_2(arguments, message):
    done = bench(*arguments)

    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
