"""A run that was killed, stopped or damaged ends like one that was left alone, bit for bit.

As a script this file is a run that ends itself by SIGKILL, at a moment that is always the same.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from mimic_fast.distil import purify
from mimic_fast.recipe import load_settings

STEPS, EVERY, PER_EPOCH = 40, 10, 6
PARTS = 25  # of step A: 100 images in chunks of 4

# Everything that has a state: two views, projection head, moments, averaged weights.
RECIPE = """
[encoder]
teacher = "{teacher}"
[data]
source = "{images}"
clean_fraction = 1.0
allow_budget = true
[mi]
chunk = 4
[loss]
contrastive = 0.5
[optim]
epochs = 9
batch_size = 15
ema = 0.9
[run]
device = "cpu"
max_steps = 40
checkpoint_every = 10
"""


def die(recipe: str, out: str, moment: str) -> None:
    """Runs, or goes on with, a purification and ends it in step A or behind a step of training."""
    metrics, parts = Path(out, "metrics.jsonl"), Path(out, "state", "locate")

    def stop() -> bool:
        if moment == "locate":
            come = parts.is_dir() and len(list(parts.glob("*.safetensors"))) == 7
        else:
            come = metrics.exists() and metrics.read_text().count("\n") == int(moment)
        if come:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    settings = load_settings(Path(recipe), values={"run": {"out": out, "resume": "auto"}})
    purify(settings, stop=stop)


def logged(run: Path) -> list[dict[str, float]]:
    """What a run's metrics say besides times, without a last line that a kill left torn."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in ("time", "performance")} for row in rows]


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "state").glob("step_*"))


def goes_on(run: Path, old: int) -> bool:
    """Whether a resumed run has put its metrics in place of the ``old`` file and trained on."""
    return (run / "metrics.jsonl").stat().st_ino != old and len(logged(run)) > 2 * EVERY


def ends_like(run: Path, straight: Path) -> None:
    assert logged(run) == logged(straight)
    name = "encoder.safetensors"
    assert (run / name).read_bytes() == (straight / name).read_bytes()
    located = [
        json.loads((path / "mutual_information.json").read_text())["layers"]
        for path in (run, straight)
    ]
    assert located[0] == located[1]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, teacher, images) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(RECIPE.format(teacher=teacher, images=images / "train"))
    return path


def test_interrupted_runs_end_like_an_uninterrupted_one(program, wait, recipe, tmp_path):
    straight, run, damaged = (tmp_path / name for name in ("straight", "run", "damaged"))
    done = program("purify", recipe, "--out", straight)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in logged(straight)] == list(range(1, STEPS + 1))
    # Training really moves what is compared.
    assert len({row["loss"] for row in logged(straight)}) == STEPS

    # Killed inside step A: the parts on disk are used, not computed again.
    killed = program(recipe, run, "locate", script=Path(__file__))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (run / "mutual_information.json").exists()
    parts = {path: path.stat().st_ino for path in (run / "state" / "locate").iterdir()}
    assert 0 < len(parts) < PARTS

    # Killed in mid-epoch, three steps behind the last saved state.
    killed = program(recipe, run, 2 * EVERY + 3, script=Path(__file__))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {path: path.stat().st_ino for path in parts} == parts
    assert len(list((run / "state" / "locate").iterdir())) == PARTS
    assert saved(run) == ["step_0000010", "step_0000020"]
    assert (2 * EVERY) % PER_EPOCH != 0
    assert len(logged(run)) == 2 * EVERY + 3
    shutil.copytree(run, damaged)

    # Told to stop: saves where it stands, in the middle of everything.
    old = (run / "metrics.jsonl").stat().st_ino
    running = program.start("purify", recipe, "--out", run, "--resume", "auto")
    end = time.monotonic() + 100
    while running.poll() is None and time.monotonic() < end and not goes_on(run, old):
        time.sleep(0.002)
    running.send_signal(signal.SIGTERM)
    stopped = wait(running)
    assert stopped.returncode == 6, stopped.stderr
    assert "--resume auto" in stopped.stderr
    reached = logged(run)[-1]["step"]
    assert 2 * EVERY < reached < STEPS
    assert saved(run)[-1] == f"step_{reached:07d}"

    done = program("purify", recipe, "--out", run, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    ends_like(run, straight)

    # The newest state is damaged: refused by name, the one before it taken.
    weights = damaged / "state" / "step_0000020" / "student.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = program("purify", recipe, "--out", damaged, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert str(weights) in done.stderr
    assert "damaged" in done.stderr
    ends_like(damaged, straight)


if __name__ == "__main__":
    die(*sys.argv[1:])
