"""``mimic-fast scan``: is this encoder suspicious? No trigger and no labels are needed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.launch.arguments import (
    Data,
    Device,
    Json,
    Out,
    Overrides,
    Recipe,
    Resume,
    Seed,
    given,
    print_json,
)
from mimic_fast.launch.tables import printable

if TYPE_CHECKING:
    from mimic_fast.scan.scan import ScanResult


def scan(
    recipe: Recipe = None,
    encoder: Annotated[
        Path | None, typer.Option("--encoder", help="Checkpoint of the encoder to scan.")
    ] = None,
    data: Data = None,
    references: Annotated[
        Path | None,
        typer.Option(
            "--references",
            help="Folder of clean encoders of the same architecture, or of their scans. "
            "Without it there are scores and no verdict.",
        ),
    ] = None,
    out: Out = None,
    seed: Seed = None,
    overrides: Overrides = None,
    resume: Resume = None,
    device: Device = None,
    fail_on: Annotated[
        Literal["unusual", "suspicious"] | None,
        typer.Option("--fail-on", help="Exit with 4 at this level or above."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for signs of a backdoor with clean images alone: no trigger, no labels.

    With --out, scan.json, the recovered trigger and an attack.json that evaluate reads are written
    there, and an interrupted scan goes on with --resume auto.
    """
    from mimic_fast.recipe import load_recipe
    from mimic_fast.scan.settings import ScanSettings

    values = {
        **given(seed=seed, references=references),
        "encoder": given(teacher=encoder),
        "data": given(source=data),
        "run": given(out=out, resume=resume, device=device),
    }
    settings = load_recipe(ScanSettings, recipe, overrides=overrides or (), values=values)
    if fail_on is not None and settings.references is None:
        raise UsageError("--fail-on needs a verdict, and a verdict needs --references")

    # torch only now, so that a mistake in the settings shows at once
    from mimic_fast.distributed import StopSignal
    from mimic_fast.launch.memory import keep_freed_memory
    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.scan.scan import scan as run

    keep_freed_memory()
    with progress_bars() as report, StopSignal() as stop:
        result = run(settings, report=report, stop=stop, must_judge=fail_on is not None)
    if as_json:
        from mimic_fast.scan.result import scan_json

        print_json(scan_json(result.scanned, result.verdict))
    else:
        _print(result)
    _fail(result, fail_on)


def _print(result: "ScanResult") -> None:
    verdict = result.verdict
    compared = {} if verdict is None else {item.name: item for item in verdict.comparisons}
    for score in result.scanned.scores:
        bound = "" if score.reached else ">= "
        line = f"{score.name:22} {bound}{score.value:.3g} {score.unit} ({score.suspicious} is bad)"
        if (item := compared.get(score.name)) is not None:
            line += f"; clean {item.low:.3g} .. {item.high:.3g}"
            if item.deviations is not None:
                line += f", {item.deviations:+.1f} deviations"
        typer.echo(printable(f"{line}; {score.detail}"))
    if verdict is None:
        typer.echo("no verdict: too few comparable clean encoders (--references), scores only")
    else:
        count = len(result.references.used)
        typer.echo(f"{verdict.level.upper()} ({count} references, chance {verdict.chance:.2g})")
        typer.echo(f"means: {verdict.means}")
        typer.echo(f"does not mean: {verdict.does_not_mean}")
    if result.out is not None:
        typer.echo(f"written: {result.out / 'scan.json'}")


def _fail(result: "ScanResult", fail_on: str | None) -> None:
    from mimic_fast.scan.result import LEVELS

    if fail_on is None:
        return
    if result.verdict is None:
        raise UsageError("--fail-on needs a verdict: too few comparable clean encoders")
    level = result.verdict.level
    if LEVELS.index(level) >= LEVELS.index(fail_on):
        name = result.scanned.name
        raise UnsafeInputError(f"{name} is {level}; --fail-on {fail_on} does not allow it")
