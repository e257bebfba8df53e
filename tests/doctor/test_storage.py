"""The run directory is really written to, left as it was, and measured against the states."""

import os
from pathlib import Path

import pytest
import torch

from mimic_fast.doctor.storage import disk_space, run_directory, state_bytes
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.optim import build_optimizer
from mimic_fast.step import Student
from mimic_fast.training_state import optimizer_tensors


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_new_directory_is_tried_and_removed_again(tmp_path):
    (tmp_path / "kept").mkdir()

    finding = run_directory(tmp_path / "kept" / "a" / "b", resume="never")

    assert finding.level == "ok"
    assert "1 MiB written, synced and renamed" in finding.seen
    assert tree(tmp_path) == ["kept"]


def test_directory_of_a_run_stays_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    resumed = run_directory(tmp_path, resume="auto")
    again = run_directory(tmp_path, resume="never")

    assert resumed.level == "ok"
    assert again.level == "FAILED"
    assert "--resume auto" in again.todo
    assert tree(tmp_path) == ["config.json"]


def test_directory_below_a_file_fails_and_says_where(tmp_path):
    (tmp_path / "file").write_text("no folder")

    finding = run_directory(tmp_path / "file" / "run", resume="never")

    assert finding.level == "FAILED"
    assert "file/run" in finding.seen
    assert "--out" in finding.todo


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system without files")
def test_file_system_that_takes_no_files_fails():
    assert run_directory(Path(f"/proc/{os.getpid()}/run"), resume="never").level == "FAILED"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optim.name=sgd", "loss.contrastive=0.5"),
        ("optim.name=sgd", "optim.momentum=0"),
        ("optim.precision=fp64", "optim.ema=0.9", "loss.contrastive=0.5"),
    ],
    ids=["adamw", "sgd-projection", "sgd-plain", "fp64-ema"],
)
def test_size_of_a_state_is_what_a_run_would_write(settings, encoder, overrides):
    run = settings(*overrides)
    width = run.loss.projection if run.loss.contrastive > 0 else 0
    student = Student(TappedEncoder(encoder, default_taps(encoder)), projection=width, seed=0)
    if run.optim.precision == "fp64":
        student.double()
    optimizer = build_optimizer(student, run.optim)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = [value.nbytes for value in student.state_dict().values()]
    moments = [value.nbytes for value in optimizer_tensors(optimizer)[0].values()]

    written = sum(weights) * (1 + (run.optim.ema > 0)) + sum(moments)

    assert state_bytes(run, encoder) == pytest.approx(written, rel=0.02)
    student.float()


def test_disk_that_is_too_small_for_the_states_fails(tmp_path, settings, encoder):
    some, far_more = settings("run.keep=3"), settings("run.keep=1000000000")

    enough = disk_space(tmp_path / "not" / "there", some, encoder)
    short = disk_space(tmp_path, far_more, encoder)

    assert enough.level == "ok"
    assert str(tmp_path) in enough.seen
    assert short.level == "FAILED"
    assert "run.keep" in short.todo


def test_without_a_recipe_only_free_space_is_told(tmp_path):
    assert "free at" in disk_space(tmp_path, None, None).seen
