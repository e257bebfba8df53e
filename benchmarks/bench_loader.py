"""Images per CPU-second of data loaders: ours, Pillow, torchvision and bare DALI.

    OMP_NUM_THREADS=1 python benchmarks/bench_loader.py SOURCE...   # tar shards of JPEG files

``two views``: crops, flips, color jitter and gray; ``two crops``: without colors; ``one image``:
resized, center crop, float, no augmentation. Ours three ways: squares decoded once, files decoded
by threads, DALI. CPU seconds of all threads of the process, counted until none works any more, so
that what is made ahead is paid for by who asked for it. Rows are added to ``--out``.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import append_rows, ensure_malloc_settings
from show_rows import tables

IDLE = 0.02  # seconds without CPU time after which nothing works ahead any more
SIZES = {"imagenet": 224, "cifar": 32}


def main() -> None:
    """Measures every source and mode, adds the rows to the file and prints them."""
    args = parsed()
    ensure_malloc_settings()

    import torch
    from micro import place_of, results_file

    torch.set_num_threads(1)
    out = args.out or results_file("loader", "cpu")
    for source in args.sources:
        for mode in args.modes:
            rows = loader_rows(source, mode, args, place_of("cpu"))
            append_rows(out, rows)
            print(tables(rows), flush=True)
    print(f"rows added to {out}")


def loader_rows(source: str, mode: str, args: argparse.Namespace, place: Any) -> list[Any]:
    """All candidates on one source, in turns."""
    from loader_peers import Work, bare_dali, pillow, torchvision_decoder
    from measure import Case, interleaved, spread_row

    from mimic_fast.config import DataSettings
    from mimic_fast.data.sources import open_source

    opened = open_source(source)
    size = args.size or next((s for name, s in SIZES.items() if name in source), 224)
    count = min(args.images, len(opened))
    work = Work(
        files=[opened.read(index) for index in range(count)],
        shards=shards(source),
        size=size,
        batch=args.batch,
        mode=mode,  # pyright: ignore[reportArgumentType]
        data=DataSettings(),
    )
    candidates: dict[str, Iterator[Any]] = {
        "Pillow + torchvision v2": pillow(work),
        "torchvision decoder + v2": torchvision_decoder(work),
        "bare DALI": bare_dali(work),
        **ours(source, count, work),
    }
    calls = {name: int(args.calls) for name in candidates}
    calls["mimic_fast, decoded once"] *= 8
    timings = interleaved(
        {name: lambda batches=batches: next(batches) for name, batches in candidates.items()},
        rounds=args.rounds,
        warmup=2,
        calls=calls,
        clock=settled_clock,
        report=lambda line: print(line, flush=True),
    )
    rows = []
    kind = next((name for name in SIZES if name in source), Path(source).name)
    for name, timing in timings.items():
        case = Case(op="loader", impl=name, mode=mode, shape=f"{kind} {args.batch}x3x{size}x{size}")
        rates = [args.batch / seconds for seconds in timing.cpu]
        rows.append(spread_row(case, "rate", "images/CPU-s", rates, max(rates), place.machine))
        for peer in ("bare DALI", "Pillow + torchvision v2"):
            if name.startswith("mimic_fast"):
                other = timings[peer].cpu
                ratios = [b / a for a, b in zip(timing.cpu, other, strict=True)]
                best = min(other) / min(timing.cpu)
                rows.append(
                    spread_row(case, f"speedup over {peer}", "x", ratios, best, place.machine)
                )
    return rows


def ours(source: str, count: int, work: Any) -> dict[str, Iterator[Any]]:
    """Our loader on the same files, three ways."""
    import torch

    from mimic_fast import ops_views
    from mimic_fast.config import EncoderSpec, Settings
    from mimic_fast.data.clean_set import clean_images
    from mimic_fast.data.loader import Loader, TrainingImages
    from mimic_fast.distributed import SINGLE

    colors = {} if work.mode == "two views" else {"jitter_probability": 0.0, "grayscale": 0.0}
    data = {"source": source, "clean_count": count, "allow_budget": True, **colors}
    spec = EncoderSpec(
        architecture="timm:resnet18", image_size=work.size, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    ways = {
        "mimic_fast, decoded once": {"backend": "torch", "decode": "once"},
        "mimic_fast, decoded every time": {"backend": "torch", "decode": "every_time"},
        "mimic_fast, DALI": {"backend": "dali"},
    }
    found: dict[str, Iterator[Any]] = {}
    images = None
    for name, way in ways.items():
        settings = Settings.model_validate(
            {
                "data": {**data, **way, "workers": 1},
                "loss": {"contrastive": 1.0, "harden": {"probability": 0.0}},
                "optim": {"batch_size": work.batch},
            }
        )
        if images is None:
            clean = clean_images(settings.data, spec, seed=0)
            images = TrainingImages(squares=clean.squares, files=clean.files)
        if work.mode == "one image":
            if way.get("decode") == "once":
                order = torch.arange(len(images))

                def plain(order: Any = order, squares: Any = images.squares) -> Iterator[Any]:
                    start = 0
                    while True:
                        rows = order[(torch.arange(work.batch) + start) % len(order)]
                        start += work.batch
                        yield [ops_views.plain(squares, rows, image_size=work.size)]

                found[name] = plain()
            continue
        loader = Loader(images, settings=settings, image_size=work.size, processes=SINGLE)
        found[name] = iter(loader.batches(0, 10**7))
    return found


def shards(source: str) -> list[str]:
    """The tar files of a source, for DALI's own reader."""
    path = Path(source)
    return [str(path)] if path.is_file() else sorted(map(str, path.glob("*.tar")))


def settled_clock(candidate: Callable[[], object], calls: int) -> tuple[float, float]:
    """Seconds a call, and CPU seconds a call until the process is idle again."""
    settle()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        candidate()
    wall = time.perf_counter() - wall
    settle()
    return wall / calls, (time.process_time() - cpu) / calls


def settle() -> None:
    """Waits until no thread of this process works."""
    while True:
        before = time.process_time()
        time.sleep(IDLE)
        if time.process_time() - before < IDLE / 10:
            return


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sources", nargs="+", help="tar shards of JPEG files, or folders of them")
    parser.add_argument("--modes", nargs="+", default=["two views", "two crops", "one image"])
    parser.add_argument("--images", type=int, default=512, help="files of each source (512)")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (64)")
    parser.add_argument("--size", type=int, help="side of the views; default 224, cifar 32")
    parser.add_argument("--calls", type=int, default=4, help="batches a round (4)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (15)")
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
