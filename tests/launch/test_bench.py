"""``mimic-fast bench``: what is picked, why, and times of what runs here."""

import json
import os

import pytest
import torch
from typer.testing import CliRunner

from mimic_fast.launch import bench_ops
from mimic_fast.launch.cli import app, run
from mimic_fast.launch.commands.bench import ForcedPath
from mimic_fast.ops import PATHS

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what is picked here is asked of a machine without a GPU"
)


@pytest.fixture(autouse=True)
def small_work(monkeypatch):
    """One round of small tensors: what the clock says is not looked at."""
    monkeypatch.setattr(bench_ops, "FEWEST", 1)
    monkeypatch.setattr(bench_ops, "SECONDS", 0.0)
    monkeypatch.setattr(bench_ops, "ROUND_SECONDS", 1e-6)
    monkeypatch.setattr(bench_ops, "LOSS_SHAPES", ((2, 5, 8), (2, 4, 3, 3)))
    monkeypatch.setattr(bench_ops, "IMAGES", 50)
    monkeypatch.setattr(bench_ops, "CROSS", (4, 3))
    monkeypatch.setattr(bench_ops, "MATCHED", (5, 5))
    monkeypatch.setattr("mimic_fast.launch.memory.keep_freed_memory", lambda: True)


def bench(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_losses_are_timed_on_every_path_that_runs_here():
    shown = json.loads(bench("loss", "--json"))

    assert shown["op"] == "distill"
    assert shown["dtype"] == "float32"
    assert shown["picked"]["path"] == "cpp"
    assert "cpu" in shown["picked"]["reason"]
    rows = {(row["work"], row["path"]): row for row in shown["rows"]}
    shapes = ("2x5x8", "2x4x3x3")
    works = {f"{shape}, attention + {clone}" for shape in shapes for clone in ("mse", "cosine")}
    assert rows.keys() == {(work, path) for work in works for path in PATHS}
    for (_, path), row in rows.items():
        assert (row["seconds"] is not None) == (path in ("reference", "cpp"))
        assert bool(row["reason"]) == (row["seconds"] is None)


def test_information_is_timed_on_every_path_that_runs_here():
    shown = json.loads(bench("mi", "--json"))

    assert shown["picked"]["path"] == "cpp"
    timed = {(row["work"], row["path"]) for row in shown["rows"] if row["seconds"]}
    works = ("cross, 4 x 3 pairs", "matched, 5 pairs")
    assert timed == {(work, path) for work in works for path in ("reference", "cpp")}
    (compiled,) = {row["reason"] for row in shown["rows"] if row["path"] == "compiled"}
    assert compiled.startswith("counting has no compiled form")


def test_table_shows_times_and_what_is_not_timed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    shown = bench("loss")

    assert "2x4x3x3, attention + cosine" in shown
    assert "picked: cpp (the fastest for cpu tensors)" in shown
    assert "compiled: not timed" in shown
    assert "triton: interpreted here" in shown  # as the tests are


def test_forced_path_is_the_only_one_and_says_that_it_was_forced():
    shown = json.loads(bench("loss", "--force-op", "reference", "--dtype", "bfloat16", "--json"))

    assert shown["picked"] == {"path": "reference", "reason": "forced"}
    assert shown["dtype"] == "bfloat16"
    assert {row["path"] for row in shown["rows"]} == {"reference"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mi", "--force-op", "compiled"), "counting has no compiled form; use reference"),
        (("loss", "--force-op", "cpp", "--dtype", "float16"), "not torch.float16; use reference"),
        (("loss", "--force-op", "fastest"), "'--force-op'"),
        (("mi", "--device", "cuda"), "no CUDA device is visible; use 'auto' or 'cpu'"),
        (("mi", "--device", "tpu"), "--device must be auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_what_cannot_run_here_is_one_line_and_exit_2(arguments, message, capsys):
    code = run(["bench", *arguments])

    shown = capsys.readouterr()
    assert code == 2
    assert message in shown.err
    assert shown.err.count(os.linesep) == 1
    assert shown.out == ""


def test_paths_on_the_command_line_are_those_of_the_ops():
    assert [path.value for path in ForcedPath] == list(PATHS)
