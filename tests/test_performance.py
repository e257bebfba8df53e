import math
import statistics
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mimic_fast.batchnorm import synchronize_batchnorm
from mimic_fast.distributed import SINGLE, Processes
from mimic_fast.performance import ddp_communication, shown, summary, watch_ddp
from mimic_fast.step_clock import StepClock

# step seconds, and of them: waiting for data, exposed all-reduce, "communication"
RANKS = {
    0: {"seconds": 0.10, "data": 0.01, "exposed": 0.03, "communication": 0.01},
    1: {"seconds": 0.10, "data": 0.02, "exposed": 0.005, "communication": 0.005},
}


def rows(seconds: list[float], **sections: float) -> list[dict[str, float]]:
    return [{"seconds": value, **sections} for value in seconds]


def test_one_process_knows_all_of_it():
    steps = [0.1] * 98 + [0.2, 0.6]
    result = summary(
        rows(steps, data=0.02, teacher=0.03, optimizer=0.01),
        processes=SINGLE,
        images_per_step=50,
        communication=None,
    )

    assert result["steps"] == 100
    assert result["images_per_second"] == pytest.approx(50 * 100 / sum(steps), rel=1e-3)
    assert result["images_per_second_per_process"] == result["images_per_second"]
    assert result["data_wait"] == pytest.approx(0.02 * 100 / sum(steps), rel=1e-3)
    times = result["milliseconds"]
    assert (times["data"], times["teacher"], times["student"]) == (20.0, 30.0, 0.0)
    assert sum(times.values()) == pytest.approx(1e3 * sum(steps) / 100, rel=1e-3)
    assert result["scaling"] == {
        "efficiency": 1.0,
        "communication_ms": 0.0,
        "waiting_ms": 0.0,
        "slowest_rank": 0,
    }
    assert result["ranks"]["step_p50_ms"] == [100.0]
    assert result["ranks"]["step_p99_ms"] == [pytest.approx(204.0)]  # 0.2 + 0.01 * (0.6 - 0.2)
    assert result["peak_memory"] == "resident"


def test_memory_is_the_process_s_peak():
    one = rows([0.1])

    def peak() -> int:
        result = summary(one, processes=SINGLE, images_per_step=1, communication=None)
        return result["ranks"]["peak_memory_bytes"][0]

    before = peak()
    bytes_held = before + 2**26  # more than the process held at any time before
    held = torch.ones(bytes_held, dtype=torch.uint8)
    after = peak()
    del held

    assert bytes_held < after < 1.1 * (bytes_held + before)
    assert peak() == after


def test_a_summary_of_no_step_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        summary([], processes=SINGLE, images_per_step=1, communication=None)


def test_the_progress_line_gets_what_the_summary_has():
    result = summary(
        rows([0.1], student=0.04), processes=SINGLE, images_per_step=8, communication=None
    )

    assert shown(result) == {
        "images_per_second": 80.0,
        "images_per_second_per_process": 80.0,
        "data_wait": 0.0,
        "teacher_ms": 0.0,
        "student_ms": 40.0,
    }


def test_only_data_parallel_tells_of_its_communication():
    model = nn.Linear(2, 2)
    watch_ddp(model, every=1)

    assert ddp_communication(model) is None


