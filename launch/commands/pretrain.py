"""``mimic-fast pretrain``: pre-train a small encoder without labels (SimCLR, one process)."""

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
    """Pre-train a small encoder by SimCLR: what attacks and comparisons start from."""
    from mimic_fast.distributed import StopSignal
    from mimic_fast.files import sha256_file
    from mimic_fast.launch.memory import keep_freed_memory
    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.pretraining import PretrainSettings
    from mimic_fast.pretraining import pretrain as run
    from mimic_fast.recipe import load_recipe

    values = {
        **given(seed=seed),
        "data": given(source=data),
        "run": given(out=out, resume=resume, device=device),
    }
    settings = load_recipe(PretrainSettings, recipe, overrides=overrides or (), values=values)
    keep_freed_memory()
    with StopSignal() as stop, progress_bars() as report:
        result = run(settings, report=report, stop=stop)
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
