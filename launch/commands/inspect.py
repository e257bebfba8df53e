"""``mimic-fast inspect FILE``: what a checkpoint holds; nothing in it is executed."""

from pathlib import Path
from typing import Annotated

import typer

from mimic_fast.launch.arguments import Json, Overrides, print_json


def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint: safetensors or PyTorch.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds: format, architecture, keys, taps, digest; executes nothing."""
    from mimic_fast.encoders.inspect import inspect_checkpoint
    from mimic_fast.launch.tables import print_checkpoint
    from mimic_fast.recipe import load_settings

    facts = inspect_checkpoint(file, load_settings(overrides=overrides or ()).encoder)
    if as_json:
        print_json(facts)
    else:
        print_checkpoint(facts)
