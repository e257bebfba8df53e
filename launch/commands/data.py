"""``mimic-fast data check SOURCE``: what is in a data source and what is wrong with it."""

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimic_fast.errors import UnsafeInputError
from mimic_fast.launch.arguments import Json, print_json

if TYPE_CHECKING:
    from mimic_fast.data.check_result import DataCheck

app = typer.Typer(help="Look into data sources.")

SHOWN = 20  # rows of each table; --out and --json have all


class FailOn(StrEnum):
    """Findings that can end the command with exit code 4."""

    CORRUPT = "corrupt"
    DUPLICATES = "duplicates"
    SUSPICIOUS = "suspicious"


@app.callback()
def root() -> None:
    """Look into data sources."""


@app.command()
def check(
    source: Annotated[str, typer.Argument(help="A folder, .tar shards or 'fashion-mnist:train'.")],
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", help="Pixels to search in; the images' own, at most 64."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Check so many items, evenly spread.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write all as JSON here.")] = None,
    fail_on: Annotated[
        list[FailOn] | None,
        typer.Option("--fail-on", help="Exit with 4 if there are any; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Decode every item; list corrupt items, duplicates and images that look tampered with."""
    from mimic_fast.data.check import check_source
    from mimic_fast.data.check_result import data_check_json
    from mimic_fast.data.sources import open_source
    from mimic_fast.files import write_atomic
    from mimic_fast.launch.progress import progress_bars

    with progress_bars() as report:
        opened = open_source(source, report=report)
        result = check_source(opened, image_size=image_size, limit=limit, report=report)
    values = data_check_json(result)
    if out is not None:
        write_atomic(out, (json.dumps(values, indent=1) + "\n").encode())
    if as_json:
        print_json(values)
    else:
        _print(result)
    _fail(result, fail_on or ())


def _fail(result: "DataCheck", fail_on: Sequence[FailOn]) -> None:
    duplicates = len(result.same_bytes) + len(result.same_pixels) + len(result.near_duplicates)
    counts = {
        FailOn.CORRUPT: (len(result.corrupt), "corrupt items"),
        FailOn.DUPLICATES: (duplicates, "groups of duplicates"),
        FailOn.SUSPICIOUS: (len(result.suspicious), "suspicious images"),
    }
    found = [f"{counts[kind][0]} {counts[kind][1]}" for kind in fail_on if counts[kind][0]]
    if found:
        raise UnsafeInputError(f"{result.source}: {', '.join(found)}; --fail-on allows none")


def _print(result: "DataCheck") -> None:
    _print_facts(result)
    _print_table("Corrupt items", ("item", "reason"), result.corrupt)
    for title, groups in (
        ("Same bytes", result.same_bytes),
        ("Same pixels, other bytes", result.same_pixels),
        ("Nearly the same picture", result.near_duplicates),
    ):
        _print_table(title, ("items",), [(", ".join(group),) for group in groups])
    _print_table(
        "What many images share",
        ("group", "what", "place", "images", "by chance"),
        [
            (
                str(number),
                group.reason,
                _place(group.place),
                str(group.images),
                f"{group.expected:.1f}",
            )
            for number, group in enumerate(result.groups)
        ],
    )
    _print_table(
        f"Suspicious images: {len(result.suspicious)} ({100 * result.suspicious_share:.2f} %)",
        ("item", "why", "group", "score"),
        [
            (
                each.key,
                each.reason,
                "-" if each.group is None else str(each.group),
                f"{each.score:.2f}",
            )
            for each in result.suspicious
        ],
    )


def _print_facts(result: "DataCheck") -> None:
    duplicates = (result.same_bytes, result.same_pixels, result.near_duplicates)
    sizes = ", ".join(
        f"{size.width} x {size.height} x {size.channels}: {size.images}"
        for size in result.sizes[:4]
    )
    more = f", {len(result.sizes) - 4} more" if len(result.sizes) > 4 else ""
    facts = [
        ("source", result.source),
        ("items", f"{result.items:,}, {result.checked:,} checked, {result.item_bytes:,} bytes"),
        ("good images", f"{result.good:,}"),
        ("corrupt", f"{len(result.corrupt):,}"),
        ("sizes", sizes + more),
        ("classes", "no labels" if result.labels is None else str(len(result.labels))),
        ("groups of duplicates", " + ".join(f"{len(each):,}" for each in duplicates)),
        ("suspicious", f"{len(result.suspicious):,} ({100 * result.suspicious_share:.2f} %)"),
        ("searched in", f"{result.side} x {result.side} pixels"),
    ]
    _print_table("Data source", ("what", "found"), facts)


def _place(place: tuple[float, float, float, float] | None) -> str:
    if place is None:
        return "-"
    top, left, height, width = (f"{100 * value:.0f}" for value in place)
    return f"{height} x {width} % at {top}, {left} %"


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # plain text: square brackets in a name are no markup

    from mimic_fast.launch.tables import printable

    if not rows:
        return
    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows[:SHOWN]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if len(rows) > SHOWN:
        table.caption = f"the first {SHOWN} of {len(rows):,}; all with --json or --out"
    Console().print(table)
