"""How long the steps of a real purification wait for their batches, on the CPU.

    python benchmarks/bench_overlap.py --teacher ENCODER --data SOURCE [--backends once dali]

Runs 200 steps of ``purify`` with each way of making views and adds the share of the training time
that was spent in ``next()`` to the rows of ``--out``; the first batch, which waits for decoders and
threads to start, apart.
"""

import argparse
import tempfile
from pathlib import Path

from measure import append_rows, ensure_malloc_settings
from show_rows import tables

WAYS = {
    "once": {"backend": "torch", "decode": "once"},
    "every_time": {"backend": "torch", "decode": "every_time"},
    "dali": {"backend": "dali"},
}


def main() -> None:
    """Runs the purifications, adds their rows to the file and prints them."""
    args = parsed()
    ensure_malloc_settings()

    import torch
    from measure import Case, single_row, this_machine
    from micro import results_file

    from mimic_fast.distil import purify
    from mimic_fast.recipe import load_settings

    machine = this_machine(threads=torch.get_num_threads())
    rows = []
    for name in args.backends:
        with tempfile.TemporaryDirectory() as out:
            settings = load_settings(
                preset=args.preset,
                values={
                    "encoder": {"teacher": args.teacher},
                    "data": {
                        "source": args.data,
                        "clean_count": args.images,
                        "allow_budget": True,
                        "workers": 1,
                        **WAYS[name],
                    },
                    "optim": {"batch_size": args.batch, "epochs": 1000},
                    "run": {"out": out, "max_steps": args.steps, "device": "cpu"},
                },
            )
            trained = purify(settings).trained
        case = Case(
            op="purify",
            impl=name,
            mode=f"{Path(args.teacher).stem}, {args.steps} steps",
            shape=f"{Path(args.data).name} {args.batch}",
        )
        first = trained.waited_first / trained.seconds
        share = trained.waited / trained.seconds - first
        rows += [
            single_row(case, "waited", "share of time", share, machine=machine),
            single_row(case, "waited for the first batch", "share of time", first, machine=machine),
            single_row(case, "throughput", "images/s", trained.images_per_second, machine=machine),
        ]
    out = args.out or results_file("overlap", "cpu")
    append_rows(out, rows)
    print(tables(rows))
    print(f"rows added to {out}")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", required=True, help="checkpoint of an encoder")
    parser.add_argument("--data", required=True, help="clean images")
    parser.add_argument("--backends", nargs="+", choices=list(WAYS), default=["once"])
    parser.add_argument("--preset", default="hardened")
    parser.add_argument("--images", type=int, default=900, help="clean images (900)")
    parser.add_argument("--batch", type=int, default=64, help="images a step (64)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
