"""Bytes that the losses move and hold, counted without a GPU: the Triton kernels and eager PyTorch.

    python benchmarks/bench_traffic.py

The kernels run in Triton's interpreter, which counts what each loads and stores; PyTorch's own
operators are counted as they are dispatched. Nothing is timed: an interpreter says nothing about
speed. In units of e, the bytes of one activation. Rows are added to ``--out``; ``show_rows.py``
makes tables of them. To try it out: ``--shapes 1x5x16 --no-compile --out rows.csv``.
"""

import argparse
import os
from pathlib import Path

from measure import append_rows, this_machine
from show_rows import tables

SHAPES = ("2x197x192", "2x197x768", "2x512x4x4", "2x512x7x7")


def main() -> None:
    """Counts on every shape, adds the rows to the file and prints them."""
    args = parsed()
    # Triton reads the first, PyTorch's profiler the second (it prints when it starts) on import.
    os.environ |= {"TRITON_INTERPRET": "1", "KINETO_LOG_LEVEL": "6"}

    from compiled_memory import compiled_memory_rows
    from micro import results_file
    from traffic_rows import launch_rows, traffic_rows

    out = args.out or results_file("traffic", "counted")
    machine = this_machine(threads=1)
    for shape in args.shapes:
        rows = traffic_rows(shape, machine=machine)
        if not args.no_compile:
            rows += compiled_memory_rows(shape, machine=machine)
        rows += launch_rows(shape, machine=machine)
        append_rows(out, rows)
        print(tables(rows), flush=True)
    print(f"rows added to {out}")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="2x197x768, 2x512x4x4, ...")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled form out")
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
