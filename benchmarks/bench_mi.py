"""Mutual information of many pairs of directions against numpy, fast-histogram and others.

    python benchmarks/bench_mi.py                   # CPU, one thread
    python benchmarks/bench_mi.py --device cuda     # against torch on the GPU, CUDA events

``cross``: 4 layers x 64 x 64 pairs; ``matched``: 12 layers x 192; 16 bins, 2,048 images. From bin
codes, and from values with equal-mass bins made within the clock. Nothing is timed before everyone
agrees with numpy to 1e-6 nats. Rows are added to ``--out``; ``show_rows.py`` makes tables of them.
To try it out: ``--layers 1 --directions 4 --rounds 2 --round-seconds 0.001 --no-compile``.
"""

import argparse
from pathlib import Path

from measure import append_rows, ensure_malloc_settings
from show_rows import tables

SIZES = {"cross": (4, 64), "matched": (12, 192)}  # layers, directions of each


def main() -> None:
    """Times both workloads, adds their rows to the file and prints them."""
    args = parsed()
    ensure_malloc_settings()

    from mi_peers import workload
    from mi_rows import mi_rows
    from micro import place_of, results_file

    place = place_of(args.device)
    out = args.out or results_file("mi", args.device)
    for name in args.workloads:
        layers, directions = SIZES[name]
        work = workload(
            name, layers=args.layers or layers, directions=args.directions or directions
        )
        rows = mi_rows(work, args, place)
        append_rows(out, rows)
        print(tables(rows), flush=True)
    print(f"rows added to {out}")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workloads", nargs="*", metavar="cross|matched", help="by default both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, help="other than 4 (cross) and 12 (matched)")
    parser.add_argument("--directions", type=int, help="a layer, other than 64 and 192")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (15)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (1)")
    parser.add_argument(
        "--round-seconds", type=float, default=0.05, help="at least, of each in a round (0.05)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    args = parser.parse_args()
    unknown = sorted(set(args.workloads) - set(SIZES))
    if unknown:
        parser.error(f"expected cross or matched, got {unknown[0]!r}")
    args.workloads = args.workloads or list(SIZES)
    return args


if __name__ == "__main__":
    main()
