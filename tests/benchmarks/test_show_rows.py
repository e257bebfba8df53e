"""Rows as Markdown tables."""

import subprocess
import sys
from pathlib import Path

from benchmarks.measure import Case, Machine, append_rows, single_row, spread_row
from benchmarks.show_rows import tables

CASE = Case(op="loss", impl="ours", mode="mse", shape="2x3x4")
MACHINE = Machine(device="CPU", torch="2", triton="3", commit="abc", date="2026-11-01")
TIME = spread_row(CASE, "cpu_time", "s", [0.002, 0.003, 0.004], 0.002, MACHINE)
RATIO = spread_row(CASE, "speedup", "x", [10.0, 12.0, 14.0], 14.0, MACHINE)


def test_times_below_a_second_are_in_milliseconds_with_their_spread():
    shown = tables([TIME, RATIO]).splitlines()

    assert shown[0] == "**loss, 2x3x4, float32** (CPU; torch 2, Triton 3, commit abc, 2026-11-01)"
    assert shown[4] == "| ours | mse | cpu_time | 3 ms | 2.4 to 3.6 | 2 |"
    assert shown[5] == "| ours | mse | speedup | 12 x | 10.8 to 13.2 | 14 |"


def test_seconds_stay_seconds():
    row = spread_row(CASE, "cpu_time", "s", [2.0], 2.0, MACHINE)

    assert "| 2 s | 2 to 2 | 2 |" in tables([row])


def test_figures_measured_once_stand_beside_each_other():
    rows = [
        single_row(CASE, "moved", "e", 6.02, machine=MACHINE),
        single_row(CASE, "launches", "", 3, machine=MACHINE),
        single_row(CASE, "memory", "bytes", 1234567, machine=MACHINE),
    ]

    shown = tables(rows).splitlines()

    assert shown[2] == "| mode | implementation | moved, e | launches | memory, bytes |"
    assert shown[4] == "| mse | ours | 6.02 | 3 | 1,234,570 |"


def test_only_metrics_that_begin_so_are_shown():
    assert "cpu_time" not in tables([TIME, RATIO], metrics=("speed",))
    assert "speedup" in tables([TIME, RATIO], metrics=("speed",))


def test_program_shows_a_file(tmp_path):
    append_rows(tmp_path / "rows.csv", [TIME, RATIO])
    script = Path(__file__).parents[2] / "benchmarks" / "show_rows.py"

    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "rows.csv"), "--metrics", "cpu"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == tables([TIME])
