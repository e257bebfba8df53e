"""Attention and clone loss of one layer, forward and backward, against what people write.

    python benchmarks/bench_loss.py                  # CPU, one thread, float32
    python benchmarks/bench_loss.py --device cuda    # bfloat16, in the trunk, timed by CUDA events

Nothing is timed before the loss and the gradient of every candidate agree with the float64 oracle.
Rows are added to ``--out``; ``show_rows.py`` makes tables of them. To try it out:
``--shapes 4x5x8 --rounds 2 --round-seconds 0.001 --no-compile --out rows.csv``.
"""

import argparse
from pathlib import Path

from measure import append_rows, ensure_malloc_settings
from show_rows import tables

SHAPES = {
    "cpu": ("64x197x192", "64x197x768", "128x512x4x4"),
    "cuda": (
        *("64x197x192", "256x197x384", "256x197x768", "128x257x1024", "64x257x1408"),
        *("128x512x4x4", "256x64x32x32", "128x256x56x56", "128x1024x14x14", "128x2048x7x7"),
    ),
}


def main() -> None:
    """Times every shape, adds its rows to the file and prints them."""
    args = parsed()
    ensure_malloc_settings()

    from loss_rows import loss_rows
    from micro import place_of, results_file

    place = place_of(args.device)
    out = args.out or results_file("loss", args.device)
    for shape in args.shapes:
        rows = loss_rows(shape, args, place)
        append_rows(out, rows)
        print(tables(rows), flush=True)
    print(f"rows added to {out}")


def parsed() -> argparse.Namespace:
    """The command line, with what follows from the device filled in."""
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
    args.shapes = args.shapes or list(SHAPES[args.device])
    return args


def _shape(text: str) -> str:
    sizes = text.split("x")
    if len(sizes) not in (3, 4) or not all(size.isdigit() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"expected BxNxC or BxCxHxW, got {text!r}")
    return text


if __name__ == "__main__":
    main()
