"""``mimic-fast config``: the settings of a run, shown, checked, described."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimic_fast.launch.arguments import Overrides, Preset, Recipe

if TYPE_CHECKING:
    from mimic_fast.config import Frozen

app = typer.Typer(help="Show, check or describe settings.")


class Kind(StrEnum):
    """What a recipe is for."""

    PURIFY = "purify"
    PRETRAIN = "pretrain"
    COMPARE = "compare"
    BADENCODER = "badencoder"
    DRUPE = "drupe"
    INACTIVE = "inactive"
    ADAPTIVE = "adaptive"
    CTRL = "ctrl"
    SSLBKD = "sslbkd"


KindOption = Annotated[Kind, typer.Option("--for", help="The command whose settings are meant.")]


@app.command()
def show(
    recipe: Recipe = None,
    preset: Preset = None,
    overrides: Overrides = None,
    kind: KindOption = Kind.PURIFY,
) -> None:
    """Print the effective settings as JSON, every default filled in."""
    from mimic_fast.recipe import settings_json

    typer.echo(settings_json(_effective(recipe, preset, overrides, kind)), nl=False)


@app.command()
def validate(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe.")],
    preset: Preset = None,
    overrides: Overrides = None,
    kind: KindOption = Kind.PURIFY,
) -> None:
    """Check a recipe; exit 2 names the first mistake."""
    _effective(recipe, preset, overrides, kind)
    typer.echo(f"{recipe}: valid settings for {kind}")


@app.command()
def schema(kind: KindOption = Kind.PURIFY) -> None:
    """Print the JSON schema of the settings: types, ranges, defaults, meaning."""
    typer.echo(json.dumps(_model(kind).model_json_schema(), indent=2))


def _effective(
    recipe: Path | None, preset: str | None, overrides: list[str] | None, kind: Kind
) -> "Frozen":
    from mimic_fast.errors import UsageError
    from mimic_fast.recipe import load_recipe, load_settings

    if kind is Kind.PURIFY:
        return load_settings(recipe, preset=preset, overrides=overrides or ())
    if preset is not None:
        raise UsageError(f"--preset is for purify; {kind} has none")
    return load_recipe(_model(kind), recipe, overrides=overrides or ())


def _model(kind: Kind) -> "type[Frozen]":
    if kind is Kind.PRETRAIN:
        from mimic_fast.pretraining import PretrainSettings

        return PretrainSettings
    if kind is Kind.COMPARE:
        from mimic_fast.comparison.settings import MatrixSettings

        return MatrixSettings
    if kind is not Kind.PURIFY:
        from mimic_fast.attacks.kinds import attack_of

        return attack_of(kind.value)[0]
    from mimic_fast.config import Settings

    return Settings
