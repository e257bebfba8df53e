"""One line for each known answer: what all estimators made of it, from bench_mi_tasks.py's rows.

python benchmarks/mi_tasks_table.py benchmarks/results/mi_tasks_cpu_202612.csv
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from measure import Row

_TASK = "nats of "
_COLUMNS = ("canonical", "ksg", "cross", "sliced")

Key = tuple[str, str, int]  # images, task, dimensions a side


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="CSV file of rows")
    with parser.parse_args().file.open(newline="", encoding="utf-8") as file:
        print(task_tables(Row(**row) for row in csv.DictReader(file)))


def task_tables(rows: Iterable[Row]) -> str:
    """A Markdown table for each number of images: mean over seeds and (deviation), nats."""
    found: dict[Key, dict[str, dict[str, float]]] = defaultdict(dict)
    for row in rows:
        if row["op"].startswith(_TASK):
            images, dims = row["shape"].split()[0], int(row["mode"].split()[0])
            by_name = found[images, row["op"].removeprefix(_TASK), dims]
            name = row["impl"].partition(",")[0]
            by_name.setdefault(name, {})[row["metric"]] = float(row["p50"])
    parts = []
    for images in dict.fromkeys(key[0] for key in found):
        lines = [
            f"**{int(images):,} images**\n",
            f"| task | a side | truth | {' | '.join(_COLUMNS)} |",
            f"|{' --- |' * (3 + len(_COLUMNS))}",
        ]
        lines += [
            f"| {task} | {dims} | {next(iter(by_name.values()))['truth']:.3f} | "
            f"{' | '.join(_cell(by_name.get(name)) for name in _COLUMNS)} |"
            for (count, task, dims), by_name in found.items()
            if count == images and not by_name.keys().isdisjoint(_COLUMNS)
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(figures: dict[str, float] | None) -> str:
    if figures is None:
        return ""
    mean, deviation = figures["mean"], figures.get("deviation")
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ({deviation:.3f})"


if __name__ == "__main__":
    main()
