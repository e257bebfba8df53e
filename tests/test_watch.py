"""One process works, the others wait for it without using the CPU, and all end alike."""

import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from mimic_fast.config import OptimSettings, RunSettings
from mimic_fast.distributed import SINGLE, start
from mimic_fast.errors import MachineError, MimicError, StoppedError, UsageError
from mimic_fast.watch import leave_if, process_0_alone, running_processes

FAILURES: dict[str, Exception] = {
    "usage": UsageError("expected x, got y; give x"),
    "machine": MachineError("disk full"),
    "bug": ZeroDivisionError("division by zero"),
}
BUSY = 2.0  # seconds


def busy(stop: Callable[[], bool]) -> int:
    """Works for a while, polls all the time; how often it was asked."""
    polls, end = 0, time.monotonic() + BUSY
    while time.monotonic() < end:
        leave_if(stop)
        polls += 1
    return polls


def worker() -> dict[str, object]:
    """What becomes of works that end in several ways."""
    _, processes = start(RunSettings(device="cpu"), OptimSettings(), expected_world=2)
    found = running_processes()
    assert (found.rank, found.world) == (processes.rank, processes.world)
    assert found.device.type == processes.device.type
    told: dict[str, object] = {}
    exchanged, reduce = [], dist.all_reduce

    def counted(*arguments: object, **options: object) -> object:
        exchanged.append(arguments)
        return reduce(*arguments, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]

    dist.all_reduce = counted
    before = time.process_time()
    told["result"] = process_0_alone(busy, processes=processes)
    told["cpu"] = time.process_time() - before
    told["exchanges"] = len(exchanged)
    dist.all_reduce = reduce
    told["never polled"] = process_0_alone(lambda stop: "done", processes=processes)
    # The signal comes to the one that waits, in the middle of the work.
    soon, asked = time.monotonic() + 0.5, processes.rank == 1
    for name, work, stop in (
        ("stopped", busy, lambda: asked and time.monotonic() > soon),
        *((name, _failing(name), lambda: False) for name in FAILURES),
    ):
        began = time.monotonic()
        try:
            process_0_alone(work, processes=processes, stop=stop)
        except (MimicError, ZeroDivisionError) as error:
            told[name] = f"{type(error).__name__} {getattr(error, 'exit_code', 1)}"
            told[f"{name} seconds"] = time.monotonic() - began
    return told


def _failing(name: str) -> Callable[[Callable[[], bool]], None]:
    def work(stop: Callable[[], bool]) -> None:
        stop()
        raise FAILURES[name]

    return work


@pytest.fixture(scope="module")
def told(run_processes) -> list[dict[str, object]]:
    return run_processes(worker, timeout=60)


def test_only_process_0_has_the_result(told):
    assert told[0]["result"] > 1000
    assert told[1]["result"] is None
    assert [each["never polled"] for each in told] == ["done", None]


def test_waiting_takes_no_cpu_and_few_exchanges(told):
    assert told[0]["cpu"] > BUSY / 4  # on a machine with other work, less than all of it
    assert told[1]["cpu"] < BUSY / 10
    assert told[0]["exchanges"] == told[1]["exchanges"]
    assert 3 <= told[1]["exchanges"] <= BUSY / 0.2 + 2


def test_signal_to_a_waiting_process_stops_both_at_once(told):
    for each in told:
        assert each["stopped"] == "StoppedError 6"
        assert 0.4 < each["stopped seconds"] < BUSY - 0.5


@pytest.mark.parametrize(
    ("name", "first", "other"),
    [
        ("usage", "UsageError 2", "UsageError 2"),
        ("machine", "MachineError 7", "MachineError 7"),
        ("bug", "ZeroDivisionError 1", "MimicError 1"),
    ],
)
def test_failure_of_process_0_is_everybodys_exit_code(told, name, first, other):
    assert [each[name] for each in told] == [first, other]


def test_one_process_works_with_its_own_signal():
    stops: list[Callable[[], bool]] = []

    def stop() -> bool:
        return True

    assert process_0_alone(lambda given: stops.append(given), processes=SINGLE, stop=stop) is None
    assert stops == [stop]
    assert running_processes() == SINGLE
    with pytest.raises(StoppedError, match="--resume auto"):
        leave_if(stop)
