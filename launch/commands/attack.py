"""``mimic-fast attack KIND``: implant a backdoor in an encoder, to measure defenses against it."""

from pathlib import Path
from typing import Annotated

import typer

from mimic_fast.launch.arguments import (
    Data,
    Json,
    Out,
    Overrides,
    Recipe,
    Seed,
    given,
    print_json,
)

app = typer.Typer(help="Implant a backdoor in an encoder (research and tests).")


@app.callback()
def kinds() -> None:
    """Implant a backdoor in an encoder, to measure defenses against it (see SECURITY.md)."""


@app.command()
def badencoder(
    recipe: Recipe = None,
    encoder: Annotated[
        Path | None, typer.Option("--encoder", help="Checkpoint of the clean encoder.")
    ] = None,
    data: Data = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="Image file, or class:K for that label's first image in the data."
        ),
    ] = None,
    trigger: Annotated[
        Path | None, typer.Option("--trigger", help="Trigger file; default: a white square.")
    ] = None,
    out: Out = None,
    seed: Seed = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """BadEncoder (IEEE S&P 2022): triggered images get the features of a reference image."""
    from mimic_fast.attacks.badencoder import BadEncoderSettings
    from mimic_fast.attacks.badencoder import badencoder as run
    from mimic_fast.launch.memory import keep_freed_memory
    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.recipe import load_recipe

    values = {
        **given(seed=seed, reference=reference, trigger=trigger),
        "encoder": given(teacher=encoder),
        "data": given(source=data),
        "run": given(out=out),
    }
    settings = load_recipe(BadEncoderSettings, recipe, overrides=overrides or (), values=values)
    keep_freed_memory()
    with progress_bars() as report:
        result = run(settings, report=report)
    if as_json:
        print_json(
            {
                "encoder": str(result.encoder),
                "attack": str(result.attack),
                "reached_cosine": result.reached,
                "kept_cosine": result.kept,
            }
        )
    else:
        typer.echo(f"{result.encoder}: backdoored; trigger and reference in {result.attack}")
        typer.echo(
            f"triggered images resemble the reference {result.reached:.3f}, "
            f"clean images their old features {result.kept:.3f} (cosine)"
        )
