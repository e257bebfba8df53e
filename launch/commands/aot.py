"""``mimic-fast aot``: what the GPU kernels take, on a machine without a GPU."""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.util import find_spec
from typing import IO, Annotated, Any

import typer

from mimic_fast.errors import MachineError, SelfTestError, UsageError
from mimic_fast.launch.arguments import Json, print_json
from mimic_fast.progress import Event, Reporter

# Triton decides when it is imported whether it compiles or interprets, and this process may have
# imported it, or a variable may tell it to interpret: so processes of their own compile, each a
# part of the cases.
_WORKER = """
import dataclasses, gc, json, sys
from mimic_fast.kernels import aot
gc.freeze()  # a tenth of the time went into looking for garbage among the imported
part, parts, only, *targets = sys.argv[1:]
rows, sys.stdout = sys.stdout, sys.stderr  # a compiler that has something to say prints it
only = json.loads(only)
cases = [
    case
    for case in aot.production_cases()
    if not only or any(text in case.name for text in only)
]
order = [case.name for case in cases]
for row in aot.compile_all(cases[int(part) :: int(parts)], targets):
    found = dataclasses.asdict(row) | {"failures": aot.failures(row)}
    print(json.dumps([order.index(row.case), len(cases), found]), file=rows, flush=True)
"""
_MOST_WORKERS = 8
_PIPED_WIDTH = 200  # columns


class Target(StrEnum):
    """What to compile for."""

    SM_80 = "sm_80"
    SM_90 = "sm_90"
    SM_100 = "sm_100"
    GFX942 = "gfx942"
    GFX942_LARGE = "gfx942_large"


_USUAL = (Target.SM_80, Target.SM_90, Target.SM_100, Target.GFX942)


def aot(
    check: Annotated[
        bool, typer.Option("--check", help="Exit 3 if a kernel spills or moves data narrowly.")
    ] = False,
    target: Annotated[
        list[Target] | None,
        typer.Option(
            "--target",
            help="Compile for this one; repeatable. Default: all but gfx942_large, which is gfx942 "
            "with tensors of more than 2 GiB.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="What has this in its name, such as 'C768 bf16'; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile every GPU kernel ahead of time and show registers, spills and access widths.

    No GPU is needed. With --check, more than 128 registers, any spill or stack, and less than 99 %
    of the data accesses 128-bit where alignment allows it are failures, a line each.
    """
    from mimic_fast.launch.progress import progress_bars

    if find_spec("triton") is None:
        raise MachineError("Triton is not installed; it comes with PyTorch for Linux")
    with progress_bars() as report:
        rows = compiled_rows(target or _USUAL, report, only=only or ())
    if not rows:
        raise UsageError(f"no kernel has {' or '.join(map(repr, only or ()))} in its name")
    conclude(rows, check=check, as_json=as_json)


def conclude(rows: Sequence[Mapping[str, Any]], *, check: bool, as_json: bool) -> None:
    """Prints the rows and, if asked to check them, ends with exit code 3 where one fails."""
    failures = [
        f"{row['case']}, {row['target']}: {reason}" for row in rows for reason in row["failures"]
    ]
    if as_json:
        print_json({"rows": rows, "failures": failures})
    else:
        _print_rows(rows)
    if check and failures:
        for failure in failures:
            typer.echo(f"error: {failure}", err=True)
        raise typer.Exit(SelfTestError.exit_code)


def compiled_rows(
    targets: Sequence[str], report: Reporter, *, only: Sequence[str] = ()
) -> list[Mapping[str, Any]]:
    """What every specialization takes on every target, in a fixed order.

    Args:
        targets: Names of the targets.
        report: Told of every kernel.
        only: One of these must be in the name of a specialization; empty: all.

    Raises:
        RuntimeError: If a process ends before it has done its part.
    """
    found: list[tuple[int, Mapping[str, Any]]] = []
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+") as complaints:
        workers = _started([json.dumps(only), *targets], writing, complaints)
        os.close(writing)
        try:
            with os.fdopen(reading) as lines:
                for line in lines:
                    index, cases, row = json.loads(line)
                    found.append((index, row))
                    done, total = len(found), cases * len(targets)
                    report(Event(phase="compile", done=done, total=total, unit="kernels"))
            codes = [worker.wait() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()  # nothing if it has ended
        if any(codes):
            complaints.seek(0)
            raise RuntimeError(f"ended early, exit codes {codes}: {complaints.read()[-2000:]}")
    return [row for _, row in sorted(found, key=lambda item: item[0])]


def _started(
    arguments: Sequence[str], rows: int, complaints: IO[str]
) -> list[subprocess.Popen[bytes]]:
    """A worker for every core, but for memory's sake no more than a few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = min(cores or 1, _MOST_WORKERS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(part), str(parts), *arguments],
            stdout=rows,
            stderr=complaints,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )
        for part in range(parts)
    ]


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    targets = list(dict.fromkeys(row["target"] for row in rows))
    cells = defaultdict(str, {(row["case"], row["target"]): _cell(row) for row in rows})
    table = Table("kernel", *targets)
    for case in dict.fromkeys(row["case"] for row in rows):
        # plain text: square brackets in a name are no markup
        table.add_row(*(Text(text) for text in (case, *(cells[case, t] for t in targets))))
    table.caption = (
        "registers of a lane; bytes of shared memory; share of the data accesses that move at "
        "least 128 bits; what else there is: failures, matrix instructions, global atomics"
    )
    # A pipe has no width: rows stay whole there.
    Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH).print(table)
    _print_notes(rows)


def _print_notes(rows: Sequence[Mapping[str, Any]]) -> None:
    """Where 128-bit accesses are not demanded, reason by reason."""
    notes = defaultdict[str, dict[str, list[str]]](lambda: defaultdict(list))
    for row in rows:
        if not row["data"]:
            notes[row["note"]][row["case"]].append(row["target"])
    for note, kernels in notes.items():
        typer.echo(f"128 bits are not demanded: {note}")
        for kernel, targets in kernels.items():
            typer.echo(f"  {kernel} ({', '.join(targets)})")


def _cell(row: Mapping[str, Any]) -> str:
    accesses = row["loads"] + row["stores"]
    share = (row["wide_loads"] + row["wide_stores"]) / accesses if accesses else 0
    parts = [f"{row['registers']} {row['shared']:,} {share:.0%}"]
    parts += ["FAILS"] if row["failures"] else []
    parts += [row["matrix"]] if row["matrix"] else []
    parts += [f"{row['global_atomics']} atomics"] if row["global_atomics"] else []
    return " ".join(parts)
