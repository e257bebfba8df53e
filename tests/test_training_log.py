"""Rows of metrics, windows of cost and divergence, read several steps at once."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mimic_fast.config import OptimSettings, RunSettings, Settings
from mimic_fast.distributed import SINGLE, Processes, start
from mimic_fast.errors import DivergedError
from mimic_fast.performance import WINDOW_STEPS
from mimic_fast.step_clock import StepClock
from mimic_fast.training_log import TERMS, TrainingLog

BATCH = 6


class Run:
    """A log and the clock of its steps, which take some time."""

    def __init__(
        self,
        out: Path | None,
        *,
        accelerator: Accelerator,
        processes: Processes = SINGLE,
        **optim: Any,
    ) -> None:
        settings = Settings.model_validate({"optim": {"batch_size": BATCH, **optim}})
        self.clock = StepClock(processes.device)
        self.log = TrainingLog(
            out,
            settings=settings,
            accelerator=accelerator,
            processes=processes,
            module=nn.Linear(2, 2),
            clock=self.clock,
        )
        self.out, self.done = out, 0
        self.clock.begin()

    def steps(self, *losses: float, **numbers: float) -> None:
        """Takes a step for every loss; one that is not finite is skipped."""
        for loss in losses:
            self.done += 1
            with self.clock.section("student"):
                time.sleep(0.001)
            self.clock.step_done()
            self.log.add(
                self.done,
                rate=0.5 / self.done,
                ids=torch.tensor([self.done, 100 + self.done]),
                numbers=numbers_of(loss, **numbers),
                ran={"clone_loss": self.done},
            )

    def rows(self) -> list[dict[str, Any]]:
        assert self.out is not None
        path = self.out / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers_of(
    loss: float, *, norm: float = 2.0, bad: float | None = None, stop: float = 0.0
) -> Tensor:
    """A row as the loop stacks it on the device."""
    terms = [loss, 0.25, 0.5, 0.75, 1.5, 0.125]
    skipped = float(not math.isfinite(loss)) if bad is None else bad
    return torch.tensor([*terms, norm, skipped, stop], dtype=torch.float64)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return start(RunSettings(device="cpu"), OptimSettings(), expected_world=1)[0]


@pytest.fixture
def run(tmp_path, accelerator):
    def make(out: Path | None = tmp_path, **options: Any) -> Run:
        return Run(out, accelerator=accelerator, **options)

    return make


def test_rows_are_written_by_a_flush_in_the_order_of_steps(run):
    made = run()

    made.steps(3.0, 2.0)
    assert made.rows() == []
    assert made.log.flush() is False
    made.steps(1.0)
    made.log.flush()

    rows = made.rows()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == [3.0, 2.0, 1.0]
    assert [row["lr"] for row in rows] == [0.5, 0.25, 0.5 / 3]
    assert [row["ops"] for row in rows] == [{"clone_loss": n} for n in (1, 2, 3)]
    for row in rows:
        assert [row[term] for term in TERMS[1:]] == [0.25, 0.5, 0.75, 1.5, 0.125]
        assert row["grad_norm"] == 2.0
        assert row["skipped"] is False
        assert 0.001 <= row["time"]["student"] <= row["time"]["seconds"]
        assert "ids" not in row
        assert "performance" not in row
    assert made.log.shown == {name: rows[-1][name] for name in (*TERMS, "lr", "grad_norm")}


def test_flush_of_nothing_writes_nothing(run):
    made = run()

    assert made.log.flush() is False
    assert made.log.flush(last=True) is False
    assert made.rows() == []


def test_skipped_steps_are_counted_with_their_items(run):
    made = run()
    made.steps(1.0, math.nan, 1.0)
    made.steps(1.0, bad=1.0, norm=math.inf)

    made.log.flush()

    rows = made.rows()
    assert [row["skipped"] for row in rows] == [False, True, False, True]
    assert rows[1]["loss"] is None  # JSON has no NaN
    assert rows[3]["grad_norm"] is None
    assert [row.get("ids") for row in rows] == [None, [2, 102], None, [4, 104]]
    assert made.log.skipped == 2


@pytest.mark.parametrize("asked", [1, 3])
def test_a_process_that_was_asked_to_stop_is_told_of(run, asked):
    made = run()
    for step in (1, 2, 3):
        made.steps(1.0, stop=float(step == asked))

    assert made.log.flush() is True
    made.steps(1.0)
    assert made.log.flush() is False


@pytest.mark.parametrize("flush_steps", [1, 4, WINDOW_STEPS])
def test_cost_is_written_at_the_end_of_windows_and_of_the_run(run, flush_steps):
    made, last = run(), 2 * WINDOW_STEPS + 3
    assert not made.log.cost
    for step in range(1, last + 1):
        made.steps(1.0)
        if step % flush_steps == 0 or step == last:
            made.log.flush(last=step == last)

    rows = made.rows()
    windows = {row["step"]: row["performance"] for row in rows if "performance" in row}
    assert {step: found["steps"] for step, found in windows.items()} == {
        WINDOW_STEPS: WINDOW_STEPS,
        2 * WINDOW_STEPS: WINDOW_STEPS,
        last: 3,
    }
    seconds = sum(row["time"]["seconds"] for row in rows[WINDOW_STEPS : 2 * WINDOW_STEPS])
    rate = BATCH * WINDOW_STEPS / seconds
    found = windows[2 * WINDOW_STEPS]["images_per_second"]
    assert found == pytest.approx(rate, rel=1e-3)  # four digits
    assert made.log.cost["images_per_second"] == windows[last]["images_per_second"]


def test_divergence_amid_a_flush_ends_the_log_with_its_step(run):
    made = run(max_nonfinite=3)
    made.steps(1.0, math.nan, 1.0, math.nan, math.inf, math.nan, 1.0, 1.0)

    with pytest.raises(DivergedError, match="3 times in a row, at step 6"):
        made.log.flush()

    assert [row["step"] for row in made.rows()] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in made.log.rows] == [1, 2, 3, 4, 5, 6]
    assert made.rows()[-1]["ids"] == [6, 106]
    assert made.log.skipped == 4
    assert made.log.flush() is False  # what came after is not of this run


def test_bad_steps_add_up_over_flushes(run):
    made = run(max_nonfinite=3)
    made.steps(1.0, math.nan, math.nan)
    made.log.flush()
    made.steps(math.nan, 1.0)

    with pytest.raises(DivergedError, match="at step 4"):
        made.log.flush()
    assert len(made.rows()) == 4


def test_divergence_at_the_end_of_a_window_still_tells_its_cost(run):
    made = run(max_nonfinite=1)
    made.steps(*[1.0] * (WINDOW_STEPS - 1), math.nan, 1.0)

    with pytest.raises(DivergedError):
        made.log.flush()

    assert made.rows()[-1]["performance"]["steps"] == WINDOW_STEPS


def test_overflow_of_float16_is_no_divergence(run):
    made = run(max_nonfinite=1, precision="fp16")
    made.steps(*[1.0] * 4, bad=1.0, norm=math.inf)

    made.log.flush()

    assert made.log.skipped == 4


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_restored_counts_go_on(run, tmp_path, precision):
    first = run(tmp_path / "first", max_nonfinite=3, precision=precision)
    first.steps(math.nan, 1.0, math.nan, math.nan)
    first.log.flush()
    counts = json.loads(json.dumps(first.log.counts()))  # as a run state keeps them

    second = run(tmp_path / "second", max_nonfinite=3, precision=precision)
    second.log.restore(counts)
    assert second.log.skipped == 3
    assert second.log.counts() == first.log.counts()
    second.steps(math.nan)
    with pytest.raises(DivergedError, match="3 times in a row"):
        second.log.flush()
    assert second.log.skipped == 4

    fresh = run(tmp_path / "fresh", max_nonfinite=3, precision=precision)
    fresh.steps(math.nan)
    fresh.log.flush()  # or restoring proved nothing


def test_last_rows_are_kept_for_a_dump(run):
    made = run()
    for _ in range(3):
        made.steps(*[1.0] * 9)
        made.log.flush()

    assert [row["step"] for row in made.log.rows] == list(range(28 - WINDOW_STEPS, 28))


def test_nothing_is_written_without_a_folder_or_by_another_process(run, tmp_path):
    other = Processes(rank=1, world=1, device=torch.device("cpu"))
    for name, made in (
        ("nowhere", run(None)),
        ("other", run(tmp_path / "other", processes=other)),
    ):
        made.steps(1.0, 2.0)
        made.log.flush(last=True)
        assert [row["step"] for row in made.log.rows] == [1, 2], name
        assert made.log.cost["images_per_second"] > 0, name
    assert list(tmp_path.iterdir()) == []


# Two processes.


def worker(out: str) -> dict[str, Any]:
    """Each writes to a folder of its own name, if it writes."""
    run = RunSettings(device="cpu")
    accelerator, processes = start(run, OptimSettings(), expected_world=2)
    rank = processes.rank
    options = {"accelerator": accelerator, "processes": processes, "max_nonfinite": 2}
    made = Run(Path(out) / str(rank), **options)
    made.steps(*(1.0 + 2 * rank for _ in range(WINDOW_STEPS)))
    made.log.flush()
    # Process 1 alone sees a loss that is not finite; the gradient told both to skip the step.
    made.steps(1.0 if rank == 0 else math.nan, bad=1.0)
    stopped = made.log.flush()
    made.steps(1.0, 1.0, 1.0, bad=1.0)
    try:
        made.log.flush()
    except DivergedError as error:
        return {
            "error": str(error),
            "stopped": stopped,
            "kept": [row["step"] for row in made.log.rows][-1],
            "loss": made.log.rows[0]["loss"],
            "skipped": made.log.skipped,
        }
    return {}


@pytest.mark.slow  # tests/integration/test_two_processes.py holds whole runs against each other
def test_two_processes_share_means_decisions_and_one_file(run_processes, tmp_path):
    results = run_processes(worker, world=2, out=str(tmp_path))

    last = WINDOW_STEPS + 2
    for result in results:
        assert result["error"].startswith("loss or gradient not finite 2 times in a row, at step")
        assert result["stopped"] is False
        assert (result["kept"], result["loss"], result["skipped"]) == (last, 2.0, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    lines = (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    assert [row["loss"] for row in rows[:-2]] == [2.0] * WINDOW_STEPS
    assert rows[-2]["loss"] is None
    costs = [row["performance"] for row in rows if "performance" in row]
    assert [len(found["ranks"]["step_p50_ms"]) for found in costs] == [2]
