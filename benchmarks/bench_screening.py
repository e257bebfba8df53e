"""How many planted images ``mimic-fast data check`` finds, and how many others it names.

    python benchmarks/bench_screening.py --data 'DIR/train-*.tar'
    python benchmarks/bench_screening.py --data fashion-mnist:train --kinds none

For each kind of trigger, as it is and after JPEG compression at quality 90: recall over the planted
images and false positives over the others, over seeds. Counts, not times: other work may run beside
it. Rows are added to ``--out``; ``show_rows.py`` makes tables of them. In these rows ``min`` is the
best seed. To try it out: ``--images 1000 --seeds 1 --kinds none``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measure import Case, Row, append_rows, spread_row, this_machine
from micro import results_file
from planted import KINDS, planted
from show_rows import tables

from mimic_fast.data.images import load_images
from mimic_fast.data.sources import open_source
from mimic_fast.data.suspicious import find_suspicious


def main() -> None:
    """Plants and searches, adds the rows to the file and prints them."""
    args = parsed()
    torch.set_num_threads(1)
    images = loaded(args.data, args.images, args.image_size)
    out = args.out or results_file("screening", "cpu")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for kind in args.kinds:
        for quality in (None, 90):
            if kind == "none" and quality is not None:
                continue  # nothing is planted, so that nothing is compressed
            rows = screening_rows(
                images, kind, quality, share=args.share, seeds=seeds, label=args.label
            )
            append_rows(out, rows)
            print(tables(rows), flush=True)
    print(f"rows added to {out}")


def loaded(data: str, count: int, image_size: int) -> np.ndarray:
    """The first so many images of a source, or all it has."""
    source = open_source(data)
    indices = range(min(count, len(source)))
    images, _ = load_images(source, indices, image_size=image_size, channels=3, evaluation=True)
    return images.numpy()


def screening_rows(
    images: np.ndarray,
    kind: str,
    quality: int | None,
    *,
    share: float,
    seeds: Sequence[int],
    label: str = "",
) -> list[Row]:
    """Recall and false positives of one kind of trigger; without one, what is named at all."""
    recalls: list[float] = []
    wrong: list[float] = []
    for seed in seeds if kind != "none" else seeds[:1]:  # without a trigger all are the same
        recall, false = rates(images, kind, quality, share=share, seed=seed)
        recalls.append(recall)
        wrong.append(false)
    name = f"screening {label}".strip()
    case = Case(
        op=f"{name}, {share:.2%} planted" if kind != "none" else f"{name}, nothing planted",
        impl=kind,
        mode="as it is" if quality is None else f"JPEG {quality}",
        shape="x".join(str(size) for size in images.shape),
        dtype="uint8",
    )
    machine = this_machine(threads=1)
    rows = [spread_row(case, "false_positives", "share", wrong, min(wrong), machine)]
    if kind == "none":
        return rows
    return [spread_row(case, "recall", "share", recalls, max(recalls), machine), *rows]


def rates(
    images: np.ndarray, kind: str, quality: int | None, *, share: float, seed: int
) -> tuple[float, float]:
    """Share of the planted images that are named, and of the others."""
    work = planted(images, kind, share=share, quality=quality, seed=seed)
    _, found = find_suspicious(torch.from_numpy(work.images))
    named = np.zeros(len(images), dtype=bool)
    named[[each.index for each in found]] = True
    if kind == "none":
        return 0.0, float(named.mean())
    others = np.ones(len(images), dtype=bool)
    others[work.carriers] = False
    return float(named[work.carriers].mean()), float(named[others].mean())


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="any data source")
    parser.add_argument("--images", type=int, default=5000, help="the first so many (5,000)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (32)")
    parser.add_argument("--share", type=float, default=0.01, help="planted share (0.01)")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions (5)")
    parser.add_argument("--first-seed", type=int, default=0, help="the others follow it (0)")
    parser.add_argument("--label", default="", help="said of the images in the rows: 'held out'")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
