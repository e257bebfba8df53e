"""``mimic-fast doctor``: one line a check, and an exit code that a run would agree with."""

import pytest

from mimic_fast.doctor.finding import Finding
from mimic_fast.launch.commands.doctor import _lines

PATIENT = ("--timeout", "150")  # tests share the machine


def test_recipe_that_the_doctor_passes_runs(cli, teacher, labeled, quick):
    options = ("--teacher", teacher, "--data", labeled / "train", "--out", "run")
    settings = [item for item in quick if item != "--allow-budget"]

    done = cli("doctor", *options, *settings, "--set", "data.allow_budget=true", *PATIENT, "--json")

    assert done.code == 0, done.err
    assert done.json["can_run"]
    levels = {finding["name"]: finding["level"] for finding in done.json["findings"]}
    assert "FAILED" not in levels.values()
    assert levels["all-reduce gloo"] == "ok"
    asked = {
        "teacher",
        "data",
        "device",
        "precision",
        "run directory",
        "disk",
        "engine ddp (chosen)",
    }
    machine = {
        "packages",
        "cpu",
        "gpu",
        "compiler",
        "backends",
        "all-reduce gloo",
        "ffmpeg",
        "dali",
    }
    assert asked | machine <= set(levels)
    assert not (cli.directory / "run").exists()
    assert cli("purify", *options, *quick).code == 0


def test_recipe_that_cannot_run_is_exit_3_with_every_reason(cli, tmp_path, labeled):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "recipe.toml").write_text(
        '[run]\nout = "file/run"\nengine = "zero1"\n[optim]\nprecision = "fp64"\n'
    )

    done = cli(
        "doctor", "recipe.toml", "--teacher", "gone.pt", "--data", labeled / "train", *PATIENT
    )

    assert done.code == 3
    failed = [line for line in done.out.splitlines() if line.startswith("FAILED")]
    assert done.out.splitlines()[-len(failed) :] == failed  # where they are read
    for name, reason in (
        ("teacher", "gone.pt does not exist"),
        ("run directory", "file/run"),
        ("engine zero1 (chosen)", "float32"),
        ("data", "clean_fraction"),
    ):
        assert any(name in line and reason in line for line in failed), (name, done.out)
        assert name in done.error
    assert len(failed) == 4


def test_recipe_that_is_not_valid_is_exit_2_at_once(cli):
    done = cli("doctor", "--set", "run.enginee=ddp")

    assert done.code == 2
    assert "run.engine" in done.error
    assert not done.out


@pytest.mark.slow  # once more all that the first test tries
def test_machine_alone_needs_no_recipe(cli, tmp_path):
    done = cli("doctor", "--out", tmp_path / "later", *PATIENT)

    assert done.code == 0, done.out + done.err
    assert "teacher" not in done.out
    assert f"{tmp_path / 'later'}: 1 MiB written" in done.out
    assert {line.split()[0] for line in done.out.splitlines()} <= {"ok", "warning"}


def test_names_in_files_cannot_steer_the_terminal_and_failures_come_last():
    lines = _lines(
        [
            Finding(name="bad", level="FAILED", seen="broken", todo="mend it"),
            Finding(name="longer name", level="ok", seen="fine"),
        ]
    )

    assert lines == ["ok       longer name  fine", "FAILED   bad          broken; mend it"]
