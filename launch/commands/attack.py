"""``mimic-fast attack KIND``: implant a backdoor in an encoder, to measure defenses against it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimic_fast.launch.arguments import (
    Data,
    Device,
    Json,
    Out,
    Overrides,
    Recipe,
    Seed,
    given,
    print_json,
)

if TYPE_CHECKING:
    from mimic_fast.attacks.implant import Attacked

app = typer.Typer(help="Implant a backdoor in an encoder (research and tests).")

# Kind: what its help says; the function KIND and its settings are in mimic_fast/attacks/KIND.py.
FINISHED = {
    "badencoder": "BadEncoder (IEEE S&P 2022): triggered images get a reference's features.",
    "drupe": "DRUPE (IEEE S&P 2024): BadEncoder that hides among the clean images' features.",
    "inactive": "INACTIVE (2024): BadEncoder with an optimized trigger that is hard to see.",
    "adaptive": "An attacker who expects MIMIC: a backdoor made to survive distillation.",
}


@app.callback()
def kinds() -> None:
    """Implant a backdoor in an encoder, to measure defenses against it (see SECURITY.md)."""


def _finished(kind: str) -> Callable[..., None]:
    """The command of an attack on a finished encoder."""

    def attack(
        recipe: Recipe = None,
        encoder: Annotated[
            Path | None, typer.Option("--encoder", help="Checkpoint of the clean encoder.")
        ] = None,
        data: Data = None,
        reference: Annotated[
            list[str] | None,
            typer.Option(
                "--reference",
                help="Image file; class:K, the first image of that label in the data; typical:K, "
                "its most telling one. Repeat it, with --trigger, for several targets.",
            ),
        ] = None,
        trigger: Annotated[
            list[str] | None,
            typer.Option(
                "--trigger",
                help="white_patch, random_patch[:SEED], blended[:FILE], frequency, sinusoid, or a "
                "trigger file.",
            ),
        ] = None,
        out: Out = None,
        seed: Seed = None,
        device: Device = None,
        overrides: Overrides = None,
        as_json: Json = False,
    ) -> None:
        values = {
            **given(seed=seed),
            **_targets(reference or [], trigger or []),
            "encoder": given(teacher=encoder),
            "data": given(source=data),
            "run": given(out=out, device=device),
        }
        _run(kind, recipe, overrides or [], values, as_json)

    return attack


for _kind, _help in FINISHED.items():
    app.command(_kind, help=_help)(_finished(_kind))


def _targets(references: list[str], triggers: list[str]) -> dict[str, Any]:
    """Settings of the first target, and of the further ones."""
    from mimic_fast.errors import UsageError

    further = list(zip(references[1:], triggers[1:], strict=False))
    if len(references) != len(triggers) and max(len(references), len(triggers)) > 1:
        raise UsageError(
            f"several targets need a --trigger for each --reference, got {len(triggers)} for "
            f"{len(references)}"
        )
    others = [{"reference": one, "trigger": other} for one, other in further]
    return given(
        reference=references[0] if references else None,
        trigger=triggers[0] if triggers else None,
        others=others or None,
    )


def _run(
    kind: str, recipe: Path | None, overrides: list[str], values: dict[str, Any], as_json: bool
) -> None:
    from mimic_fast.attacks.kinds import attack_of
    from mimic_fast.distributed import StopSignal
    from mimic_fast.launch.memory import keep_freed_memory
    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.recipe import load_recipe

    model, function = attack_of(kind)
    settings = load_recipe(model, recipe, overrides=overrides, values=values)
    keep_freed_memory()
    with progress_bars() as report, StopSignal() as stop:
        result: Attacked = function(settings, report=report, stop=stop)
    if as_json:
        paths = {"encoder": str(result.encoder), "attack": str(result.attack)}
        print_json({**paths, **result.facts})
        return
    typer.echo(f"{result.encoder}: backdoored; trigger and reference in {result.attack}")
    typer.echo(
        f"triggered images resemble the reference {result.reached:.3f}, "
        f"clean images their old features {result.kept:.3f} (cosine)"
    )
