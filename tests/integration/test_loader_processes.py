"""Real runs in one, two and four processes: who took which item, and how it was seen.

As a script this file is one process of a purification that notes every batch, and may kill itself.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from mimic_fast import training
from mimic_fast.data.loader import Batch
from mimic_fast.distil import purify
from mimic_fast.recipe import load_settings

IMAGES = 90  # of 100, a tenth is held out
BATCH, PASSES, EVERY = 16, 3, 4
BACKENDS = ["torch", pytest.param("dali", marks=pytest.mark.slow)]
Step = list[tuple[int, list[str]]]  # items with digests of their views

RECIPE = """
[encoder]
teacher = "{teacher}"
[data]
source = "{images}"
clean_fraction = 1.0
allow_budget = true
hold_out = 0.1
backend = "{backend}"
[mi]
chunk = 32
[loss]
contrastive = 0.5
[loss.harden]
probability = 0.5
[optim]
epochs = 3
batch_size = 16
warmup_epochs = 0
[run]
device = "cpu"
checkpoint_every = 4
"""


def main(recipe: str, out: str, notes: str, kill_after: str) -> None:
    """Purifies, notes items and digests of views by step, and dies behind step ``kill_after``."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    step_of = training._Loop.step

    def noted(loop: training._Loop, step: int, batch: Batch, *, stop: bool) -> None:
        rows = zip(batch.ids.tolist(), batch.v1, batch.v2, batch.student, strict=True)  # pyright: ignore[reportArgumentType, reportCallIssue]
        seen = [(item, [digest(view) for view in views]) for item, *views in rows]
        with Path(notes, f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "seen": seen}) + "\n")
        step_of(loop, step, batch, stop=stop)
        if step + 1 == int(kill_after):
            os.kill(os.getpid(), signal.SIGKILL)

    training._Loop.step = noted  # pyright: ignore[reportAttributeAccessIssue]
    settings = load_settings(Path(recipe), values={"run": {"out": out, "resume": "auto"}})
    purify(settings, world=world)


def digest(view) -> str:
    return hashlib.sha256(view.contiguous().numpy().tobytes()).hexdigest()[:16]


def noted_steps(notes: Path) -> dict[int, Step]:
    """What all ranks took, by step, in the order of ranks."""
    steps: dict[int, Step] = {}
    for path in sorted(notes.glob("*.jsonl"), key=lambda path: int(path.stem)):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            steps.setdefault(row["step"], []).extend(row["seen"])
    return steps


@pytest.fixture(params=BACKENDS)
def recipe(request, tmp_path, teacher, images) -> Path:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(teacher=teacher, images=images / "train", backend=request.param))
    return path


@pytest.fixture
def run(tmp_path, recipe, torchrun):
    """``run(name, world, kill_after=0, go_on=None)``: what was noted, and how it ended."""

    def start(name: str, world: int, *, kill_after: int = 0, out: Path | None = None):
        notes = tmp_path / f"notes_{name}"
        notes.mkdir()
        done = torchrun(
            [__file__, str(recipe), str(out or tmp_path / name), str(notes), str(kill_after)],
            world=world,
            timeout=200,
        )
        assert (done.returncode == 0) == (kill_after == 0), done.stdout[-4000:]
        return noted_steps(notes)

    return start


def test_any_number_of_processes_also_after_a_kill_takes_every_item_once_a_pass(run, tmp_path):
    whole = run("one", 1)
    stream = [item for step in range(len(whole)) for item, _ in whole[step]]
    assert len(stream) == -(-PASSES * IMAGES // BATCH) * BATCH
    for start in range(0, PASSES * IMAGES, IMAGES):
        assert sorted(stream[start : start + IMAGES]) == list(range(IMAGES))

    assert run("two", 2) == whole  # items, order of steps and every bit of every view
    killed = run("killed", 4, kill_after=7)
    assert killed == {step: whole[step] for step in range(7)}
    for world in (1, 2, 4):
        out = tmp_path / f"on{world}"
        shutil.copytree(tmp_path / "killed", out)
        rest = run(f"rest{world}", world, out=out)
        # From the state of step 4 on, without loss or repeat.
        assert rest == {step: whole[step] for step in range(EVERY, len(whole))}
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, len(whole) + 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
