"""The benchmarks of the ops run as scripts; what they measure here is not looked at."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
QUICK = ("--rounds", "2", "--warmup", "0", "--round-seconds", "1e-6", "--no-compile")


def bench(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_losses_leave_times_shares_and_speedups(tmp_path):
    out = tmp_path / "rows.csv"

    done = bench("bench_loss.py", *QUICK, "--shapes", "2x5x8", "2x4x3x3", "--out", str(out))

    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    assert {row["shape"] for row in rows} == {"2x5x8", "2x4x3x3"}
    timed = {(row["impl"], row["mode"]) for row in rows if row["metric"] == "cpu_time"}
    peers = ("eager NAD", "eager AT", "mimic_fast reference", "mimic_fast cpp")
    modes = [f"{dense}, forward and backward" for dense in ("mse", "cosine")]
    triads = {("triad", "s + 3 t"), ("memory triad", "s + 3 t")}
    assert timed == {(peer, mode) for peer in peers for mode in modes} | triads
    metrics = {row["metric"] for row in rows if row["impl"] == "mimic_fast cpp"}
    assert {"rate", "share of triad", "share of memory triad"} <= metrics
    assert {f"speedup over {peer}" for peer in peers[:3]} <= metrics
    assert all(float(row["p50"]) > 0 and float(row["min"]) > 0 for row in rows)
    assert "| mimic_fast cpp | mse, forward and backward | cpu_time |" in done.stdout


def test_information_leaves_times_speedups_and_memory(tmp_path):
    out = tmp_path / "rows.csv"

    done = bench("bench_mi.py", *QUICK, "--layers", "2", "--directions", "3", "--out", str(out))

    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    assert {row["op"] for row in rows} == {"cross information", "matched information"}
    metrics = {(row["mode"], row["metric"]) for row in rows if row["impl"] == "mimic_fast cpp"}
    for mode in ("from codes", "from values"):
        for peer in ("numpy.histogram2d", "fast-histogram", "sklearn.mutual_info_score"):
            assert (mode, f"speedup over {peer}") in metrics
    assert ("from codes", "rate") in metrics
    if sys.platform == "linux":
        memory = [row for row in rows if row["metric"] == "peak_memory"]
        assert len(memory) == 2 * 3


def test_counted_bytes_are_near_what_must_be_moved(tmp_path):
    out = tmp_path / "rows.csv"

    done = bench("bench_traffic.py", "--shapes", "1x9x192", "--no-compile", "--out", str(out))

    assert done.returncode == 0, done.stderr
    rows = {(row["impl"], row["mode"], row["metric"], row["unit"]): row for row in rows_of(out)}
    for mode in ("mid layer, mse", "mid layer, attention only", "last layer, mse"):
        row = rows["mimic_fast triton", mode, "moved over ideal", "x"]
        assert 1 <= float(row["p50"]) < 1.1
        assert float(rows["eager NAD", mode, "moved over ideal", "x"]["p50"]) > 4
    extra = rows["mimic_fast triton", "mid layer, cosine", "extra a position", "bytes"]
    assert float(extra["p50"]) <= 16
    assert 4.9 < float(rows["eager NAD", "last layer, mse", "peak memory", "e"]["p50"]) < 5.2
    launches = rows["mimic_fast triton", "attention of 4 layers", "kernels of ours", ""]
    assert float(launches["p50"]) == 4 + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench_loss.py", "--shapes", "5x8"), "expected BxNxC or BxCxHxW, got '5x8'"),
        (("bench_mi.py", "crossed"), "expected cross or matched, got 'crossed'"),
        pytest.param(
            ("bench_loss.py", "--device", "cuda"),
            "error: --device cuda needs a CUDA device and torch sees none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
    ids=["shape", "workload", "no GPU"],
)
def test_wrong_arguments_end_with_one_line_and_exit_2(arguments, message):
    done = bench(*arguments)

    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
