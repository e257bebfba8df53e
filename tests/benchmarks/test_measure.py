import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measure import (
    MALLOC_SETTINGS,
    Case,
    Machine,
    Timing,
    append_rows,
    interleaved,
    ratio_rows,
    single_row,
    this_machine,
    timing_rows,
)

CASE = Case(op="step", impl="ours", mode="throughput", shape="8x3x32x32")
MACHINE = Machine(device="CPU", torch="2", triton="3", commit="abc", date="2026-11-01")
FIRST_COLUMNS = "op,impl,mode,shape,dtype,metric,unit,p20,p50,p80,device,torch,triton,commit,date"
SCRIPT = """
import json, os, sys
from benchmarks.measure import MALLOC_SETTINGS, ensure_malloc_settings
starts = os.environ.get("STARTS", "") + "x"
os.environ["STARTS"] = starts
ensure_malloc_settings()
print(json.dumps([starts, sys.argv[1:], [os.environ[name] for name in MALLOC_SETTINGS]]))
"""


def test_interleaved_runs_all_candidates_every_round_in_turn():
    calls: list[str] = []
    names = ("a", "b", "c")

    timings = interleaved(
        {name: lambda name=name: calls.append(name) for name in names}, rounds=3, warmup=1
    )

    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]
    assert all(len(timings[name].wall) == len(timings[name].cpu) == 3 for name in names)


def test_timing_rows_give_percentiles_and_the_fastest_round():
    timing = Timing(wall=(2.0, 1.0, 4.0), cpu=(3.0, 2.0, 5.0))

    wall, cpu, rate = timing_rows(CASE, timing, images=8, machine=MACHINE)

    assert (wall["p50"], wall["min"], wall["unit"]) == ("2", "1", "s")
    assert (cpu["p50"], cpu["min"]) == ("3", "2")
    assert (rate["p50"], rate["min"], rate["unit"]) == ("4", "8", "images/s")


def test_ratio_rows_compare_round_by_round_and_fastest_with_fastest():
    own = Timing(wall=(1.0, 2.0, 1.0), cpu=(1.0, 1.0, 1.0))
    baseline = Timing(wall=(2.0, 8.0, 3.0), cpu=(2.0, 3.0, 4.0))

    wall, cpu = ratio_rows(CASE, own, baseline, machine=MACHINE)

    assert (wall["p50"], wall["min"], wall["metric"]) == ("3", "2", "wall_speedup")
    assert (cpu["p50"], cpu["min"], cpu["metric"]) == ("3", "2", "cpu_speedup")


def test_appended_rows_share_one_header(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    row = single_row(CASE, "clean_accuracy", "fraction", 0.5, machine=MACHINE)

    append_rows(path, [row])
    append_rows(path, [row, row])

    lines = path.read_text().splitlines()
    assert lines[0] == f"{FIRST_COLUMNS},min"
    found = list(csv.DictReader(lines))
    assert len(found) == 3
    assert found[2] == row
    assert (found[0]["p20"], found[0]["p50"], found[0]["min"]) == ("", "0.5", "")


def test_rows_are_not_added_under_other_columns(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("op,seconds\n")
    row = single_row(CASE, "clean_accuracy", "fraction", 0.5, machine=MACHINE)

    with pytest.raises(ValueError, match="has columns"):
        append_rows(path, [row])

    assert path.read_text() == "op,seconds\n"


@pytest.mark.parametrize("given", [False, True], ids=["missing", "given"])
def test_program_starts_again_once_where_settings_are_missing(given):
    environment = {k: v for k, v in os.environ.items() if k not in MALLOC_SETTINGS}
    own = dict.fromkeys(MALLOC_SETTINGS, "1048576") if given else {}

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--flag", "a b"],
        env={**environment, **own},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
    )

    expected = list((own or MALLOC_SETTINGS).values())
    assert json.loads(done.stdout) == ["x" if given else "xx", ["--flag", "a b"], expected]


def test_machine_names_processor_threads_and_versions():
    import torch

    machine = this_machine(threads=3)

    assert machine.device.startswith("CPU ")
    assert f"3 of {os.cpu_count()} threads" in machine.device
    assert machine.torch == torch.__version__.partition("+")[0]
