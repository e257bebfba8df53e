"""What each estimator of mutual information makes of pairs whose information is known.

    python benchmarks/bench_mi_tasks.py                       # hours on a busy core
    python benchmarks/bench_mi_tasks.py --dims 1 2 --images 500 --seeds 2 --tasks 'Student t'
    python benchmarks/bench_mi_tasks.py --estimators dv infonce --images 2000 --seeds 2 --epochs 20

Seeds are fixed. For every task, number of images and estimator: the mean estimate, its standard
deviation over seeds, the truth and, where the estimator claims to estimate it, the bias. Crossed
and sliced pairs do not claim to. Nats, not times: other work may run beside it. The critics of dv
and infonce are told the direction of y alone, so the truth bounds what they can find.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from measure import Case, Row, append_rows, single_row, this_machine
from mi_tasks import TASKS, Task, drawn
from micro import results_file
from show_rows import tables
from torch import Tensor

from mimic_fast.config import MutualInformationSettings
from mimic_fast.mutual_information.dv import dv_bound, dv_value, train_critic
from mimic_fast.mutual_information.estimate import estimate_histogram
from mimic_fast.mutual_information.infonce import infonce_bound
from mimic_fast.mutual_information.ksg_layers import estimate_ksg

ESTIMATORS = ("canonical", "cross", "sliced", "ksg", "dv", "infonce")
CLAIM_NATS = ("canonical", "ksg", "dv", "infonce")
# Interval and noise floor are not looked at here: no more of them than there must be.
_CHEAP = {"shuffles": 2, "jackknife_groups": 2}


def main() -> None:
    """Draws and estimates, adds the rows to the file and prints them."""
    args = parsed()
    torch.set_num_threads(1)
    out = args.out or results_file("mi_tasks", "cpu")
    for task in TASKS:
        if task.name not in args.tasks:
            continue
        for images in args.images:
            rows: list[Row] = []
            for dims in args.dims:
                if dims >= task.fewest:
                    rows += task_rows(task, images, dims, args)
            append_rows(out, rows)
            print(tables(rows), flush=True)
    print(f"rows added to {out}")


def task_rows(task: Task, images: int, dims: int, args: argparse.Namespace) -> list[Row]:
    """Of every estimator on one task of one size."""
    truth = task.nats(dims)
    machine = this_machine(threads=1)
    rows = []
    for name in args.estimators:
        found = []
        for seed in range(args.seeds):
            x, y = drawn(task, images, dims, seed=seed)
            found.append(estimator(name, args)(x, y, seed))
        case = Case(
            op=f"nats of {task.name}",
            impl=implementation(name, args),
            mode=f"{dims} a side",
            shape=f"{images} images, {args.seeds} seeds",
        )
        figures = {"truth": truth, "mean": fmean(found)}
        if name in CLAIM_NATS:
            figures["bias"] = fmean(found) - truth
        if len(found) > 1:
            figures["deviation"] = stdev(found)
        rows += [
            single_row(case, key, "nats", value, machine=machine) for key, value in figures.items()
        ]
    return rows


def implementation(name: str, args: argparse.Namespace) -> str:
    """The estimator with what decides its result."""
    if name in ("dv", "infonce"):
        return f"{name}, {args.epochs} epochs of batches of {args.batch}"
    return f"{name}, {args.slices} slices" if name == "sliced" else name


def estimator(name: str, args: argparse.Namespace) -> Callable[[Tensor, Tensor, int], float]:
    """``estimate(x, y, seed)`` in nats, before any clamping."""
    if name in ("dv", "infonce"):
        bound = infonce_bound if name == "infonce" else dv_bound

        def trained(x: Tensor, y: Tensor, seed: int) -> float:
            values = train_critic(
                x,
                y,
                epochs=args.epochs,
                batch=args.batch,
                seed=seed,
                device=x.device,
                poll=lambda: None,
                bound=bound,
            )
            return dv_value(values).value

        return trained
    pairs = "canonical" if name == "ksg" else name
    settings = MutualInformationSettings.model_validate(
        {"pairs": pairs, "slices": args.slices, **_CHEAP}
    )
    estimate = estimate_ksg if name == "ksg" else estimate_histogram

    def counted(x: Tensor, y: Tensor, seed: int) -> float:
        return estimate([x], y, settings, names=["x"], seed=seed)[0].raw

    return counted


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [task.name for task in TASKS]
    parser.add_argument("--tasks", nargs="+", choices=names, default=names, metavar="TASK")
    parser.add_argument("--dims", nargs="+", type=int, default=[1, 2, 4, 8, 25], help="a side")
    parser.add_argument("--images", nargs="+", type=int, default=[500, 2000, 10000])
    parser.add_argument(
        "--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS[:4]), metavar="NAME"
    )
    parser.add_argument("--seeds", type=int, default=5, help="repetitions (5)")
    parser.add_argument("--slices", type=int, default=128, help="random pairs (128)")
    parser.add_argument("--epochs", type=int, default=20, help="of a critic (20)")
    parser.add_argument("--batch", type=int, default=128, help="of a critic (128)")
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
