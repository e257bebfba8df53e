"""What ``mimic-fast bench`` measures: every path of an op that runs on this machine, in turns.

Quick and rough, to show what is picked and what that is worth here; ``benchmarks/`` has the careful
comparison with what others offer.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mimic_fast import ops
from mimic_fast.errors import UsageError

FEWEST, MOST = 3, 9  # rounds
SECONDS = 1.5  # after which no more rounds are begun, for each piece of work
ROUND_SECONDS = 0.02  # of each path in a round, at least
LOSS_SHAPES = ((64, 197, 192), (64, 197, 768), (128, 512, 4, 4))
IMAGES, BINS = 2048, 16
CROSS, MATCHED = (256, 64), (2304, 2304)  # directions of both sides

Op = Literal["distill", "histogram"]
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One path at one piece of work.

    Args:
        work: Shape and what is computed.
        path: Of :mod:`mimic_fast.ops`.
        seconds: Of a call, the median; None: it was not timed.
        reason: Why not; empty if it was.
    """

    work: str
    path: ops.Path
    seconds: float | None = None
    reason: str = ""


def measured(
    op: Op,
    work: Mapping[str, Call],
    *,
    device: torch.device,
    dtype: torch.dtype,
    compile: bool,
    only: ops.Path | None = None,
) -> list[Measured]:
    """Times each piece of work on every path that can run it.

    Args:
        op: Which op the work asks for.
        work: Calls by name; they take whatever path is forced.
        device: Of their tensors.
        dtype: Of their tensors.
        compile: Whether to time ``torch.compile`` too.
        only: The path to time; None: all.
    """
    hindrances: dict[ops.Path, str] = {
        path: _hindrance(op, path, device, dtype, compile=compile or only == path)
        for path in (ops.PATHS if only is None else (only,))
    }
    paths: list[ops.Path] = [path for path, reason in hindrances.items() if not reason]
    found: list[Measured] = []
    gc.collect()
    gc.freeze()  # collected before every timing: not among what was there before
    for name, call in work.items():
        seconds = _seconds(call, paths, device)
        found += [
            Measured(work=name, path=path, seconds=seconds.get(path), reason=reason)
            for path, reason in hindrances.items()
        ]
    gc.unfreeze()
    return found


def loss_work(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    """Attention and clone loss of one layer, forward and backward."""
    work: dict[str, Call] = {}
    clones: tuple[ops.Clone, ...] = ("mse", "cosine")
    for shape in LOSS_SHAPES:
        generator = torch.Generator().manual_seed(0)
        student, teacher = torch.randn(2, *shape, generator=generator).to(device, dtype)
        student = student.clone().requires_grad_()
        for clone in clones:
            name = f"{'x'.join(map(str, shape))}, attention + {clone}"
            work[name] = partial(_gradient, student, teacher, clone)
    return work


def information_work(device: torch.device) -> dict[str, Call]:
    """Mutual information of pairs of directions, from bin codes."""
    generator = torch.Generator().manual_seed(0)
    sizes = max(*CROSS, *MATCHED), IMAGES
    x, y = (
        torch.randint(BINS, sizes, generator=generator, dtype=torch.uint8).to(device)
        for _ in range(2)
    )
    first, second = x[: CROSS[0]], y[: CROSS[1]]
    matched = x[: MATCHED[0]], y[: MATCHED[1]]
    return {
        f"cross, {CROSS[0]} x {CROSS[1]} pairs": lambda: ops.cross_information(
            first, second, bins=BINS
        ),
        f"matched, {MATCHED[0]} pairs": lambda: ops.matched_information(*matched, bins=BINS),
    }


def _gradient(student: Tensor, teacher: Tensor, clone: ops.Clone) -> object:
    weights = student.new_ones((2, 1), dtype=torch.float32)
    (losses,) = ops.layer_losses([student], [ops.Target(teacher=teacher)], weights, clone=clone)
    return torch.autograd.grad(losses.sum(), student)


def _hindrance(
    op: Op, path: ops.Path, device: torch.device, dtype: torch.dtype, *, compile: bool
) -> str:
    """Why a path is not timed, or empty."""
    with ops.force(path):
        try:
            ops.choose(op, device, dtype)
        except UsageError as error:
            return str(error).removeprefix(f"{path} was asked for, but ")
    if path == "triton" and device.type == "cpu":
        return "interpreted here, which says nothing about speed"
    if path == "compiled" and not compile:
        return "not timed: compiling takes a minute; --compile does it"
    return ""


def _seconds(call: Call, paths: Sequence[ops.Path], device: torch.device) -> dict[ops.Path, float]:
    """Median seconds of a call on each path, all paths in every round."""
    calls: dict[ops.Path, int] = {}
    for path in paths:
        _timed(call, path, 1, device)
        once = _timed(call, path, 1, device)
        calls[path] = max(1, round(ROUND_SECONDS / max(once, 1e-6)))
    rounds: list[dict[ops.Path, float]] = []
    end = time.perf_counter() + SECONDS
    while len(rounds) < FEWEST or (len(rounds) < MOST and time.perf_counter() < end):
        rounds.append({path: _timed(call, path, calls[path], device) for path in paths})
    return {path: statistics.median(one[path] for one in rounds) for path in paths}


def _timed(call: Call, path: ops.Path, calls: int, device: torch.device) -> float:
    gc.collect()
    with ops.force(path):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
