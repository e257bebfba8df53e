"""A purification that ends by itself, by real runs; also killed, also in two processes."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mimic_fast.config import Settings
from mimic_fast.distil import PurifyResult, purify
from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.evaluation.held_out import read_held_out
from mimic_fast.progress import Event

# Nothing is lower by half: flat after the third pass, then a third of the steps done.
PLATEAU = {"rule": "plateau", "patience": 2, "min_delta": 0.5, "cooldown": 0.34}


def settings_of(
    teacher: Path, images: Path, out: Path, stop: dict[str, Any], **sections: Any
) -> Settings:
    given = {
        "encoder": {"teacher": teacher},
        "data": {
            "source": str(images / "train"),
            "clean_fraction": 1,
            "allow_budget": True,
            "hold_out": 0.2,
        },
        "optim": {"epochs": 20, "batch_size": 16, "warmup_epochs": 0},
        "stop": stop,
        "run": {"out": out, "device": "cpu", "checkpoint_every": 1, "keep": 100},
    }
    return Settings.model_validate(
        {name: {**given.get(name, {}), **sections.get(name, {})} for name in {**given, **sections}}
    )


def rates(out: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights_differ(one: PurifyResult, other: PurifyResult) -> list[str]:
    theirs = other.purified.state_dict()
    return [n for n, v in one.purified.state_dict().items() if not v.equal(theirs[n])]


def test_plateau_ends_a_run_by_a_cooldown(tmp_path, teacher, images):
    messages: list[Event] = []
    settings = settings_of(teacher, images, tmp_path / "run", PLATEAU)

    result = purify(settings, report=messages.append)

    rows = read_held_out(tmp_path / "run" / "held_out.jsonl")
    per_pass = (len(result.pool) - result.clean_set.hold_out) / 16
    done = next(s for s in range(1, 100) if s * 16 // (per_pass * 16) == 3)
    assert result.trained.steps == done + max(1, round(0.34 * done)) < 20 * per_pass
    assert any("flat at pass 3" in (event.message or "") for event in messages)
    assert rows[0]["epoch"] == 1
    assert rows[-1]["epoch"] >= 3
    found = rates(tmp_path / "run")
    assert len(found) == result.trained.steps
    cooling = found[done:]
    assert all(a > b > 0 for a, b in pairwise(cooling))
    assert cooling[-1] < found[done - 1] * 1.01 / len(cooling)
    card = json.loads((tmp_path / "run" / "encoder.json").read_text())
    assert card["steps"] == result.trained.steps


@pytest.mark.parametrize("when", ["before the plateau", "in the cooldown"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, teacher, images, when):
    whole = purify(settings_of(teacher, images, tmp_path / "whole", PLATEAU))
    steps = whole.trained.steps
    ends = iter([False] * (2 if when == "before the plateau" else steps - 4) + [True] * 100)

    stopping = settings_of(teacher, images, tmp_path / "run", PLATEAU)
    armed = False

    def stop() -> bool:
        return armed and next(ends)

    def report(event: Event) -> None:
        nonlocal armed
        armed = armed or event.unit == "steps"

    with pytest.raises(StoppedError):
        purify(stopping, stop=stop, report=report)
    resumed = settings_of(teacher, images, tmp_path / "run", PLATEAU, run={"resume": "auto"})
    again = purify(resumed)

    assert again.trained.steps == steps
    assert not weights_differ(again, whole)
    assert rates(tmp_path / "run") == rates(tmp_path / "whole")
    name = "held_out.jsonl"
    assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_recording_does_not_touch_training(tmp_path, teacher, images):
    few = {"epochs": 2}
    record = settings_of(teacher, images, tmp_path / "a", {"rule": "record", "every": 2}, optim=few)
    never = settings_of(teacher, images, tmp_path / "b", {}, optim=few)

    assert not weights_differ(purify(record), purify(never))
    (row,) = read_held_out(tmp_path / "a" / "held_out.jsonl")
    assert row["epoch"] == 2
    assert not (tmp_path / "b" / "held_out.jsonl").exists()


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"data": {"hold_out": 0.0}}, "at least 16 held-out images, there are 0"),
        ({"run": {"engine": "fsdp2"}}, "whole on one process"),
    ],
)
def test_a_rule_that_cannot_measure_is_refused(tmp_path, teacher, images, sections, expected):
    settings = settings_of(teacher, images, tmp_path / "run", PLATEAU, **sections)

    with pytest.raises(UsageError, match=expected):
        purify(settings)


def worker(teacher: str, source: str, out: str) -> None:
    purify(settings_of(Path(teacher), Path(source), Path(out), PLATEAU), world=2)


def test_two_processes_end_together(tmp_path, teacher, images, run_processes):
    run_processes(
        worker,
        teacher=str(teacher),
        source=str(images),
        out=str(tmp_path / "run"),
        world=2,
        timeout=300,
    )

    one = purify(settings_of(teacher, images, tmp_path / "one", PLATEAU))
    assert len(rates(tmp_path / "run")) == one.trained.steps
    rows = read_held_out(tmp_path / "run" / "held_out.jsonl")
    assert len(rows) == len(read_held_out(tmp_path / "one" / "held_out.jsonl"))
