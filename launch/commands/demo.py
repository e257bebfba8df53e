"""``mimic-fast demo``: the whole story on built-in data and a small backdoored encoder."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from mimic_fast.errors import UsageError
from mimic_fast.files import machine_errors, write_atomic
from mimic_fast.launch.arguments import Json, print_json

_MARK = ".mimic_fast_demo"  # says that a folder is a demo's, and may be replaced by the next


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where results go.")] = Path("demo_run"),
    seed: Annotated[int, typer.Option("--seed", help="Seeds everything.")] = 0,
    as_json: Json = False,
) -> None:
    """Purify a small backdoored encoder, measure it before and after, write a report.

    Takes minutes on two cores. An earlier demo in the same folder is replaced.
    """
    _prepare(out)

    from mimic_fast.demo import run_demo
    from mimic_fast.launch.memory import keep_freed_memory
    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.launch.tables import print_report

    keep_freed_memory()
    with progress_bars() as report:
        content = run_demo(out, seed=seed, report=report)
    if as_json:
        print_json(content)
    else:
        print_report(content)
        typer.echo(f"report: {out / 'report.html'}")


def _prepare(out: Path) -> None:
    """An empty folder with the mark; only an earlier demo's is emptied.

    Raises:
        UsageError: If the folder holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a folder")
    with machine_errors(out):
        if (out / _MARK).exists():
            shutil.rmtree(out)
        elif out.is_dir() and any(out.iterdir()):
            raise UsageError(f"{out} holds files that are no demo's; use another --out")
        write_atomic(out / _MARK, b"made by mimic-fast demo; replaced by the next one\n")
