"""``mimic-fast doctor``: what works here, what will be used, and whether a recipe could run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mimic_fast.errors import SelfTestError
from mimic_fast.launch.arguments import (
    Data,
    Device,
    Json,
    Out,
    Overrides,
    Preset,
    Recipe,
    Teacher,
    given,
    is_main_process,
    launched_processes,
    print_json,
)
from mimic_fast.launch.tables import printable

if TYPE_CHECKING:
    from mimic_fast.doctor.finding import Finding


def doctor(
    recipe: Recipe = None,
    teacher: Teacher = None,
    data: Data = None,
    out: Out = None,
    preset: Preset = None,
    overrides: Overrides = None,
    device: Device = None,
    timeout: Annotated[
        int,
        typer.Option(
            min=1, help="Seconds for a trial in processes of its own, such as two of gloo."
        ),
    ] = 25,
    as_json: Json = False,
) -> None:
    """Check this machine, and with a recipe or its options whether that could run here.

    A line a check: ok, warning or FAILED, what was seen, what to do. Exit code 3 if one failed, 2
    if the settings are not valid. Trains nothing; needs less than half a minute.
    """
    from mimic_fast.recipe import load_settings

    asked = any(value is not None for value in (recipe, teacher, data, preset, overrides, device))
    settings = None
    if asked:
        values = {
            "encoder": given(teacher=teacher),
            "data": given(source=data),
            "run": given(out=out, device=device),
        }
        settings = load_settings(recipe, preset=preset, overrides=overrides or (), values=values)

    # torch only now, so that a mistake in the settings shows at once
    from mimic_fast.doctor.examine import examine
    from mimic_fast.launch.progress import progress_bars

    if not is_main_process():
        return
    with progress_bars() as report:
        world = launched_processes()
        findings = examine(settings, out=out, world=world, seconds=timeout, report=report)
    if as_json:
        print_json(_content(findings))
    else:
        for line in _lines(findings):
            typer.echo(printable(line))
    bad = [finding.name for finding in findings if finding.level == "FAILED"]
    if bad:
        what = "the recipe cannot run here" if asked else "this machine cannot run purifications"
        raise SelfTestError(f"{what}: {', '.join(bad)} failed; see these lines above")


def _content(findings: "Sequence[Finding]") -> dict[str, object]:
    from dataclasses import asdict

    return {
        "can_run": all(finding.level != "FAILED" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _lines(findings: "Sequence[Finding]") -> list[str]:
    """One line each, the failed ones last, where they are read."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in sorted(findings, key=lambda finding: finding.level == "FAILED"):
        todo = f"; {finding.todo}" if finding.todo else ""
        lines.append(f"{finding.level:<8} {finding.name:<{width}}  {finding.seen}{todo}")
    return lines
