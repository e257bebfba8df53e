"""What bench_loss.py does with one shape: candidates, their check, their times, their rows."""

import argparse
import math
from collections.abc import Callable

import torch
from loss_peers import at_loss, check, compiled, nad_loss, ours, plain, problem
from measure import Case, Row, Timing
from micro import Place, in_turns, rate_row, ratio_row, time_rows
from torch import Tensor

from mimic_fast import ops

DENSE = ("mse", "cosine")
FUSED: dict[str, ops.Path] = {"cpu": "cpp", "cuda": "triton"}
MEMORY = 32 << 20  # elements of each array of the triad that no cache holds

Candidates = dict[str, Callable[[], object]]


def loss_rows(shape: str, args: argparse.Namespace, place: Place) -> list[Row]:
    """Checks all candidates on one shape, then times them in turns.

    Raises:
        AssertionError: If one computes something else; nothing is timed then.
    """
    torch.set_num_threads(1)
    candidates = checked_candidates(shape, args)
    print(f"{shape}: all agree with the oracle; timing", flush=True)
    return rows_of(in_turns(candidates, args, place), shape, args, place)


def checked_candidates(shape: str, args: argparse.Namespace) -> Candidates:
    """Everything that is timed on one shape: the triads, and ``implementation, dense loss``."""
    torch._dynamo.reset()
    given = problem(
        [int(size) for size in shape.split("x")],
        dtype=getattr(torch, args.dtype),
        device=args.device,
        trunk=args.device == "cuda",
    )
    fused = FUSED[args.device]
    candidates = triads(given.student.detach(), given.teacher)
    for dense in DENSE:
        group = {
            "eager NAD": plain(nad_loss, given, dense=dense),
            "eager AT": plain(at_loss, given, dense=dense),
            "mimic_fast reference": ours("reference", given, dense=dense),
            f"mimic_fast {fused}": ours(fused, given, dense=dense),
        }
        if not args.no_compile:
            group["compiled NAD"] = compiled(given, dense=dense)
            group["mimic_fast compiled"] = ours("compiled", given, dense=dense)
        check(group, given, dense=dense)
        candidates |= {f"{name}, {dense}": candidate for name, candidate in group.items()}
    return candidates


def triads(student: Tensor, teacher: Tensor) -> Candidates:
    """``out = s + 3 t``, two arrays read and one written: on these tensors, and on large ones.

    The first finds in the caches what the losses find there, the second nothing.
    """

    def triad(first: Tensor, second: Tensor) -> Callable[[], object]:
        out = torch.zeros_like(first)
        return lambda: torch.add(first, second, alpha=3, out=out)

    large = student.new_ones(MEMORY)
    return {"triad": triad(student, teacher), "memory triad": triad(large, large.clone())}


def rows_of(
    timings: dict[str, Timing], shape: str, args: argparse.Namespace, place: Place
) -> list[Row]:
    """Seconds of each; of ours what it is ahead of the others, and its share of the triads."""
    width = getattr(torch, args.dtype).itemsize
    size = width * math.prod(map(int, shape.split("x")))
    form = "forward and backward" + (" in the trunk" if args.device == "cuda" else "")
    moved = {"triad": 3 * size, "memory triad": 3 * width * MEMORY}
    rows: list[Row] = []
    for name, timing in timings.items():
        impl, _, dense = name.partition(", ")
        mode = f"{dense}, {form}" if dense else "s + 3 t"
        case = Case(op="loss", impl=impl, mode=mode, shape=shape, dtype=args.dtype)
        rows += time_rows(case, timing, place)
        if not dense:
            rows.append(rate_row(case, "GB/s", moved[name] / 1e9, timing, place))
        elif impl == f"mimic_fast {FUSED[args.device]}":
            # S and T read, dS written; in the trunk S and T read twice, and G written and read.
            own = (7 if args.device == "cuda" else 3) * size
            rows.append(rate_row(case, "GB/s", own / 1e9, timing, place))
            for other, seconds in timings.items():
                peer, _, kind = other.partition(", ")
                if other in moved:
                    ideal = stretched(seconds, own / moved[other])
                    rows.append(ratio_row(case, f"share of {other}", timing, ideal, place))
                elif kind == dense and peer != impl:
                    rows.append(ratio_row(case, f"speedup over {peer}", timing, seconds, place))
    return rows


def stretched(timing: Timing, times: float) -> Timing:
    """What so many times the bytes would take."""
    return Timing(
        wall=tuple(times * seconds for seconds in timing.wall),
        cpu=tuple(times * seconds for seconds in timing.cpu),
    )
