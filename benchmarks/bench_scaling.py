"""Weak scaling: what synchronized gradients cost two processes here, and a model of 8 to 64 GPUs.

    python benchmarks/bench_scaling.py measure   # two processes on this CPU; starts torchrun
    python benchmarks/bench_scaling.py project   # ViT-B and ViT-L, worked out, never measured

``measure`` runs the product's own steps under DistributedDataParallel (gloo, one thread a process)
with the same images a process whatever their number, in interleaved pairs with and without
all-reduces of gradients, and one process alone; it fits alpha and beta of gloo and holds the model
against the pairs. Nothing else may run meanwhile. Rows are added to ``--out``; ``show_rows.py``
makes tables of them. To try it out: ``--quick --out rows.csv``.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from measure import MALLOC_SETTINGS, Row, append_rows, ensure_malloc_settings, this_machine
from show_rows import tables

PROCESSES = 2
_QUICK = {"pairs": 2, "images": 4, "warmup": 1, "encoder": "small", "largest": 1 << 20}
_FULL = {"pairs": 48, "images": 32, "warmup": 3, "encoder": "resnet18", "largest": 1 << 26}


def main() -> None:
    """Runs one mode, adds its rows to the file and prints them."""
    args = parsed()
    if args.mode == "project":
        project(args)
    elif "RANK" in os.environ:
        ensure_malloc_settings()
        measure(args)
    else:
        launch()


def parsed() -> argparse.Namespace:
    """The command line, with what follows from ``--quick`` filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mode", nargs="?", choices=("measure", "project"), default="measure")
    parser.add_argument("--pairs", type=int, help="timed pairs of each kind (48)")
    parser.add_argument("--images", type=int, help="of a process in a step (32; project: 64)")
    parser.add_argument("--warmup", type=int, help="rounds before the pairs (3)")
    parser.add_argument("--encoder", choices=("resnet18", "small"), help="measure: (resnet18)")
    parser.add_argument("--largest", type=int, help="bytes of the largest all-reduce (64 MiB)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--quick", action="store_true", help="two pairs of a small encoder")
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    args = parser.parse_args()
    if args.quick and args.out is None:
        parser.error("--quick is for trying it out: give --out")
    for name, value in (("pairs", 2), ("images", 2), ("warmup", 0), ("largest", 1 << 16)):
        given = getattr(args, name)
        if given is not None and given < value:
            parser.error(f"--{name} must be at least {value}, got {given}")
    if args.mode == "measure":
        for name, value in (_QUICK if args.quick else _FULL).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    return args


def launch() -> None:
    """Becomes torchrun, which starts this program again in every process."""
    sys.stdout.flush()
    own = {name: value for name, value in MALLOC_SETTINGS.items() if name not in os.environ}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={PROCESSES}", *sys.argv]
    os.execve(sys.executable, command, {**os.environ, **own, "OMP_NUM_THREADS": "1"})


def measure(args: argparse.Namespace) -> None:
    """In every process; the first one writes."""
    import torch
    import torch.distributed as dist
    from e2e_setup import ENCODERS, Setup, synthetic_images
    from e2e_throughput import shape
    from micro import results_file
    from scaling_pairs import timed_all_reduces, timed_pairs
    from scaling_rows import measured_rows

    from mimic_fast.distributed import start
    from mimic_fast.encoders.build import build_encoder

    torch.set_num_threads(1)
    teacher = build_encoder(ENCODERS[args.encoder], seed=args.seed + 1).eval()
    world, size = int(os.environ["WORLD_SIZE"]), teacher.spec.image_size
    count = world * args.images
    setup = Setup(
        teacher=teacher,
        pool=synthetic_images(count, image_size=size, seed=args.seed)[0],
        batch_size=args.images,
        epochs=2 * (args.pairs + args.warmup),
        seed=args.seed,
    )
    settings = setup.settings("hardened")
    accelerator, processes = start(settings.run, settings.optim, expected_world=world)
    sizes = [1 << power for power in range(12, args.largest.bit_length(), 2)]
    timings = timed_all_reduces(sizes, processes, rounds=max(5, args.pairs // 2))
    pairs = timed_pairs(
        setup,
        accelerator,
        processes,
        pairs=args.pairs,
        warmup=args.warmup,
        report=lambda line: print(line, flush=True) if processes.is_main else None,
    )
    if processes.is_main:
        rows = measured_rows(
            pairs,
            timings,
            shape=f"{shape(setup)} a process",
            images=args.images,
            machine=this_machine(threads=world),
        )
        add(rows, args.out or results_file("scaling", "cpu"))
    dist.barrier()  # gloo aborts a process whose peer is gone
    dist.destroy_process_group()


def project(args: argparse.Namespace) -> None:
    """On meta and fake tensors, in this process."""
    from micro import results_file
    from scaling_projection import IMAGES, projection_rows

    rows = projection_rows(args.images or IMAGES, machine=this_machine(threads=1))
    add(rows, args.out or results_file("scaling", "projected"))


def add(rows: Sequence[Row], out: Path) -> None:
    """To the file, and on the screen."""
    append_rows(out, rows)
    print(tables(rows))
    print(f"rows added to {out}")


if __name__ == "__main__":
    main()
