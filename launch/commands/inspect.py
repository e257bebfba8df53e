"""``mimic-fast inspect FILE``: what a checkpoint holds; nothing in it is executed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mimic_fast.launch.arguments import Json, Overrides, print_json


def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint: safetensors or PyTorch.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds: format, architecture, keys, taps, digest; executes nothing."""
    from mimic_fast.encoders.inspect import inspect_checkpoint
    from mimic_fast.recipe import load_settings

    facts = inspect_checkpoint(file, load_settings(overrides=overrides or ()).encoder)
    if as_json:
        print_json(facts)
    else:
        _print_facts(facts)


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _text(value))
    console.print(table)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], dict):
            return "\n".join(", ".join(f"{k} {_text(v)}" for k, v in row.items()) for row in value)
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
