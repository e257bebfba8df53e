"""Comparisons in real processes: what is finished is kept, what is missing is run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mimic_fast.comparison.figures import read_results
from mimic_fast.comparison.run import compare
from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.evaluation.attack_file import read_attack
from mimic_fast.launch.cli import run
from mimic_fast.progress import Event


def toml(value: Any) -> str:
    """Enough of TOML to write a matrix: everything inline."""
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(key)} = {toml(one)}" for key, one in value.items())
        return f"{{ {inner} }}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in values.items()))
    return path


def without_time(rows) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "cpu_seconds")} for row in rows]


def test_every_cell_is_run_once_and_its_figures_stand_in_all_tables(matrix, files, tmp_path):
    results = tmp_path / "results.csv"
    settings = matrix(results=str(results))
    hardened = settings.defenses["hardened"].model_copy(update={"seeds": (0, 1)})
    settings = settings.model_copy(
        update={
            "attacks": {"first": settings.attacks["first"]},
            "defenses": {**settings.defenses, "hardened": hardened},
        }
    )
    events: list[Event] = []

    first = compare(settings, tmp_path / "out", jobs=2, report=events.append)

    assert (first.ran, first.skipped, first.failed) == (4, 0, {})
    found = read_results(tmp_path / "out" / "table.csv")
    assert [(row["attack"], row["defense"], row["seed"]) for row in found] == [
        ("first", defense, str(seed))
        for defense, seed in (("none", 0), ("hardened", 0), ("hardened", 1), ("floor", 0))
    ]
    for row in found:
        assert 0 <= float(row["ca_low"]) <= float(row["ca"]) <= float(row["ca_high"]) <= 1
        assert float(row["cpu_seconds"]) > 0
        assert row["test_images"] == "20"
        assert row["victims"] == "10"
        if row["defense"] == "none":
            assert float(row["ca_minus_teacher"]) == float(row["asr_minus_teacher"]) == 0
            assert row["p_ca_minus_teacher"] == row["p_asr_minus_teacher"] == "1"
        assert 0 < float(row["p_ca_minus_teacher"]) <= 1
    # The target is what the teacher's probe says, and was settled before the cells ran.
    assert set(read_attack(files / "first").targets) == {"toy"}
    by_seed = {row["seed"]: row["digest"] for row in found if row["defense"] == "hardened"}
    assert by_seed["0"] != by_seed["1"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| first | hardened |" in text
    assert "toy, linear probe" in text

    second = compare(settings, tmp_path / "elsewhere", jobs=2)  # the results file has them all

    assert (second.ran, second.skipped) == (0, 4)
    assert list(second.rows) == list(first.rows)
    assert not (tmp_path / "elsewhere" / "cells").exists()


def test_a_stopped_comparison_goes_on_to_the_same_table(values, tmp_path, capsys):
    few = values()
    few["attacks"].pop("second")
    few["defenses"].pop("floor")
    matrix = written(tmp_path / "matrix.toml", few)

    process = subprocess.Popen(
        [sys.executable, "-m", "mimic_fast", "compare", matrix, "--out", tmp_path / "out"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    cells = tmp_path / "out" / "cells"
    while not list(cells.glob("*/*/*/cell.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    done = {path: path.stat().st_mtime_ns for path in cells.glob("*/*/*/cell.json")}

    assert process.returncode == 6, said
    assert "cells to go; continue with --resume auto" in said
    assert len(done) == 1
    assert len(read_results(tmp_path / "out" / "table.csv")) == len(done)

    found = []
    for out in ("out", "whole"):
        assert run(["compare", str(matrix), "--out", str(tmp_path / out), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))

    assert {path: path.stat().st_mtime_ns for path in done} == done  # none was run again
    resumed, straight = found
    assert resumed["skipped"] == len(done)
    assert without_time(resumed["rows"]) == without_time(straight["rows"])


def test_a_failed_cell_is_named_and_stops_no_other(values, tmp_path, capsys):
    changed = values()
    changed["attacks"].pop("second")
    changed["defenses"] = {
        "wild": {"kind": "purify", "settings": {"optim": {"batch_size": 4000}}},
        "none": {"kind": "none"},
    }
    matrix = written(tmp_path / "matrix.toml", changed)

    code = run(["compare", str(matrix), "--out", str(tmp_path / "out")])

    said = capsys.readouterr()
    assert code == 1
    (line,) = [line for line in said.err.splitlines() if line.startswith("error")]
    assert "1 cells failed, the first first/wild/0" in line
    assert "exit 2" in line
    assert "| first | none |" in said.out


def test_cells_of_other_settings_are_not_passed_off_as_these(matrix, values, tmp_path):
    only = {"defenses": {"none": {"kind": "none"}}}
    only["attacks"] = {"first": values()["attacks"]["first"]}
    compare(matrix(**only), tmp_path / "out")
    other = {**values()["evaluation"], "probe_l2": 0.5}

    with pytest.raises(UsageError, match=r"cell first/none/0: .* made with other settings"):
        compare(matrix(**only, evaluation=other), tmp_path / "out")
    with pytest.raises(UsageError, match="already holds a comparison"):
        compare(matrix(**only), tmp_path / "out", resume=False)


def test_stopping_before_anything_ran_leaves_whole_tables(matrix, tmp_path):
    with pytest.raises(StoppedError):
        compare(matrix(), tmp_path / "out", stop=lambda: True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"defenses": {"x": {"kind": "magic"}}}, "no defense of kind 'magic'; there are none"),
        ({"defenses": {}}, "defenses"),
        ({"defenses": {"a/b": {"kind": "none"}}}, "a/b"),
        ({"attacks": {"x": {"encoder": "nowhere.safetensors"}}}, "nowhere.safetensors does not"),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"evaluation": {}}, "name a labeled set"),
        ({"data": {}}, "name the clean images"),
        ({"data": {"crop": 1}}, "unknown setting 'data.crop'"),
        (
            {"defenses": {"x": {"kind": "purify", "settings": {"seed": 3}}}},
            "defenses.x.settings.seed is the same for all cells",
        ),
        (
            {"defenses": {"x": {"kind": "purify", "settings": {"optim": {"lrr": 3}}}}},
            "defenses.x: unknown setting 'optim.lrr'",
        ),
    ],
)
def test_a_wrong_matrix_is_one_clear_line(values, tmp_path, capsys, change, says):
    matrix = written(tmp_path / "matrix.toml", {**values(), **change})

    code = run(["compare", str(matrix), "--out", str(tmp_path / "out")])

    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error")]
    assert code == 2
    assert says in line
    assert not (tmp_path / "out").exists()


def test_a_target_outside_the_classes_is_refused(values, files, tmp_path, capsys):
    path = files / "first" / "attack.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "targets": {"toy": 9}}))
    matrix = written(tmp_path / "matrix.toml", {**values(), "defenses": {"none": {"kind": "none"}}})

    code = run(["compare", str(matrix), "--out", str(tmp_path / "out")])

    said = capsys.readouterr()
    assert code == 1
    assert "target 9 of 'toy' is not one of its 2 classes" in said.err
    assert "| second | none |" in said.out  # the other attack's figures stand


def test_resume_is_auto_or_never(values, tmp_path, capsys):
    matrix = written(tmp_path / "matrix.toml", values())

    code = run(["compare", str(matrix), "--out", str(tmp_path / "out"), "--resume", "nver"])

    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error")]
    assert code == 2
    assert "--resume must be auto or never, got 'nver'" in line
    assert not (tmp_path / "out").exists()
