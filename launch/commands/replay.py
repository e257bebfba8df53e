"""``mimic-fast replay``: a diverged step again, to see where its numbers stop being finite."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimic_fast.launch.arguments import Device, Json, Teacher, print_json
from mimic_fast.launch.tables import printable

if TYPE_CHECKING:
    from mimic_fast.diverged import Diverged
    from mimic_fast.not_finite import NotFinite
    from mimic_fast.replaying import Replayed

_SHOWN = 8  # names of a list; --json has all


def replay(
    folder: Annotated[
        Path,
        typer.Argument(
            help="The folder 'diverged' of a run that ended with exit code 5.",
            metavar="RUN/diverged",
        ),
    ],
    teacher: Teacher = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="fp32, bf16, fp16 or fp64; default: the run's."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run a diverged step once more in one process and name what is not finite.

    Nothing is trained and nothing written. The exit code is 0 whether or not it happens again: the
    output says which.
    """
    from mimic_fast.diverged import load_diverged
    from mimic_fast.replaying import replay as run

    dump = load_diverged(folder)
    result = run(dump, teacher=teacher, precision=precision, device=device or "auto")
    if as_json:
        print_json(_content(result, dump))
    else:
        for line in _lines(result, dump):
            typer.echo(printable(line))


def _content(result: "Replayed", dump: "Diverged") -> dict[str, object]:
    from dataclasses import asdict

    content = asdict(result)
    content["terms"] = {name: _finite(value) for name, value in result.terms.items()}
    content["gradient_norm"] = _finite(result.gradient_norm)
    return {**content, "world": dump.world, "versions": dict(dump.versions)}


def _lines(result: "Replayed", dump: "Diverged") -> list[str]:
    facts = dump.facts
    again = "not finite again" if result.reproduced else "finite this time: not reproduced"
    where = f"{result.precision} on {result.device}"
    lines = [
        f"step {result.step}, {result.batch_size} images of {dump.world} process(es), {where}: "
        f"{again}",
        "losses: " + ", ".join(f"{name} {value:.6g}" for name, value in result.terms.items()),
        f"gradient norm: {result.gradient_norm:.6g}",
    ]
    if result.views:
        lines.append(f"pixels that are not finite in images: {_listed(result.views)}")
    if result.first is not None:
        lines.append(f"first output that is not finite: {_described(result.first)}")
    elif result.reproduced:
        lines.append("every module's output is finite: a loss or a gradient overflows")
    for what, items in (("weights", result.weights), ("gradients", result.gradients)):
        if items:
            lines.append(f"{what} that are not finite: {_listed(map(_described, items))}")
    if result.reproduced:
        lines.append(_about_images(result))
    elif result.precision == facts.settings.optim.precision:
        lines.append(
            "other versions, another device or dropout may explain it; the run was "
            + ", ".join(f"{name} {text}" for name, text in dump.versions.items())
        )
    return lines


def _about_images(result: "Replayed") -> str:
    if not result.images:
        return "no image's own loss is: it is the batch as a whole, or the way back to the weights"
    if len(result.images) == result.batch_size:
        return "every image's own loss is not finite: weights or statistics, not an image"
    return f"images whose own loss is not finite (ids): {_listed(result.images)}"


def _described(item: "NotFinite") -> str:
    name = f"{item.role} {item.name}".rstrip()
    return f"{name} ({item.count:,} of {item.total:,})"


def _listed(items: Iterable[object]) -> str:
    texts = [str(item) for item in items]
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
