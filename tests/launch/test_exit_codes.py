"""What a user can do wrong: one clear line and the documented exit code each."""

import os
import pickle
from pathlib import Path

import pytest
import torch


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["teacher.pt", "teacher.safetensors"])
def test_pickle_with_a_payload_is_refused_and_not_executed(cli, tmp_path, name):
    marker = tmp_path / "executed"
    (tmp_path / name).write_bytes(pickle.dumps({"weight": Payload(marker)}))

    done = cli("purify", "--teacher", name, "--data", "fashion-mnist:train", "--out", "run")

    assert done.code == 4
    assert name in done.error
    assert not marker.exists()


def test_damaged_checkpoint_is_exit_4(cli, tmp_path, teacher):
    (tmp_path / "teacher.safetensors").write_bytes(teacher.read_bytes()[:-100])

    done = cli("inspect", "teacher.safetensors")

    assert done.code == 4
    assert "teacher.safetensors" in done.error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["encoder.architecture=timm:resnet81"], "resnet81"),
        (["encoder.architecture=timm:resnet50"], "resnet"),
    ],
)
def test_wrong_architecture_is_exit_2(cli, teacher, labeled, settings, message, quick):
    options = [part for text in settings for part in ("--set", text)]

    done = cli("purify", "--teacher", teacher, "--data", labeled, "--out", "run", *quick, *options)

    assert done.code == 2
    assert message in done.error


def test_image_size_that_does_not_fit_the_patches_is_exit_2(cli, encoders, labeled, quick):
    size = ("--set", "encoder.image_size=18")

    done = cli(
        "purify", "--teacher", encoders["vit"], "--data", labeled, "--out", "run", *quick, *size
    )

    assert done.code == 2
    assert "18" in done.error


def test_missing_teacher_is_exit_2(cli, labeled):
    done = cli("purify", "--teacher", "gone.safetensors", "--data", labeled, "--out", "run")

    assert done.code == 2
    assert "gone.safetensors does not exist" in done.error


def test_empty_folder_is_exit_2(cli, tmp_path, teacher):
    (tmp_path / "empty").mkdir()

    done = cli("purify", "--teacher", teacher, "--data", "empty", "--out", "run")

    assert done.code == 2
    assert "empty" in done.error


def test_more_images_than_the_budget_is_exit_2(cli, teacher, labeled):
    done = cli(
        "purify",
        *("--teacher", teacher, "--data", labeled / "train", "--out", "run"),
        *("--set", "data.clean_fraction=0.5"),
    )

    assert done.code == 2
    assert "--allow-budget" in done.error


def test_duplicated_tap_is_exit_3_with_its_name(cli, teacher, labeled, quick):
    done = cli(
        "purify",
        *("--teacher", teacher, "--data", labeled / "train", "--out", "run"),
        *quick,
        *("--set", "encoder.taps=['act1', 'maxpool', 'layer1']"),
    )

    assert done.code == 3
    assert "maxpool" in done.error


@pytest.mark.parametrize("out", ["file/run", "/proc/run"])
def test_run_directory_that_cannot_be_written_is_exit_7(
    cli, tmp_path, teacher, labeled, quick, out
):
    (tmp_path / "file").write_text("not a folder")

    done = cli("purify", "--teacher", teacher, "--data", labeled / "train", "--out", out, *quick)

    assert done.code == 7
    assert out in done.error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to compute on")
def test_evaluating_on_a_gpu_that_is_not_there_is_exit_2(cli, teacher, labeled):
    encoder = ("--encoder", f"teacher={teacher}", "--downstream", f"shades={labeled}")

    done = cli("evaluate", *encoder, "--device", "cuda")

    assert done.code == 2
    assert "run.device is 'cuda' but no CUDA device is visible" in done.error
    assert cli("evaluate", *encoder, "--device", "tpu").code == 2
    assert cli("evaluate", *encoder, "--device", "cpu").code == 0
