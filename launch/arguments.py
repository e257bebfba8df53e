"""Options that several commands share, and what becomes of them.

``None`` means "not given", so that the recipe's value stands.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mimic_fast.errors import UsageError

Recipe = Annotated[
    Path | None, typer.Argument(help="TOML recipe.", metavar="RECIPE.toml", show_default=False)
]
Teacher = Annotated[
    Path | None, typer.Option("--teacher", help="Checkpoint of the suspect encoder.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Clean images: a folder, .tar shards or 'fashion-mnist:train'."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory.")]
Preset = Annotated[
    str | None, typer.Option("--preset", help="hardened (default), mimic or official.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seeds everything.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting; repeatable."),
]
Resume = Annotated[
    str | None, typer.Option("--resume", help="auto: go on from the newest good state; or never.")
]
AllowBudget = Annotated[
    bool | None,
    typer.Option("--allow-budget", help="Permit more images than data.budget, 5 % by default."),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
ForceOp = Annotated[
    str | None,
    typer.Option(
        "--force-op",
        metavar="PATH",
        help="Run losses and histograms on reference, compiled, triton or cpp, not the fastest.",
    ),
]
Downstream = Annotated[
    list[str] | None,
    typer.Option(
        "--downstream",
        metavar="NAME=DIR",
        help="Labeled set to measure on: DIR with train/ and test/, train-*.tar and test-*.tar, "
        "or 'fashion-mnist'; repeatable.",
    ),
]
AttackFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--attack",
        help="attack.json (trigger, reference, targets), or its folder with all targets of the "
        "encoder; repeatable.",
    ),
]
StudentOnly = Annotated[
    bool | None,
    typer.Option(
        "--student-only", help="Also train and measure a student on the clean images alone."
    ),
]
CleanEncoder = Annotated[
    Path | None, typer.Option("--clean", help="A clean encoder to measure beside, if there is one.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def given(**values: object) -> dict[str, Any]:
    """The values that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def downstream_values(items: Sequence[str] | None) -> list[dict[str, str]] | None:
    """``NAME=DIR`` options as values of ``evaluation.downstream``; None if there are none.

    Raises:
        UsageError: If one is not of that form.
    """
    if not items:
        return None
    return [
        {"name": name, "train": split_source(root, "train"), "test": split_source(root, "test")}
        for name, root in (named(item, "--downstream") for item in items)
    ]


def attack_values(items: Sequence[Path] | None) -> Path | tuple[Path, ...] | None:
    """``--attack`` options as the value of ``evaluation.attack``; None if there are none."""
    if not items:
        return None
    return items[0] if len(items) == 1 else tuple(items)


def split_source(root: str, split: str) -> str:
    """The data source of one part of a labeled set: a folder, shards, or the built-in set's."""
    folder = Path(root).expanduser()
    if not folder.exists():
        return f"{root}:{split}"
    return str(folder / split if (folder / split).is_dir() else folder / f"{split}-*.tar")


def named(item: str, option: str) -> tuple[str, str]:
    """Splits ``NAME=VALUE``.

    Raises:
        UsageError: If it is not of that form.
    """
    name, equals, value = item.partition("=")
    if not (name and equals and value):
        raise UsageError(f"{option} takes NAME=PATH, got {item!r}")
    return name, value


def launched_processes() -> int:
    """How many processes the launcher (torchrun, srun with its variables) started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process may talk to the user."""
    return int(os.environ.get("RANK", "0")) == 0


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, indent=2))
