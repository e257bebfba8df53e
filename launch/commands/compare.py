"""``mimic-fast compare``: attacks x defenses x seeds from one matrix."""

from pathlib import Path
from typing import Annotated

import typer

from mimic_fast.errors import MimicError, UsageError
from mimic_fast.launch.arguments import Json, Out, Overrides, Resume, print_json


class CellsFailedError(MimicError, RuntimeError):
    """Some cells gave no figures (exit 1); the others did."""


def compare(
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX", help="TOML file of the comparison.")],
    out: Out = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="Cells at a time, one thread each if several.")
    ] = 1,
    resume: Resume = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Compare defenses on attacks: every cell of the matrix in a process of its own.

    Writes table.csv, table.md and a heat map table.html. What is finished is not run again; Ctrl-C
    and SIGTERM keep the state of what runs and leave with exit code 6.
    """
    from mimic_fast.comparison.settings import MatrixSettings
    from mimic_fast.recipe import load_recipe

    if resume not in (None, "auto", "never"):
        raise UsageError(f"--resume must be auto or never, got {resume!r}")
    settings = load_recipe(MatrixSettings, matrix, overrides=overrides or ())
    if out is None:
        raise UsageError("nowhere to write; give --out DIR")

    # torch only now, so that a mistake in the matrix shows at once
    from mimic_fast.comparison.run import compare as run
    from mimic_fast.distributed import StopSignal
    from mimic_fast.launch.progress import progress_bars

    with StopSignal() as stop, progress_bars() as report:
        result = run(settings, out, jobs=jobs, resume=resume != "never", report=report, stop=stop)
    if as_json:
        print_json(
            {
                "table": str(out / "table.csv"),
                "rows": [dict(row) for row in result.rows],
                "skipped": result.skipped,
                "ran": result.ran,
                "failed": result.failed,
            }
        )
    else:
        typer.echo((out / "table.md").read_text(encoding="utf-8"))
        typer.echo(f"{result.ran} cells run, {result.skipped} done before; {out / 'table.html'}")
    if result.failed:
        name, reason = next(iter(result.failed.items()))
        raise CellsFailedError(f"{len(result.failed)} cells failed, the first {name}: {reason}")


def cell(
    task: Annotated[Path, typer.Argument(metavar="TASK", help="What compare wrote for it.")],
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of PyTorch.")] = None,
) -> None:
    """Run one cell of a comparison; compare starts it."""
    import torch

    from mimic_fast.comparison.cell import read_task, run_cell
    from mimic_fast.distributed import StopSignal
    from mimic_fast.launch.memory import keep_freed_memory

    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    with StopSignal() as stop:
        run_cell(read_task(task), stop=stop)
