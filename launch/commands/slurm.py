"""``mimic-fast slurm RECIPE --nodes N --gpus G > job.sbatch``: a purification as a Slurm job."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimic_fast.errors import UsageError
from mimic_fast.launch.arguments import Data, Out, Overrides, Teacher, given

if TYPE_CHECKING:
    from mimic_fast.config import Settings

Lines = list[str] | None


def slurm(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe.", metavar="RECIPE.toml")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")],
    gpus: Annotated[
        int, typer.Option("--gpus", min=0, help="GPUs per machine, one process each; 0: CPUs.")
    ],
    tasks: Annotated[
        int | None, typer.Option("--tasks", min=1, help="Processes per machine; with --gpus 0.")
    ] = None,
    cpus: Annotated[int, typer.Option("--cpus", min=1, help="Cores per process.")] = 8,
    time: Annotated[
        str, typer.Option("--time", help="Time limit; the job requeues itself at its end.")
    ] = "08:00:00",
    partition: Annotated[str | None, typer.Option("--partition", help="Queue.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="Who pays.")] = None,
    signal_before: Annotated[
        int,
        typer.Option(
            "--signal-before",
            min=60,
            max=65535,
            metavar="SECONDS",
            help="When to save and requeue, before the time limit.",
        ),
    ] = 120,
    teacher: Teacher = None,
    data: Data = None,
    out: Out = None,
    overrides: Overrides = None,
    python: Annotated[
        str, typer.Option("--python", help="Interpreter with mimic_fast on the nodes.")
    ] = "python",
    env: Annotated[
        Lines, typer.Option("--env", metavar="LINE", help="Shell line to run first; repeatable.")
    ] = None,
    sbatch: Annotated[
        Lines, typer.Option("--sbatch", metavar="OPTION", help="As in '--qos=high'; repeatable.")
    ] = None,
    srun: Annotated[
        Lines,
        typer.Option("--srun", metavar="OPTION", help="As in '--container-image=...'; repeatable."),
    ] = None,
) -> None:
    """Print a job script that purifies on several machines, saves before its end and requeues.

    The recipe is checked first. Nothing is submitted: `sbatch job.sbatch` does that.
    """
    from mimic_fast.launch.slurm_script import SlurmJob, job_script

    processes = _processes_per_node(gpus, tasks)
    device = "cuda" if gpus else "cpu"
    settings = _settings(recipe, device, teacher=teacher, data=data, out=out, overrides=overrides)
    _check_settings(settings, world=nodes * processes, device=device)
    options = given(teacher=teacher, data=data, out=out)
    command = [
        [python, "-m", "mimic_fast", "purify", str(recipe)],
        *([f"--{name}", str(value)] for name, value in options.items()),
        *(["--set", item] for item in overrides or ()),
        ["--device", device, "--resume", "auto"],
    ]
    job = SlurmJob(
        nodes=nodes,
        tasks=processes,
        gpus=gpus,
        cpus=cpus,
        time=time,
        signal_before=signal_before,
        command=command,
        partition=partition,
        account=account,
        env=env or (),
        sbatch=sbatch or (),
        srun=srun or (),
    )
    typer.echo(job_script(job), nl=False)


def _processes_per_node(gpus: int, tasks: int | None) -> int:
    if gpus and tasks not in (None, gpus):
        raise UsageError(f"one process per GPU: {gpus} GPUs but --tasks {tasks}; leave --tasks out")
    if not gpus and tasks is None:
        raise UsageError("--gpus 0 runs on CPUs; say how many processes per machine with --tasks")
    return gpus or tasks or 1


def _settings(
    recipe: Path,
    device: str,
    *,
    teacher: Path | None,
    data: str | None,
    out: Path | None,
    overrides: list[str] | None,
) -> "Settings":
    """What the job's command line will come to."""
    from mimic_fast.recipe import load_settings

    wanted = load_settings(recipe, overrides=overrides or ()).run.device
    if wanted not in ("auto", device):
        raise UsageError(
            f"run.device is {wanted!r} but the job computes on {device!r}; change --gpus or the "
            "recipe"
        )
    values = {
        "encoder": given(teacher=teacher),
        "data": given(source=data),
        "run": {**given(out=out), "device": device, "resume": "auto"},
    }
    return load_settings(recipe, overrides=overrides or (), values=values)


def _check_settings(settings: "Settings", *, world: int, device: str) -> None:
    """What would otherwise fail after hours in the queue."""
    missing = [
        option
        for option, value in (
            ("--teacher", settings.encoder.teacher),
            ("--data", settings.data.source),
            ("--out", settings.run.out),
        )
        if value is None
    ]
    if missing:
        raise UsageError(f"the recipe leaves {', '.join(missing)} open; give what is missing here")
    if settings.run.resume != "auto":
        raise UsageError("a job that requeues itself needs run.resume auto; leave --set run.resume")
    parts = world * settings.optim.accumulate
    if settings.optim.batch_size % parts:
        raise UsageError(
            f"optim.batch_size {settings.optim.batch_size} is the global batch and must divide by "
            f"{parts}: {world} processes x optim.accumulate {settings.optim.accumulate}"
        )
