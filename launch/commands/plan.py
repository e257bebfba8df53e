"""``mimic-fast plan RECIPE``: memory and time of a recipe, before any machine is asked for."""

from typing import TYPE_CHECKING, Annotated

import typer

from mimic_fast.launch.arguments import (
    Device,
    ForceOp,
    Json,
    Overrides,
    Preset,
    Recipe,
    Teacher,
    given,
    print_json,
)

if TYPE_CHECKING:
    from mimic_fast.planning.plan import Machines, Plan, Row

Gpus = Annotated[int, typer.Option("--gpus", min=1, help="Processes, one a GPU.")]
MemoryOf = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Of each GPU: 80GB, 40GiB.")
]
GpuName = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="Its memory and speed: H100, A100, L4, ..."),
]
PeakTflops = Annotated[
    float | None,
    typer.Option("--peak-tflops", min=0.001, help="TFLOP/s of the precision; wins over --gpu."),
]
Bandwidth = Annotated[
    float | None,
    typer.Option(
        "--bandwidth", min=0.001, help="GB/s between GPUs in one direction; wins over --gpu."
    ),
]


def plan(
    recipe: Recipe = None,
    gpus: Gpus = 1,
    memory: MemoryOf = None,
    gpu: GpuName = None,
    peak_tflops: PeakTflops = None,
    bandwidth: Bandwidth = None,
    teacher: Teacher = None,
    preset: Preset = None,
    overrides: Overrides = None,
    device: Device = None,
    force_op: ForceOp = None,
    as_json: Json = False,
) -> None:
    """Forecast peak memory, largest micro-batch and step time of a recipe under every engine.

    The step is run on fake tensors: nothing is allocated, no GPU is needed. Without a teacher's
    file, encoder.architecture is enough.
    """
    from mimic_fast.recipe import load_settings

    values = {
        "encoder": given(teacher=teacher),
        "run": given(device=device, force_op=force_op),
    }
    settings = load_settings(recipe, preset=preset, overrides=overrides or (), values=values)

    # torch only now, so that a mistake in the settings shows at once
    from mimic_fast.planning.machines import machines_of
    from mimic_fast.planning.plan import plan as forecast
    from mimic_fast.planning.plan import plan_json

    machines = machines_of(
        settings.optim,
        gpus=gpus,
        memory=memory,
        gpu=gpu,
        peak_tflops=peak_tflops,
        bandwidth=bandwidth,
    )
    found = forecast(settings, machines)
    if as_json:
        print_json(plan_json(found))
    else:
        _print(found, machines, recipe="RECIPE.toml" if recipe is None else str(recipe))


def _print(found: "Plan", machines: "Machines", *, recipe: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from mimic_fast.planning.assumptions import assumptions
    from mimic_fast.planning.sizes import shown_bytes

    typer.echo(_counted(found))
    table = Table(
        title=f"{machines.gpus} x {shown_bytes(machines.memory)}, micro-batch {found.images} images"
    )
    for name in ("engine", "teacher"):
        table.add_column(name)
    for name in ("peak", "fits", "largest micro-batch", "step", "images/s"):
        table.add_column(name, justify="right")
    for row in found.rows:
        table.add_row(*_cells(row, found.settings.optim.batch_size))
    Console().print(table)
    typer.echo(_recommended(found, recipe))
    for sentence in assumptions(found.settings, machines.speed, found.path):
        typer.echo(f"- {sentence}")


def _recommended(found: "Plan", recipe: str) -> str:
    if found.advice is None:
        return "nothing fits: use more memory or GPUs, or a smaller optim.batch_size"
    options: list[str] = []
    for key, value in found.advice.items():
        section, _, name = key.partition(".")
        if getattr(getattr(found.settings, section), name) != value:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            options.append(f" --set {key}={text}")
    same = "" if options else " (the recipe as it is)"
    return f"recommended: mimic-fast purify {recipe}{''.join(options)}{same}"


def _counted(found: "Plan") -> str:
    from mimic_fast.launch.tables import printable
    from mimic_fast.planning.sizes import shown_bytes

    counts, spec = found.counts, found.spec
    image = float(counts.operations.per_image.max())
    forward, backward = counts.flops.forward, counts.flops.backward
    work = forward.convolutions + forward.products + backward.convolutions + backward.products
    return printable(
        f"{spec.architecture} at {spec.image_size} pixels: {counts.numbers:,} weights; student "
        f"{shown_bytes(counts.weights)}, optimizer {shown_bytes(counts.moments)}, teacher "
        f"{shown_bytes(counts.teacher)}, activations {shown_bytes(image)} an image, "
        f"{work / 1e9:,.1f} GFLOP an image"
    )


def _cells(row: "Row", batch: int) -> tuple[str, ...]:
    from mimic_fast.planning.sizes import shown_bytes

    time = row.time
    return (
        row.engine,
        "cut" if row.teacher_shard else "whole",
        shown_bytes(row.peak.total),
        "yes" if row.fits else "no",
        f"{row.largest:,}",
        "-" if time is None else f"{1000 * time.total:,.1f} ms",
        "-" if time is None else f"{batch / time.total:,.0f}",
    )
