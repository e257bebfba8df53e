"""End to end against the loop a researcher would write after the authors' demo (demo_style.py).

    python benchmarks/bench_e2e.py throughput --data 'cifar10/train-*.tar'
    python benchmarks/bench_e2e.py time-to-accuracy --data 'cifar10/train-*.tar' \
      --test 'cifar10/test-*.tar' --teacher runs/cifar_clean/encoder.safetensors

Same losses, data, student weights, optimizer settings and threads; interleaved in one process.
Whether the losses are the same is checked before anything is timed. To try it out:
``--synthetic --encoder small --batch 8 --rounds 2``. Rows are added to ``--out``.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from measure import Row, append_rows, ensure_malloc_settings, this_machine

from mimic_fast.errors import MimicError, UsageError

if TYPE_CHECKING:
    from e2e_setup import Setup

    from mimic_fast.encoders.build import Encoder

RESULTS = Path(__file__).parent / "results" / "e2e_cpu_202611.csv"


def parsed() -> argparse.Namespace:
    """The command line; what contradicts itself ends here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "mode", nargs="?", choices=("throughput", "time-to-accuracy"), default="throughput"
    )
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--data", help="RGB images: tar shards (glob) or a folder")
    images.add_argument("--synthetic", action="store_true", help="random images instead")
    parser.add_argument("--images", type=int, default=2000, help="clean images drawn (2000)")
    parser.add_argument("--encoder", choices=("resnet18", "small"), help="by default as the mode")
    parser.add_argument("--teacher", type=Path, help="its weights, a checkpoint; else random ones")
    parser.add_argument("--batch", type=int, default=128, help="images a step (128)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="all cores")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to add rows to")
    parser.add_argument("--rounds", type=int, default=15, help="throughput: timed steps (15)")
    parser.add_argument("--warmup", type=int, default=2, help="throughput: steps before (2)")
    parser.add_argument("--test", help="time-to-accuracy: labeled test images")
    parser.add_argument("--targets", type=float, nargs="+", default=[], help="accuracies, 0..1")
    parser.add_argument("--epochs", type=int, default=40, help="time-to-accuracy: at most (40)")
    parser.add_argument("--probe-every", type=int, default=2, help="epochs between probes (2)")
    parser.add_argument("--probe-labels", type=int, default=5000, help="labels to fit one (5000)")
    parser.add_argument("--test-images", type=int, default=5000, help="images to test one (5000)")
    args = parser.parse_args()
    if args.mode == "time-to-accuracy" and args.data and not (args.test and args.teacher):
        parser.error("time-to-accuracy with --data needs --test and --teacher")
    if args.images < args.batch:
        parser.error(f"--images {args.images} must be at least --batch {args.batch}")
    return args


def main() -> None:
    """Runs one mode, adds its rows to the file and prints them."""
    args = parsed()
    ensure_malloc_settings()
    try:
        rows = throughput(args) if args.mode == "throughput" else time_to_accuracy(args)
    except MimicError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    append_rows(args.out, rows)
    for row in rows:
        spread = f" ({row['p20']} .. {row['p80']}, best {row['min']})" if row["min"] else ""
        print(f"{row['impl']}, {row['mode']}: {row['metric']} {row['p50']} {row['unit']}{spread}")
    print(f"{len(rows)} rows added to {args.out}")


def throughput(args: argparse.Namespace) -> list[Row]:
    """Images per second on a CIFAR ResNet-18."""
    from e2e_throughput import throughput_rows

    epochs = 1 + (args.rounds + args.warmup) // max(1, args.images // args.batch)
    return throughput_rows(
        setup_of(args, encoder=args.encoder or "resnet18", epochs=epochs),
        rounds=args.rounds,
        warmup=args.warmup,
        machine=this_machine(threads=args.threads),
        threads=args.threads,
    )


def time_to_accuracy(args: argparse.Namespace) -> list[Row]:
    """Seconds to equal clean accuracy with the small encoder."""
    from e2e_accuracy import Probing, labeled_images, time_to_accuracy_rows

    setup = setup_of(args, encoder=args.encoder or "small", epochs=args.epochs)
    size = setup.teacher.spec.image_size
    probing = Probing(
        train=labeled_images(args.data, count=args.probe_labels, image_size=size, seed=args.seed),
        test=labeled_images(args.test, count=args.test_images, image_size=size, seed=args.seed + 1),
        every=args.probe_every,
    )
    return time_to_accuracy_rows(
        setup,
        probing,
        targets=tuple(args.targets),
        machine=this_machine(threads=args.threads),
        threads=args.threads,
    )


def setup_of(args: argparse.Namespace, *, encoder: str, epochs: int) -> "Setup":
    """Teacher and clean images."""
    from e2e_setup import Setup, clean_images

    teacher = teacher_of(args, encoder)
    size = teacher.spec.image_size
    return Setup(
        teacher=teacher,
        pool=clean_images(args.data, count=args.images, image_size=size, seed=args.seed),
        batch_size=args.batch,
        epochs=epochs,
        seed=args.seed,
    )


def teacher_of(args: argparse.Namespace, encoder: str) -> "Encoder":
    """From a file, whose architecture then counts, or with random weights: speed is the same."""
    from e2e_setup import ENCODERS

    from mimic_fast.encoders.build import build_encoder
    from mimic_fast.encoders.ingest import load_encoder

    if args.teacher is not None:
        teacher = load_encoder(args.teacher).encoder
        if not teacher.spec.architecture.startswith("timm:resnet") or teacher.spec.in_channels != 3:
            raise UsageError(
                f"--teacher must be an RGB timm ResNet, got {teacher.spec.architecture}"
            )
        return teacher
    return build_encoder(ENCODERS[encoder], seed=args.seed + 1).eval()


if __name__ == "__main__":
    main()
