"""Fair timing on a busy machine, and the rows it leaves; used by every ``benchmarks/bench_*.py``.

Candidates run interleaved in one process, so that a slow minute of the machine hits all of them;
wall and CPU time are both kept, and of each the median and the fastest round. The allocator keeps
its memory: with glibc's defaults every large tensor is mapped and faulted in anew, which would
punish whoever makes more of them.
"""

import csv
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import numpy as np

# Bytes. Above the first glibc maps memory anew each time; the others keep freed memory in the heap.
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "1073741824",
}


class Row(TypedDict):
    """One figure: ``p20``, ``p50`` and ``p80`` over the rounds, ``min`` from the fastest alone.

    ``min`` is thus the smallest time, the highest rate, or the ratio of two smallest times. What
    one run measures once has ``p50`` only.
    """

    op: str
    impl: str
    mode: str
    shape: str
    dtype: str
    metric: str
    unit: str
    p20: str
    p50: str
    p80: str
    device: str
    torch: str
    triton: str
    commit: str
    date: str
    min: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What was measured: ``impl`` did ``op`` in ``mode`` on ``shape``."""

    op: str
    impl: str
    mode: str
    shape: str
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where and with what it was measured."""

    device: str
    torch: str
    triton: str
    commit: str
    date: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of each round: on the clock, and of CPU over all threads of the process."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]


def ensure_malloc_settings() -> None:
    """Starts this program again with ``MALLOC_SETTINGS`` in its environment if they are missing.

    Call it before anything is computed. Values that the caller has set are left alone.
    """
    missing = {name: value for name, value in MALLOC_SETTINGS.items() if name not in os.environ}
    if missing:
        sys.stdout.flush()
        sys.stderr.flush()
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **missing})


def cpu_clock(candidate: Callable[[], object], calls: int) -> tuple[float, float]:
    """Seconds a call, on the clock and of CPU."""
    gc.collect()  # nobody pays for another's garbage
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        candidate()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    calls: Mapping[str, int] | None = None,
    clock: Callable[[Callable[[], object], int], tuple[float, float]] = cpu_clock,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Timing]:
    """Times every candidate in every round, each round starting with another one.

    Args:
        candidates: What to time, by name; called without arguments, the result is dropped.
        rounds: Timed rounds.
        warmup: Rounds before them, not timed.
        calls: How often each is called in a round, one after the other; None: once.
        clock: Calls a candidate so often; seconds a call, as :class:`Timing` has them.
        report: Told one line a round.
    """
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warmup, rounds):
        shift = number % len(candidates)
        names = list(candidates)
        for name in names[shift:] + names[:shift]:
            seconds, cpu_seconds = clock(candidates[name], calls[name] if calls else 1)
            if number >= 0:
                wall[name].append(seconds)
                cpu[name].append(cpu_seconds)
        last = ", ".join(f"{name} {times[-1]:.4g} s" for name, times in wall.items() if times)
        report(f"round {number + 1}/{rounds}: {last or 'warm-up'}")
    return {name: Timing(wall=tuple(wall[name]), cpu=tuple(cpu[name])) for name in candidates}


def timing_rows(case: Case, timing: Timing, *, images: int, machine: Machine) -> list[Row]:
    """Of one candidate: seconds a step on the clock and of CPU, images per second of wall time."""
    rates = [images / seconds for seconds in timing.wall]
    return [
        spread_row(case, "wall_time", "s", timing.wall, min(timing.wall), machine),
        spread_row(case, "cpu_time", "s", timing.cpu, min(timing.cpu), machine),
        spread_row(case, "throughput", "images/s", rates, max(rates), machine),
    ]


def ratio_rows(case: Case, timing: Timing, baseline: Timing, *, machine: Machine) -> list[Row]:
    """How many times faster than ``baseline``, round by round, on the clock and in CPU time."""
    rows: list[Row] = []
    for name, own, other in (
        ("wall", timing.wall, baseline.wall),
        ("cpu", timing.cpu, baseline.cpu),
    ):
        ratios = [b / a for a, b in zip(own, other, strict=True)]
        rows.append(
            spread_row(case, f"{name}_speedup", "x", ratios, min(other) / min(own), machine)
        )
    return rows


def spread_row(
    case: Case, metric: str, unit: str, values: Sequence[float], best: float, machine: Machine
) -> Row:
    """A figure of every round, and that of the fastest one."""
    p20, p50, p80 = (f"{value:.6g}" for value in np.percentile(values, [20, 50, 80]))
    return Row(
        **asdict(case),
        metric=metric,
        unit=unit,
        p20=p20,
        p50=p50,
        p80=p80,
        **asdict(machine),
        min=f"{best:.6g}",
    )


def single_row(case: Case, metric: str, unit: str, value: float, *, machine: Machine) -> Row:
    """A figure that was measured once."""
    row = spread_row(case, metric, unit, [value], value, machine)
    return {**row, "p20": "", "p80": "", "min": ""}


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a CSV file, which is begun if it does not exist.

    Raises:
        ValueError: If the file has other columns.
    """
    columns = list(Row.__annotations__)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise ValueError(f"{path} has columns {found}, expected {columns}; use another file")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def this_machine(*, threads: int) -> Machine:
    """Processor, versions, commit and date of a measurement with so many threads."""
    return Machine(
        device=f"{_processor()}, {threads} of {os.cpu_count()} threads",
        torch=_version("torch"),
        triton=_version("triton"),
        commit=_commit(),
        date=date.today().isoformat(),
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done.stdout.strip()
