"""What a run costs, over all processes: images/s, waits, sections, step times, memory, scaling."""

import math
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mimic_fast.distributed import Processes, all_gather_rows
from mimic_fast.step_clock import SECTIONS

WINDOW_STEPS = 20
_NANOSECONDS = 1e-9


def summary(
    rows: Sequence[Mapping[str, float]],
    *,
    processes: Processes,
    images_per_step: int,
    communication: Sequence[Mapping[str, float]] | None,
) -> dict[str, Any]:
    """The ``performance`` of a window of steps. Every process calls it, with as many rows.

    Scaling efficiency is the share of step time that a process is not kept from its own work by the
    others: ``(step - communication - waiting) / step``, a mean over processes. Communication that
    runs while a process computes costs nothing and is not counted. A process is kept for the time
    its collectives take, for the wire and for slower processes alike; the process kept least waited
    for nobody, so its time is ``communication`` and what the others were kept beyond it is
    ``waiting``. One process has efficiency 1. Against a single process, the number leaves out what
    a smaller batch per process, or a machine shared by processes, costs each of them.

    Args:
        rows: Of :meth:`StepClock.read`, one a step.
        processes: All of them bring their figures.
        images_per_step: Of all processes.
        communication: :func:`ddp_communication` of steps of the window; None: the engine does not
            tell, and every figure that needs it is None.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("a summary needs at least one step, got none")
    mine = torch.tensor([_figures(rows, communication, processes)], dtype=torch.float64)
    table = all_gather_rows(mine.to(processes.device), processes).tolist()
    ranks: list[dict[str, float]] = [dict(zip(_COLUMNS, row, strict=True)) for row in table]
    step = _mean(ranks, "seconds")
    rate = images_per_step / max(rank["seconds"] for rank in ranks)
    sections = {name: _mean(ranks, name) for name in SECTIONS}
    sections["other"] = max(0.0, step - sum(sections.values()))
    return {
        "steps": len(rows),
        "images_per_second": _short(rate),
        "images_per_second_per_process": _short(rate / processes.world),
        "data_wait": _short(sections["data"] / step),
        "milliseconds": {name: _short(1e3 * value) for name, value in sections.items()},
        "scaling": _scaling(ranks, step),
        "ranks": {
            "step_p50_ms": [_short(1e3 * rank["p50"]) for rank in ranks],
            "step_p99_ms": [_short(1e3 * rank["p99"]) for rank in ranks],
            "data_wait": [_short(rank["data"] / rank["seconds"]) for rank in ranks],
            "peak_memory_bytes": [int(rank["memory"]) for rank in ranks],
        },
        "peak_memory": "allocated" if processes.device.type == "cuda" else "resident",
    }


def shown(performance: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a summary for the progress line, as metrics of an event."""
    times = performance["milliseconds"]
    return {
        "images_per_second": performance["images_per_second"],
        "images_per_second_per_process": performance["images_per_second_per_process"],
        "data_wait": performance["data_wait"],
        "teacher_ms": times["teacher"],
        "student_ms": times["student"],
    }


def watch_ddp(model: nn.Module, *, every: int) -> None:
    """Has DistributedDataParallel time its all-reduces in every n-th step; others are left alone.

    On CUDA, ``every`` must reach back to a step that the loop has synchronized with, else DDP waits
    for the device.
    """
    if isinstance(model, DistributedDataParallel):
        model._set_ddp_runtime_logging_sample_rate(every)


def ddp_communication(model: nn.Module) -> dict[str, float] | None:
    """Seconds of gradient all-reduces in the last step that DistributedDataParallel timed.

    ``total`` from the start of the first bucket to the end of the last; ``exposed`` is the part of
    it after the backward pass had computed everything. The figures become known in the forward pass
    after.

    Returns:
        None for another engine, before anything was timed, and beside torch's SyncBatchNorm, whose
        collectives in the forward pass nobody times: where they wait, the gradients need not.
    """
    if not isinstance(model, DistributedDataParallel):
        return None
    if any(isinstance(part, nn.SyncBatchNorm) for part in model.modules()):
        return None
    data = model._get_ddp_logging_data()
    total = data.get("backward_comm_time", 0)
    if not total:
        return None
    overlap = data.get("backward_compute_comm_overlap_time", 0)
    return {"total": total * _NANOSECONDS, "exposed": max(0, total - overlap) * _NANOSECONDS}


_COLUMNS: tuple[str, ...] = ("seconds", "p50", "p99", *SECTIONS, "exposed", "memory")


def _figures(
    rows: Sequence[Mapping[str, float]],
    communication: Sequence[Mapping[str, float]] | None,
    processes: Processes,
) -> list[float]:
    """This process's numbers, in the order of ``_COLUMNS``; unknown ones are NaN."""
    steps = torch.tensor([row["seconds"] for row in rows], dtype=torch.float64)
    p50, p99 = steps.quantile(steps.new_tensor([0.5, 0.99])).tolist()
    sections = [statistics.fmean(row.get(name, 0.0) for row in rows) for name in SECTIONS]
    exposed = math.nan
    if processes.world == 1:
        exposed = 0.0
    elif communication:
        exposed = statistics.fmean(sample["exposed"] for sample in communication)
    return [float(steps.mean()), p50, p99, *sections, exposed, float(_peak_memory(processes))]


def _peak_memory(processes: Processes) -> int:
    """Bytes: allocated on the device at most, or resident at most for a process on the CPU."""
    if processes.device.type == "cuda":
        return torch.cuda.max_memory_allocated(processes.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _scaling(ranks: Sequence[Mapping[str, float]], step: float) -> dict[str, Any]:
    """Who was kept by whom, in milliseconds; all None where a process does not know."""
    kept = [rank["exposed"] + rank["communication"] for rank in ranks]
    if any(map(math.isnan, kept)):
        return dict.fromkeys(("efficiency", "communication_ms", "waiting_ms", "slowest_rank"))
    least = min(kept)
    busy = [rank["seconds"] - time for rank, time in zip(ranks, kept, strict=True)]
    return {
        "efficiency": _short(statistics.fmean(busy) / step),
        "communication_ms": _short(1e3 * least),
        "waiting_ms": _short(1e3 * (statistics.fmean(kept) - least)),
        "slowest_rank": busy.index(max(busy)),
    }


def _mean(ranks: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.fmean(rank[name] for rank in ranks)


def _short(value: float) -> float:
    """Four digits: what a clock on a shared machine is good for."""
    return float(f"{value:.4g}")
