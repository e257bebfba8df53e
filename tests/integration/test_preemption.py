"""SIGTERM and SIGUSR1 in every phase: all processes save, leave with exit 6, and go on later."""

import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mimic_fast.checkpoint import newest_state
from mimic_fast.errors import StoppedError
from tests.integration.survival import (
    WORLD,
    Ended,
    Launcher,
    ends_like,
    is_saving,
    launching,
    logged,
    parts,
    write_recipe,
)

SOON = 25  # seconds from the signal to the end of all processes
TIMES = 10
PHASES = ("locate", "distil", "evaluate")
STEPS, EVERY = 130, 4
Target = tuple[signal.Signals, int | None]  # None: the torchrun agent
AGENT: Target = (signal.SIGTERM, None)


def recipe_in(folder: Path, teacher: Path, images: Path, *, steps: int) -> Path:
    path = folder / "recipe.toml"
    return write_recipe(path, teacher=teacher, images=images, steps=steps, every=EVERY, sets=12)


def moment(phase: str, run: Path, dice: random.Random) -> Callable[[], bool]:
    """Tells when to strike: a little further in the phase than where the run stands now."""
    if phase == "locate":
        wanted = parts(run) + dice.randint(1, 3)
        return lambda: parts(run) >= wanted
    if phase == "distil":
        rows, in_save = len(logged(run)) + dice.randint(1, 6), dice.random() < 0.5
        return lambda: len(logged(run)) >= rows and (not in_save or is_saving(run))
    wait, since, card = dice.uniform(0.05, 1.5), time.time(), run / "encoder.json"
    return lambda: (
        card.exists()
        and card.stat().st_mtime > since
        and (time.time() > card.stat().st_mtime + wait)
    )


def stopped(
    launcher: Launcher, recipe: Path, run: Path, phase: str, target: Target, dice: random.Random
) -> Ended:
    """Goes on with the run and strikes in the phase."""
    ready = moment(phase, run, dice)
    launch = launcher("purify", recipe, "--out", run, "--resume", "auto")
    launch.wait_for(ready)
    launch.send(*target)
    return launch.end()


def check_stopped(done: Ended, run: Path, phase: str) -> None:
    """Every process left with exit 6 in time, behind a state of the step that all had reached."""
    assert done.codes == dict.fromkeys(range(WORLD), StoppedError.exit_code), done.output
    assert done.seconds < SOON
    for said in done.said.values():
        assert "Traceback" not in said
        assert "--resume auto" in said.splitlines()[-1]
    if phase == "locate":
        assert parts(run) > 0
        assert not (run / "mutual_information.json").exists()
        return
    state = newest_state(run / "state")
    assert state is not None
    if phase == "distil":
        assert state.step == logged(run)[-1]["step"]
        assert not (run / "encoder.json").exists()
    else:
        assert (run / "encoder.json").exists()
        assert not (run / "report.json").exists()


@pytest.mark.timeout(300)
def test_signal_to_one_process_while_the_other_evaluates_stops_both(tmp_path, teacher, images):
    recipe, run = recipe_in(tmp_path, teacher, images, steps=5), tmp_path / "run"
    dice = random.Random(0)
    with launching(tmp_path) as launcher:
        done = stopped(launcher, recipe, run, "evaluate", (signal.SIGUSR1, 1), dice)
        check_stopped(done, run, "evaluate")

        finished = launcher.finish("purify", recipe, "--out", run, "--resume", "auto")

    assert finished.code == 0, finished.output
    assert (run / "report.json").exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("phase", "target"), [("locate", (signal.SIGTERM, 1)), ("distil", AGENT)])
def test_signal_stops_all_processes(tmp_path, teacher, images, phase, target):
    recipe, run = recipe_in(tmp_path, teacher, images, steps=STEPS), tmp_path / "run"

    with launching(tmp_path) as launcher:
        done = stopped(launcher, recipe, run, phase, target, random.Random(0))

    check_stopped(done, run, phase)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, teacher, images) -> Path:
    """The same run, left alone."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = recipe_in(folder, teacher, images, steps=STEPS)
    with launching(folder) as launcher:
        done = launcher.finish("purify", recipe, "--out", folder / "run")
    assert done.code == 0, done.output
    return folder / "run"


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("to", ["agent", "rank"])
def test_signals_in_every_phase_time_and_again(tmp_path, teacher, images, straight, to):
    """One run, stopped ten times in each phase; SIGTERM and SIGUSR1 to ranks take turns."""
    recipe, run = recipe_in(tmp_path, teacher, images, steps=STEPS), tmp_path / "run"
    dice = random.Random(to)
    longest = dict.fromkeys(PHASES, 0.0)
    with launching(tmp_path) as launcher:
        for phase in PHASES:
            for time_ in range(TIMES):
                kind = (signal.SIGTERM, signal.SIGUSR1)[time_ % 2]
                target = AGENT if to == "agent" else (kind, dice.randrange(WORLD))
                done = stopped(launcher, recipe, run, phase, target, dice)
                check_stopped(done, run, phase)
                longest[phase] = max(longest[phase], done.seconds)
        finished = launcher.finish("purify", recipe, "--out", run, "--resume", "auto")
    assert finished.code == 0, finished.output
    ends_like(run, straight)
    shown = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in longest.items())
    sys.stderr.write(f"\nsignals to {to}: {TIMES} of {TIMES} in each phase; longest {shown}\n")
