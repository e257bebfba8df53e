"""Processes that die or fail alone: no half state is ever picked, and nobody waits for the dead."""

import random
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest

from mimic_fast.checkpoint import load_state, newest_state
from mimic_fast.errors import MachineError, StoppedError, UsageError
from tests.integration.survival import (
    OWN_STORE,
    WORLD,
    Ended,
    Launch,
    Launcher,
    ends_like,
    is_saving,
    launching,
    logged,
    parts,
    write_recipe,
)

STEPS, EVERY = 60, 3
SOON = 25  # seconds after which a process whose peer is gone has left, its interpreter included
# How often each kind of moment comes; they follow each other in one run.
MOMENTS = {"locate": 4, "distil": 6, "save": 7, "evaluate": 3}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, teacher, images) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    return write_recipe(path, teacher=teacher, images=images, steps=STEPS, every=EVERY, sets=6)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, recipe) -> Path:
    """The same run, left alone."""
    folder = tmp_path_factory.mktemp("straight")
    with launching(folder) as launcher:
        done = launcher.finish("purify", recipe, "--out", folder / "run")
    assert done.code == 0, done.output
    return folder / "run"


def wait_for(moment: str, launch: Launch, run: Path, dice: random.Random) -> None:
    """Returns at a moment of that kind, a little further than where the run stood."""
    if moment == "locate":
        wanted = parts(run) + dice.randint(1, 10)
        launch.wait_for(lambda: parts(run) >= wanted)
    elif moment == "evaluate":
        since, card = time.time(), run / "encoder.json"
        launch.wait_for(lambda: card.exists() and card.stat().st_mtime > since)
        time.sleep(dice.uniform(0, 1))
    else:
        # A kill loses the rows behind the last state: count from there.
        state = newest_state(run / "state")
        wanted = (0 if state is None else state.step) + dice.randint(1, EVERY)
        old = (run / "metrics.jsonl").stat().st_ino if (run / "metrics.jsonl").exists() else 0
        launch.wait_for(
            lambda: (
                bool(logged(run))
                and (run / "metrics.jsonl").stat().st_ino != old
                and len(logged(run)) >= wanted
            )
        )
        if moment == "save":
            launch.wait_for(lambda: is_saving(run))
            time.sleep(dice.uniform(0, 0.01))


def killed(
    launcher: Launcher, recipe: Path, run: Path, moment: str, dice: random.Random
) -> tuple[Ended, int]:
    """Goes on with the run and kills a random process; which one that was."""
    launch = launcher("purify", recipe, "--out", run, "--resume", "auto")
    wait_for(moment, launch, run, dice)
    rank = dice.randrange(WORLD)
    launch.send(signal.SIGKILL, rank)
    return launch.end(), rank


def check_killed(done: Ended, rank: int, run: Path) -> None:
    """The other process has left with one line and exit 7; every state on disk is whole."""
    other = 1 - rank
    assert rank not in done.codes
    assert done.codes == {other: MachineError.exit_code}, done.output
    assert "another process of this run is gone" in done.said[other].splitlines()[-1]
    assert "Traceback" not in done.said[other]
    assert done.seconds < SOON
    states = sorted((run / "state").glob("step_*"))
    for path in states:
        load_state(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newest = newest_state(run / "state")
    assert (None if newest is None else newest.path) == (states[-1] if states else None)


@pytest.mark.timeout(300)
def test_run_killed_in_a_save_ends_like_one_left_alone(tmp_path, recipe, straight):
    run, dice = tmp_path / "run", random.Random(1)
    with launching(tmp_path) as launcher:
        check_killed(*killed(launcher, recipe, run, "save", dice), run)
        done = launcher.finish("purify", recipe, "--out", run, "--resume", "auto")

    assert done.code == 0, done.output
    ends_like(run, straight)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_run_killed_at_twenty_moments_ends_like_one_left_alone(tmp_path, recipe, straight):
    run, dice = tmp_path / "run", random.Random(20)
    in_save = longest = 0.0
    with launching(tmp_path) as launcher:
        for moment, times in MOMENTS.items():
            for _ in range(times):
                done, rank = killed(launcher, recipe, run, moment, dice)
                in_save += is_saving(run)
                check_killed(done, rank, run)
                longest = max(longest, done.seconds)
        done = launcher.finish("purify", recipe, "--out", run, "--resume", "auto")
    assert done.code == 0, done.output
    ends_like(run, straight)
    assert in_save > 0  # some kill did leave a state half-written
    assert not is_saving(run)
    kills = sum(MOMENTS.values())
    sys.stderr.write(
        f"\n{kills} of {kills} kills, {in_save:.0f} left half a state; the other process was gone "
        f"after {longest:.1f} s at most\n"
    )


@pytest.mark.timeout(300)
def test_torchrun_restarts_a_killed_process_and_the_run_goes_on(tmp_path, recipe, straight):
    run, dice = tmp_path / "run", random.Random(2)
    with launching(tmp_path) as launcher:
        launch = launcher(*("purify", recipe, "--out", run), restarts=3, environment=OWN_STORE)
        wait_for("distil", launch, run, dice)
        launch.send(signal.SIGKILL, dice.randrange(WORLD))
        done = launch.end()

    assert done.code == 0, done.output
    assert done.codes == dict.fromkeys(range(WORLD), 0)
    ends_like(run, straight)


@pytest.mark.timeout(300)
def test_other_process_does_not_wait_for_one_without_its_teacher(tmp_path, recipe, teacher):
    (tmp_path / "teacher0.safetensors").write_bytes(teacher.read_bytes())
    (tmp_path / "teacher0.json").write_bytes(teacher.with_suffix(".json").read_bytes())

    with launching(tmp_path) as launcher:
        teachers = ("--teacher", tmp_path / "teacherRANK.safetensors")
        done = launcher.finish("purify", recipe, *teachers, "--out", tmp_path / "run")

    assert done.codes == {0: MachineError.exit_code, 1: UsageError.exit_code}, done.output
    assert "teacher1.safetensors does not exist" in done.said[1]
    assert "another process of this run is gone" in done.said[0]
    assert done.seconds < 2 * SOON  # of which the start is most


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", range(WORLD))
def test_other_process_does_not_wait_for_one_that_cannot_write(tmp_path, recipe, rank):
    (tmp_path / f"place{rank}").write_text("no folder")

    with launching(tmp_path) as launcher:
        done = launcher.finish("purify", recipe, "--out", tmp_path / "placeRANK" / "run")

    assert done.codes == dict.fromkeys(range(WORLD), MachineError.exit_code), done.output
    assert "cannot write" in done.said[rank]
    assert "another process of this run is gone" in done.said[1 - rank]
    assert done.seconds < 2 * SOON


@pytest.mark.timeout(300)
def test_process_that_waits_in_vain_for_the_others_to_start_obeys_a_signal(tmp_path, recipe):
    (tmp_path / "recipe0.toml").write_bytes(recipe.read_bytes())

    with launching(tmp_path) as launcher:
        launch = launcher("purify", tmp_path / "recipeRANK.toml", "--out", tmp_path / "run")
        launch.wait_for(lambda: "recipe1.toml" in launch.said().get(1, ""))
        done = launch.end()

    # torchrun ends the first process when the second has left
    assert "before all processes had started" in done.said[0]
    assert f"exitcode  : {StoppedError.exit_code} " in done.output
    assert done.seconds < 2 * SOON
