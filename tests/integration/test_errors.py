"""What only a run of the real program shows: one clear line on stderr, and the exit code.

Mistakes in the arguments are in tests/launch/test_exit_codes.py.
"""

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder

QUICK = (
    *("--device", "cpu", "--set", "data.clean_fraction=1.0", "--allow-budget"),
    *("--set", "optim.epochs=2", "--set", "optim.batch_size=30"),
)


def error(done: subprocess.CompletedProcess[str]) -> str:
    """The last line on stderr, and the only error."""
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: "), done.stderr
    assert not any(line.startswith(("error: ", "Traceback")) for line in before), done.stderr
    return last


def test_dead_tap_is_exit_3_with_its_name(program, resnet, images, tmp_path):
    encoder = build_encoder(resnet, seed=7).eval()
    with torch.no_grad():
        for parameter in encoder.backbone.get_submodule("layer3").parameters():
            parameter.zero_()
    teacher = export_encoder(encoder, tmp_path / "teacher", key_map=None, card={})

    done = program("purify", "--teacher", teacher, "--data", images, "--out", "run", *QUICK)

    assert done.returncode == 3, done.stderr
    assert "tap 'layer3' is dead" in error(done)


def test_file_that_is_no_checkpoint_is_exit_4(program, images, tmp_path):
    (tmp_path / "teacher.pth").write_bytes(random.Random(0).randbytes(5000))

    done = program("purify", "--teacher", "teacher.pth", "--data", images, "--out", "run", *QUICK)

    assert done.returncode == 4, done.stderr
    assert "teacher.pth" in error(done)


@pytest.fixture
def photographs(images: Path, tmp_path: Path) -> Path:
    """The pictures as JPEG files, one of them cut off in the middle of its pixels."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in (images / "train").rglob("*.png"):
        Image.open(path).save(folder / f"{path.stem}.jpg", quality=95)
    torn = folder / "0050.jpg"
    torn.write_bytes(torn.read_bytes()[:900])
    return folder


def test_torn_photograph_is_left_out_by_name_and_the_run_goes_on(
    program, teacher, photographs, tmp_path
):
    done = program("purify", "--teacher", teacher, "--data", photographs, "--out", "run", *QUICK)

    assert done.returncode == 0, done.stderr
    assert "0050.jpg" in done.stderr
    assert "Traceback" not in done.stderr
    quarantine = (tmp_path / "run" / "quarantine.json").read_text()
    assert "0050.jpg" in quarantine
    assert quarantine.count(".jpg") == 1
    used = json.loads((tmp_path / "run" / "clean_set.json").read_text())["items"]
    assert len(used) == 99
    assert (tmp_path / "run" / "encoder.safetensors").exists()


def small_files(arguments: list[str]) -> None:
    """The program where a file cannot grow beyond 150 kB, as on a disk that fills up."""
    from mimic_fast.launch.cli import main

    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
    sys.argv = ["mimic-fast", *arguments]
    main()


def test_disk_that_fills_up_in_training_is_exit_7(program, teacher, images, tmp_path):
    # Step A's parts and every other file before the first run state are smaller.
    done = program(
        *("purify", "--teacher", teacher, "--data", images / "train", "--out", "run", *QUICK),
        *("--set", "run.checkpoint_every=2", "--set", "mi.chunk=10"),
        script=Path(__file__),
    )

    assert done.returncode == 7, done.stderr
    assert "cannot write" in error(done)
    assert "run" in error(done)


if __name__ == "__main__":
    small_files(sys.argv[1:])
