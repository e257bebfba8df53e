"""Attention and clone loss of one layer, forward and backward, against what people write in PyTorch.

    python benchmarks/bench_loss.py                  # CPU, one thread, float32
    python benchmarks/bench_loss.py --device cuda    # bfloat16, in the trunk, timed by CUDA events

Nothing is timed before the loss and the gradient of every candidate agree with the float64 oracle.
Rows are added to ``--out``; ``show_rows.py`` makes a table of them. To try it out:
``--shapes 4x5x8 --rounds 2 --round-seconds 0.001 --no-compile``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from measure import Case, Row, Timing, append_rows, ensure_malloc_settings, interleaved
from micro import (
    Device,
    Place,
    calls_per_round,
    device_clock,
    place_of,
    rate_row,
    ratio_row,
    results_file,
    time_rows,
)

SHAPES: dict[Device, tuple[str, ...]] = {
    "cpu": ("64x197x192", "64x197x768", "128x512x4x4"),
    "cuda": (
        *("64x197x192", "256x197x384", "256x197x768", "128x257x1024", "64x257x1408"),
        *("128x512x4x4", "256x64x32x32", "128x256x56x56", "128x1024x14x14", "128x2048x7x7"),
    ),
}
TRIAD = "triad"
DENSE = ("mse", "cosine")


def main() -> None:
    """Times every shape, adds its rows to the file and prints them."""
    args = parsed()
    ensure_malloc_settings()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda needs a CUDA device, and torch sees none", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(1)
    place = place_of(args.device)
    out = args.out or results_file("loss", args.device)
    for shape in args.shapes or SHAPES[args.device]:
        rows = loss_rows(shape, args, place)
        append_rows(out, rows)
        for row in rows:
            spread = f" ({row['p20']} .. {row['p80']}, best {row['min']})" if row["min"] else ""
            print(f"{row['impl']}, {row['mode']}: {row['metric']} {row['p50']} {row['unit']}{spread}")
    print(f"rows added to {out}")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", type=_shape, help="64x197x768, 128x512x4x4, ...")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds (21)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (2)")
    parser.add_argument(
        "--round-seconds", type=float, default=0.05, help="of each candidate in a round (0.05)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    args = parser.parse_args()
    args.dtype = args.dtype or {"cpu": "float32", "cuda": "bfloat16"}[args.device]
    return args


def loss_rows(shape: str, args: argparse.Namespace, place: Place) -> list[Row]:
    """Checks all candidates on one shape, then times them in turns.

    Raises:
        AssertionError: If one computes something else; nothing is timed then.
    """
    candidates = checked_candidates(shape, args)
    print(f"{shape}: all agree with the oracle; timing", flush=True)
    clock = device_clock(place.device)
    timings = interleaved(
        candidates,
        rounds=args.rounds,
        warmup=args.warmup,
        calls=calls_per_round(candidates, seconds=args.round_seconds, clock=clock),
        clock=clock,
        report=lambda line: print(line, flush=True),
    )
    elements = 1
    for size in shape.split("x"):
        elements *= int(size)
    return rows_of(timings, shape, args, elements=elements, place=place)


def checked_candidates(shape: str, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Everything that is timed on one shape, by ``implementation, dense loss``."""
    import torch
    from loss_peers import at_loss, check, compiled, nad_loss, ours, plain, problem

    torch._dynamo.reset()
    sizes = [int(size) for size in shape.split("x")]
    given = problem(
        sizes,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        trunk=args.device == "cuda",
    )
    fused = "cpp" if args.device == "cpu" else "triton"
    student, out = given.student.detach(), torch.empty_like(given.student)
    candidates: dict[str, Callable[[], object]] = {
        TRIAD: lambda: torch.add(student, given.teacher, alpha=3, out=out)
    }
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


def rows_of(
    timings: dict[str, Timing],
    shape: str,
    args: argparse.Namespace,
    *,
    elements: int,
    place: Place,
) -> list[Row]:
    """Seconds of each; of ours what it is ahead of the others, and its share of the triad."""
    size = 4 if args.dtype == "float32" else 2
    form = "in the trunk" if place.device == "cuda" else "forward and backward"
    triad = Case(op="triad", impl="torch.add", mode="s + 3 t", shape=shape, dtype=args.dtype)
    rows = [
        *time_rows(triad, timings[TRIAD], place),
        rate_row(triad, "GB/s", 3 * elements * size / 1e9, timings[TRIAD], place),
    ]
    for name, timing in timings.items():
        impl, _, dense = name.partition(", ")
        if not dense:
            continue
        case = Case(op="loss", impl=impl, mode=f"{dense}, {form}", shape=shape, dtype=args.dtype)
        rows += time_rows(case, timing, place)
        if impl in ("mimic_fast cpp", "mimic_fast triton"):
            rows += _ours(case, dense, timings, elements * size, place)
    return rows


def _ours(
    case: Case, dense: str, timings: dict[str, Timing], tensor_bytes: int, place: Place
) -> list[Row]:
    own = timings[f"{case.impl}, {dense}"]
    # S and T read, dS written; in the trunk also its gradient, and S and T a second time.
    moved = 3 if place.device == "cpu" else 6
    rows = [
        rate_row(case, "GB/s", moved * tensor_bytes / 1e9, own, place),
        ratio_row(case, "triad_share", own, _stretched(timings[TRIAD], moved / 3), place),
    ]
    for name, other in timings.items():
        impl, _, kind = name.partition(", ")
        if kind == dense and impl != case.impl:
            rows.append(ratio_row(case, f"speedup over {impl}", own, other, place))
    return rows


def _stretched(timing: Timing, times: float) -> Timing:
    """What so many times the bytes would take."""
    return Timing(
        wall=tuple(times * seconds for seconds in timing.wall),
        cpu=tuple(times * seconds for seconds in timing.cpu),
    )


def _shape(text: str) -> str:
    sizes = text.split("x")
    if len(sizes) not in (3, 4) or not all(size.isdigit() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"expected BxNxC or BxCxHxW, got {text!r}")
    return text


if __name__ == "__main__":
    main()
