"""`mimic-fast aot`: the kernels of production, compiled in processes of their own."""

import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import typer

from mimic_fast.kernels.aot import TARGETS, Resources, failures
from mimic_fast.launch.commands.aot import Target, compiled_rows, conclude
from mimic_fast.progress import silent

WIDE = Resources(
    case="forward",
    target="sm_90",
    registers=40,
    shared=16_384,
    loads=8,
    wide_loads=8,
    matrix="IMMA",
)
NARROW = Resources(
    case="odd [rows]", target="gfx942", registers=30, loads=8, data=False, note="rows of 49"
)
SPILLING = Resources(
    case="backward", target="sm_80", registers=255, stack=24, local_loads=3, loads=8, wide_loads=6
)


def found(*rows: Resources) -> list[dict[str, Any]]:
    return [asdict(row) | {"failures": failures(row)} for row in rows]


def test_targets_are_those_of_the_compiler():
    assert list(TARGETS) == [str(target) for target in Target]


def test_table_has_a_line_for_each_kernel_and_says_why_some_are_narrow(capsys):
    lean = replace(SPILLING, target="sm_90", registers=40, stack=0, local_loads=0, wide_loads=8)

    conclude(found(WIDE, SPILLING, lean, NARROW), check=False, as_json=False)

    text = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    assert ["forward", "40 16,384 100% IMMA", "", ""] in lines
    assert ["backward", "40 0 100%", "255 0 75% FAILS", ""] in lines
    assert ["odd [rows]", "", "", "30 0 0%"] in lines
    assert text.endswith("128 bits are not demanded: rows of 49\n  odd [rows] (gfx942)\n")


def test_check_ends_with_exit_3_and_a_line_for_each_failure(capsys):
    with pytest.raises(typer.Exit) as ended:
        conclude(found(WIDE, SPILLING), check=True, as_json=True)

    assert ended.value.exit_code == 3
    assert capsys.readouterr().err.splitlines() == [
        "error: backward, sm_80: 0 registers spilled, 24 bytes of stack, "
        "3 local memory instructions",
        "error: backward, sm_80: 255 registers, at most 128",
        "error: backward, sm_80: 6 of 8 data loads are 128-bit",
    ]


def test_check_of_lean_kernels_says_nothing_more(capsys):
    conclude(found(WIDE, NARROW), check=True, as_json=True)

    assert capsys.readouterr().err == ""


def test_machine_without_triton_is_named_in_one_line():
    code = (
        "import sys; sys.modules['triton'] = None; sys.argv = ['mimic-fast', 'aot'];"
        "from mimic_fast.launch.cli import main; main()"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 7
    assert done.stderr == "error: Triton is not installed; it comes with PyTorch for Linux\n"


def test_process_that_ends_early_is_an_error_with_its_last_words():
    with pytest.raises(
        RuntimeError, match=r"(?s)ended early, exit codes \[1,.*unknown target 'sm_70'"
    ):
        compiled_rows(["sm_70"], silent)


def test_name_that_no_kernel_has_is_a_usage_error(program):
    done = program("aot", "--only", "K999", "--only", "C999")

    assert done.code == 2
    assert done.error == "error: no kernel has 'K999' or 'C999' in its name"


def checked(program, monkeypatch, *options: str) -> list[dict[str, Any]]:
    """Rows of a check that must pass, though this process interprets kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    done = program("aot", "--check", "--json", *options)

    assert done.code == 0, done.err
    assert done.err == ""
    assert done.json["failures"] == []
    rows = done.json["rows"]
    assert len({(row["case"], row["target"]) for row in rows}) == len(rows)
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(row["note"] for row in rows if not row["data"])
    return rows


def test_some_kernels_of_each_kind_are_lean_on_every_target(program, monkeypatch):
    rows = checked(program, monkeypatch, "--only", "N196 C768 bf16 mse", "--only", "cross K16")

    losses = [row for row in rows if row["case"].startswith("distill")]
    histograms = [row for row in rows if row["case"].startswith("mi")]
    assert {row["case"].split()[1] for row in losses} == {"forward", "backward"}
    assert all(row["wide_loads"] == row["loads"] > 0 for row in losses)
    assert all(row["matrix"] and not row["global_atomics"] for row in histograms)
    assert histograms


@pytest.mark.slow
def test_every_production_kernel_is_lean_on_every_target(program, monkeypatch):
    assert len(checked(program, monkeypatch)) > 400
