"""A disk that fills up while a run trains: one clear line, exit 7, and the last state stands."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimic_fast.checkpoint import newest_state
from mimic_fast.errors import MachineError
from tests.integration.survival import is_saving, launching, logged, losses, write_recipe

STEPS, EVERY = 60, 2
DISK = 64 * 2**20
LEFT = 100_000  # bytes: room for rows of metrics, none for a state


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small disk of its own; gone with the test."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leaves LEFT bytes of the disk."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - LEFT)
    return ballast


@pytest.mark.timeout(300)
def test_full_disk_is_exit_7_and_the_run_goes_on_once_there_is_room(
    tmp_path, disk, teacher, images
):
    recipe, run = tmp_path / "recipe.toml", disk / "run"
    write_recipe(recipe, teacher=teacher, images=images, steps=STEPS, every=EVERY)
    with launching(tmp_path) as launcher:
        launch = launcher("purify", recipe, "--out", run)
        launch.wait_for(lambda: (run / "state").is_dir() and len(logged(run)) > 2 * EVERY)
        ballast = fill(disk)
        done = launch.end()

        assert done.codes[0] == MachineError.exit_code, done.output
        last = done.said[0].splitlines()[-1]
        assert last.startswith("error: ")
        assert "No space left" in last
        assert not any("Traceback" in said for said in done.said.values())
        assert len(logged(run)) < STEPS
        state = newest_state(run / "state")
        assert state is not None
        assert state.step > 0
        assert not is_saving(run)
        trained = [row for row in losses(run) if row[0] <= state.step]

        ballast.unlink()
        done = launcher.finish("purify", recipe, "--out", run, "--resume", "auto")

    assert done.code == 0, done.output
    assert losses(run)[: len(trained)] == trained
    assert [row[0] for row in losses(run)] == list(range(1, STEPS + 1))
    assert (run / "report.json").exists()
