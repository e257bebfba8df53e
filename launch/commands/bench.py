"""``mimic-fast bench loss|mi``: which implementation the ops pick here, why, and what it takes."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from mimic_fast.errors import UsageError
from mimic_fast.launch.arguments import Device, Json, print_json

if TYPE_CHECKING:
    import torch

    from mimic_fast.launch.bench_ops import Call, Measured, Op

app = typer.Typer(help="Show which implementation of an op is picked, why, and how fast it is.")


class ForcedPath(StrEnum):
    """Implementations; those of ``ops.PATHS``, which is not imported for ``--help``."""

    REFERENCE = "reference"
    COMPILED = "compiled"
    TRITON = "triton"
    CPP = "cpp"


class Type(StrEnum):
    """Of activations."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


Force = Annotated[
    ForcedPath | None, typer.Option("--force-op", help="Time this implementation alone.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Time torch.compile too; it takes a minute to start.")
]


@app.command()
def loss(
    force_op: Force = None,
    dtype: Annotated[
        Type | None, typer.Option("--dtype", help="float32 on CPU, bfloat16 on a GPU by default.")
    ] = None,
    device: Device = None,
    compile: Compile = False,
    as_json: Json = False,
) -> None:
    """Attention and clone loss of one layer, forward and backward."""
    import torch

    from mimic_fast.launch.bench_ops import loss_work

    place = _device(device)
    name = dtype or (Type.FLOAT32 if place.type == "cpu" else Type.BFLOAT16)
    kind = getattr(torch, name)
    work = loss_work(place, kind)
    _run("distill", work, place, kind, compile=compile, only=force_op, as_json=as_json)


@app.command()
def mi(force_op: Force = None, device: Device = None, as_json: Json = False) -> None:
    """Mutual information of pairs of directions, from bin codes."""
    import torch

    from mimic_fast.launch.bench_ops import information_work

    place = _device(device)
    work = information_work(place)
    _run("histogram", work, place, torch.uint8, compile=False, only=force_op, as_json=as_json)


def _device(name: str | None) -> "torch.device":
    import torch

    if name not in (None, "auto", "cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is 'cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def _run(
    op: "Op",
    work: "Mapping[str, Call]",
    device: "torch.device",
    dtype: "torch.dtype",
    *,
    compile: bool,
    only: ForcedPath | None,
    as_json: bool,
) -> None:
    import torch

    from mimic_fast import ops
    from mimic_fast.launch.bench_ops import measured
    from mimic_fast.launch.memory import keep_freed_memory

    keep_freed_memory()
    path: ops.Path | None = next((path for path in ops.PATHS if path == only), None)
    with ops.force(path):
        choice = ops.choose(op, device, dtype)
    rows = measured(op, work, device=device, dtype=dtype, compile=compile, only=path)
    where = torch.cuda.get_device_name() if device.type == "cuda" else _cpu()
    if as_json:
        print_json(
            {
                "op": op,
                "device": where,
                "dtype": str(dtype).removeprefix("torch."),
                "picked": {"path": choice.path, "reason": choice.reason},
                "rows": [
                    {name: getattr(row, name) for name in ("work", "path", "seconds", "reason")}
                    for row in rows
                ],
            }
        )
    else:
        _print_rows(rows, choice.path, f"{where}, {str(dtype).removeprefix('torch.')}")
        typer.echo(f"picked: {choice.path} ({choice.reason})")


def _cpu() -> str:
    import torch

    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _print_rows(rows: "Sequence[Measured]", picked: str, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("work", "implementation"):
        table.add_column(column)
    for column in ("ms", "x reference"):
        table.add_column(column, justify="right")
    slow = {row.work: row.seconds for row in rows if row.path == "reference"}
    last = ""
    for row in rows:
        if row.seconds is None:
            continue
        base = slow.get(row.work)
        table.add_row(
            row.work if row.work != last else "",
            row.path,
            f"{1000 * row.seconds:.2f}",
            f"{base / row.seconds:.1f}" if base else "",
            style="bold" if row.path == picked else None,
        )
        last = row.work
    Console().print(table)
    for path, reason in {row.path: row.reason for row in rows if row.reason}.items():
        typer.echo(f"{path}: {reason}")
