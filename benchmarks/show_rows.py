"""Makes Markdown tables of the rows that the benchmarks left.

    python benchmarks/show_rows.py benchmarks/results/loss_cpu_202611.csv
    python benchmarks/show_rows.py benchmarks/results/mi_cpu_202611.csv --metrics cpu_time speedup

One table for each operation, shape, dtype, machine and commit, in the order of the file; figures
that were measured once stand beside each other. Times of less than a second are in milliseconds.
``--metrics`` keeps those that begin so.
"""

import argparse
import csv
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from measure import Row


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="CSV file of rows")
    parser.add_argument("--metrics", nargs="+", default=[""], help="only those that begin so")
    args = parser.parse_args()
    with args.file.open(newline="", encoding="utf-8") as file:
        found = [Row(**row) for row in csv.DictReader(file)]
    print(tables(found, metrics=args.metrics))


def tables(rows: Iterable[Row], *, metrics: Sequence[str] = ("",)) -> str:
    """The rows as Markdown.

    Args:
        rows: In the order in which they are shown.
        metrics: Beginnings of the names of the metrics that are shown.
    """
    kept = [row for row in rows if row["metric"].startswith(tuple(metrics))]
    parts = []
    for (op, shape, dtype, device, *versions), members in groupby(kept, key=_heading):
        torch, triton, commit, date = versions
        found = list(members)
        parts.append(
            f"**{op}, {shape}, {dtype}** ({device}; torch {torch}, Triton {triton}, commit "
            f"{commit}, {date})\n\n{_spreads(found) if found[0]['min'] else _single(found)}"
        )
    return "\n\n".join(parts)


def _heading(row: Row) -> tuple[str, ...]:
    return (
        *(row["op"], row["shape"], row["dtype"], row["device"]),
        *(row["torch"], row["triton"], row["commit"], row["date"]),
    )


def _spreads(rows: Sequence[Row]) -> str:
    """A line for each figure."""
    lines = []
    for row in rows:
        median, low, high, best = (_shown(row[key], row) for key in ("p50", "p20", "p80", "min"))
        spread = f"{low} to {high}" if low else ""
        unit = "ms" if _small(row) else row["unit"]
        lines.append((row["impl"], row["mode"], row["metric"], f"{median} {unit}", spread, best))
    heads = ("implementation", "mode", "metric", "median", "20th to 80th percentile", "fastest")
    return _table(heads, lines)


def _single(rows: Sequence[Row]) -> str:
    """A line for each implementation, a column for each metric."""
    metrics = list(dict.fromkeys((row["metric"], row["unit"]) for row in rows))
    lines: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in rows:
        cells = lines.setdefault((row["mode"], row["impl"]), {})
        cells[row["metric"], row["unit"]] = _shown(row["p50"], row)
    heads = [f"{name}, {unit}" if unit else name for name, unit in metrics]
    return _table(
        ("mode", "implementation", *heads),
        [(*key, *(cells.get(metric, "") for metric in metrics)) for key, cells in lines.items()],
    )


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _small(row: Row) -> bool:
    return row["unit"] == "s" and float(row["p50"]) < 1


def _shown(value: str, row: Row) -> str:
    """Three significant digits, whole numbers in full."""
    if not value:
        return ""
    number = float(value) * (1000 if _small(row) else 1)
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


if __name__ == "__main__":
    main()