def beside_batchnorm(world: Processes) -> dict[str, float]:
    """Where rank 1 comes 30 ms late to a forward pass that waits for all: means of ten steps."""
    clock = StepClock(world.device)
    processes = replace(world, clock=clock)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)]
    module = synchronize_batchnorm(nn.Sequential(*layers), processes)
    model = DistributedDataParallel(module)
    model.broadcast_buffers = False
    clock.begin()
    for _ in range(10):
        with clock.section("student"):
            if world.rank == 1:
                time.sleep(0.03)
            features = model(torch.randn(2, 3, 8, 8))
        with clock.section("backward"):
            features.sum().backward()
        clock.step_done()
    rows = clock.read()
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def gathered() -> dict[str, Any]:
    """Two summaries with made-up figures by rank, one without what DDP says, and a real model."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    processes = Processes(rank=rank, world=2, device=torch.device("cpu"))
    mine = dict(RANKS[rank])
    told = [{"total": 0.05, "exposed": mine.pop("exposed")}]
    steps = [mine | {"seconds": mine["seconds"] * (1 + rank * late)} for late in (0.0, 0.0, 0.5)]
    known = summary(steps, processes=processes, images_per_step=32, communication=told)
    unknown = summary(steps, processes=processes, images_per_step=32, communication=None)
    return {"known": known, "unknown": unknown, "real": trained(processes)} | {
        "batchnorm": beside_batchnorm(processes)
    }


def trained(processes: Processes) -> dict[str, Any]:
    """Twelve steps in which rank 1 is 30 ms late with its gradients."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(4)]
    model = DistributedDataParallel(nn.Sequential(*layers))
    watch_ddp(model, every=1)
    clock, images = StepClock(processes.device), torch.randn(16, 256)
    before, told = ddp_communication(model), []
    clock.begin()
    for _ in range(12):
        with clock.section("student"):
            features = model(images)
            if processes.rank == 1:
                time.sleep(0.03)
        with clock.section("backward"):
            features.sum().backward()
        clock.step_done()
        told.append(ddp_communication(model))
    samples = [sample for sample in told[2:] if sample is not None]
    result = summary(
        clock.read()[2:], processes=processes, images_per_step=32, communication=samples
    )
    return {"before": before, "samples": samples, "summary": result}


@pytest.fixture(scope="module")
def two(run_processes) -> list[dict[str, Any]]:
    return run_processes(gathered)


def test_processes_agree_on_one_summary(two):
    assert two[0]["known"] == two[1]["known"]
    result = two[0]["known"]

    # the later process ends the step: 3 steps of 32 images in 0.1 + 0.1 + 0.15 s
    assert result["images_per_second"] == pytest.approx(32 * 3 / 0.35, rel=1e-3)
    assert result["images_per_second_per_process"] == pytest.approx(16 * 3 / 0.35, rel=1e-3)
    assert result["ranks"]["step_p50_ms"] == [100.0, 100.0]
    assert result["ranks"]["step_p99_ms"] == [100.0, 149.0]
    assert result["ranks"]["data_wait"] == [0.1, pytest.approx(0.06 / 0.35, rel=1e-3)]
    assert len(result["ranks"]["peak_memory_bytes"]) == 2


def test_efficiency_takes_off_what_a_process_is_kept(two):
    scaling = two[0]["known"]["scaling"]

    # kept: 40 ms of 100 and 10 ms of 116.7; the process kept least waited for nobody
    assert scaling["communication_ms"] == pytest.approx(10.0)
    assert scaling["waiting_ms"] == pytest.approx(15.0)
    assert scaling["efficiency"] == pytest.approx((60 + 350 / 3 - 10) / (100 + 350 / 3), rel=1e-3)
    assert scaling["slowest_rank"] == 1


def test_what_an_engine_does_not_tell_is_null(two):
    result = two[0]["unknown"]

    assert set(result["scaling"].values()) == {None}
    assert result["milliseconds"] == two[0]["known"]["milliseconds"]


def test_waiting_inside_a_synchronized_forward_pass_is_communication(two):
    early, late = (part["batchnorm"] for part in two)

    assert early["communication"] > 0.02 > late["communication"]
    assert early["student"] < 0.02 < late["student"]


def test_data_parallel_s_own_times_find_the_late_process(two):
    early, late = (part["real"] for part in two)

    assert early["before"] is None
    for sample in (*early["samples"], *late["samples"]):
        assert 0 <= sample["exposed"] <= sample["total"]
    exposed = [
        sorted(sample["exposed"] for sample in part["samples"])[len(part["samples"]) // 2]
        for part in (early, late)
    ]
    assert exposed[0] > 0.02 > exposed[1]
    scaling = early["summary"]["scaling"]
    assert scaling["slowest_rank"] == 1
    assert scaling["waiting_ms"] > 7
    assert 0 < scaling["efficiency"] < 0.95
    assert not math.isnan(scaling["communication_ms"])
