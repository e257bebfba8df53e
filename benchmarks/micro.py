"""Timing of single operations, microseconds to seconds long: on the CPU, or with CUDA events.

Each candidate is called so often in a round that the round takes about as long for all. On a GPU
its caches are emptied before every call, and the seconds are those between two events around it.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from measure import (
    Case,
    Machine,
    Row,
    Timing,
    cpu_clock,
    interleaved,
    spread_row,
    this_machine,
)

Clock = Callable[[Callable[[], object], int], tuple[float, float]]
Device = Literal["cpu", "cuda"]

RESULTS = Path(__file__).parent / "results"
_MOST_CALLS = 1000
_CACHE = 256 << 20  # bytes; more than the last cache of a GPU holds
# What the two halves of a Timing are called.
_CLOCKS = {"cpu": ("wall", "cpu"), "cuda": ("gpu", "host")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What it is measured on."""

    device: Device
    machine: Machine


def device_clock(device: Device) -> Clock:
    """Seconds a call: of wall and CPU time, or of the GPU and of the CPU that drives it."""
    return cpu_clock if device == "cpu" else _cuda_clock()


def in_turns(
    candidates: Mapping[str, Callable[[], object]], args: argparse.Namespace, place: Place
) -> dict[str, Timing]:
    """Times the candidates as ``args`` says: ``rounds``, ``warmup``, ``round_seconds``."""
    clock = device_clock(place.device)
    gc.collect()
    gc.freeze()  # the clock collects garbage every time: not among what was there before
    try:
        return interleaved(
            candidates,
            rounds=args.rounds,
            warmup=args.warmup,
            calls=calls_per_round(candidates, seconds=args.round_seconds, clock=clock),
            clock=clock,
            report=lambda line: print(line, flush=True),
        )
    finally:
        gc.unfreeze()


def calls_per_round(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float, clock: Clock
) -> dict[str, int]:
    """How often each candidate is to be called to fill so many seconds; at least once."""
    found: dict[str, int] = {}
    for name, candidate in candidates.items():
        clock(candidate, 1)
        once = max(min(clock(candidate, 1)), seconds / _MOST_CALLS)
        found[name] = max(1, round(seconds / once))
    return found


def time_rows(case: Case, timing: Timing, place: Place) -> list[Row]:
    """Seconds a call by both clocks."""
    first, second = _CLOCKS[place.device]
    return [
        spread_row(case, f"{first}_time", "s", timing.wall, min(timing.wall), place.machine),
        spread_row(case, f"{second}_time", "s", timing.cpu, min(timing.cpu), place.machine),
    ]


def ratio_row(case: Case, metric: str, timing: Timing, baseline: Timing, place: Place) -> Row:
    """The baseline's seconds over the candidate's, round by round."""
    own, other = deciding(timing, place), deciding(baseline, place)
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    return spread_row(case, metric, "x", ratios, min(other) / min(own), place.machine)


def rate_row(case: Case, unit: str, amount: float, timing: Timing, place: Place) -> Row:
    """So much a second."""
    rates = [amount / seconds for seconds in deciding(timing, place)]
    return spread_row(case, "rate", unit, rates, max(rates), place.machine)


def deciding(timing: Timing, place: Place) -> tuple[float, ...]:
    """CPU time, which other work on the machine disturbs least; on a GPU its own time."""
    return timing.cpu if place.device == "cpu" else timing.wall


def place_of(device: Device) -> Place:
    """This machine, or its GPU, driven by one thread.

    Exits with code 2 if a GPU is asked for and there is none.
    """
    machine = this_machine(threads=1)
    if device == "cuda":
        if not torch.cuda.is_available():
            print("error: --device cuda needs a CUDA device and torch sees none", file=sys.stderr)
            sys.exit(2)
        machine = replace(machine, device=f"CUDA {torch.cuda.get_device_name()}")
    return Place(device=device, machine=machine)


def results_file(theme: str, device: str) -> Path:
    """Where rows of this month go: ``<theme>_<hardware>_<yyyymm>.csv``."""
    return RESULTS / f"{theme}_{device}_{date.today():%Y%m}.csv"


def _cuda_clock() -> Clock:
    cache = torch.empty(_CACHE, dtype=torch.uint8, device="cuda")

    def clock(candidate: Callable[[], object], calls: int) -> tuple[float, float]:
        gc.collect()
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(calls)
        ]
        torch.cuda.synchronize()
        host = time.process_time()
        for start, end in pairs:
            cache.zero_()
            start.record()
            candidate()
            end.record()
        torch.cuda.synchronize()
        host = time.process_time() - host
        milliseconds = sum(start.elapsed_time(end) for start, end in pairs)
        return milliseconds / 1000 / calls, host / calls

    return clock
