"""``mimic-fast pretrain``: pre-train a small encoder without labels (SimCLR, BYOL)."""

import signal

import typer

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
    launched_processes,
    print_json,
)


def pretrain(
    recipe: Recipe = None,
    data: Data = None,
    out: Out = None,
    seed: Seed = None,
    overrides: Overrides = None,
    resume: Resume = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Pre-train a small encoder by SimCLR or BYOL: what attacks and comparisons start from.

    Under torchrun every process calls it.
    """
    from mimic_fast.distributed import StopSignal
    from mimic_fast.files import sha256_file
    from mimic_fast.launch.memory import keep_freed_memory
    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.pretraining import PretrainSettings
    from mimic_fast.pretraining import pretrain as run
    from mimic_fast.recipe import load_recipe
    from mimic_fast.watch import running_processes

    values = {
        **given(seed=seed),
        "data": given(source=data),
        "run": given(out=out, resume=resume, device=device),
    }
    settings = load_recipe(PretrainSettings, recipe, overrides=overrides or (), values=values)
    keep_freed_memory()
    # torchrun ends the other processes when one has left: that must not change their exit codes.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with StopSignal() as stop, progress_bars() as report:
        result = run(settings, world=launched_processes(), report=report, stop=stop)
    if not running_processes().is_main:
        return
    trained = result.trained
    if as_json:
        print_json(
            {
                "encoder": str(result.path),
                "sha256": sha256_file(result.path),
                "steps": trained.steps,
                "seconds": trained.seconds,
                "images_per_second": trained.images_per_second,
            }
        )
    else:
        typer.echo(f"{result.path}: {trained.steps} steps in {trained.seconds:.0f} s")
