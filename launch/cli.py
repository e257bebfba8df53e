"""The command line: ``mimic-fast COMMAND``, also ``python -m mimic_fast COMMAND``.

Commands import what they need when they run, so that ``--help`` is instant. What goes wrong becomes
one line on stderr and the documented exit code; only a bug of ours shows a traceback (exit 1).
"""

import errno
import os
import sys
import warnings
from typing import Annotated

import typer

from mimic_fast.errors import (
    MachineError,
    MimicError,
    NothingSavedError,
    StoppedError,
    UsageError,
)
from mimic_fast.launch.arguments import launched_processes
from mimic_fast.launch.commands import attack, bench, config, data
from mimic_fast.launch.commands.aot import aot
from mimic_fast.launch.commands.compare import cell, compare
from mimic_fast.launch.commands.demo import demo
from mimic_fast.launch.commands.doctor import doctor
from mimic_fast.launch.commands.evaluate import evaluate
from mimic_fast.launch.commands.frames import frames
from mimic_fast.launch.commands.inspect import inspect
from mimic_fast.launch.commands.locate import locate
from mimic_fast.launch.commands.plan import plan
from mimic_fast.launch.commands.pretrain import pretrain
from mimic_fast.launch.commands.purify import purify
from mimic_fast.launch.commands.replay import replay
from mimic_fast.launch.commands.scan import scan
from mimic_fast.launch.commands.slurm import slurm
from mimic_fast.launch.start_up import signals_end_the_start
from mimic_fast.launch.tables import printable
from mimic_fast.version import VERSION

# What gloo says when a peer has died or does not answer; NCCL and the stores have error classes.
_LOST = ("by peer", "connection refused", "broken pipe", "timed out waiting", "connectfullmesh")

app = typer.Typer(
    help="Purify backdoored pre-trained vision encoders.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, purify, locate, evaluate, scan, compare):
    app.command()(command)
app.add_typer(attack.app, name="attack")
app.command(hidden=True)(cell)
for command in (pretrain, inspect, frames, slurm, aot):
    app.command()(command)
for command in (doctor, plan, replay):
    app.command()(command)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(config.app, name="config")

# Typer ships its own copy of Click since 0.20 and used Click's before: this name works in both.
_BadCommandLine: type[Exception] = typer.BadParameter.__mro__[1]


def _print_version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"mimic-fast {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = None,
) -> None:
    """Purify backdoored pre-trained vision encoders."""


def main() -> None:
    """Entry point of ``mimic-fast``."""
    warnings.formatwarning = _one_line
    with signals_end_the_start():
        code = run(sys.argv[1:])
    if code in (0, StoppedError.exit_code):
        _leave_process_group()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code.

    Exceptions that are bugs propagate.
    """
    try:
        code = app(arguments or ["--help"], prog_name="mimic-fast", standalone_mode=False) or 0
    except MimicError as error:
        return _failed(str(error), error.exit_code)
    except _BadCommandLine as error:
        message: str = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        return _failed(message, UsageError.exit_code)
    except (MemoryError, OSError, RuntimeError) as error:
        if _peer_is_gone(error):
            said = str(error).strip().splitlines()[0]
            message = f"another process of this run is gone ({said}); continue with --resume auto"
        elif _machine_is_at_fault(error):
            message = str(error) or "out of memory"
        else:
            raise
        return _failed(message, MachineError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = NothingSavedError.exit_code
    interrupted = code == NothingSavedError.exit_code
    return _failed("interrupted; nothing was saved", code) if interrupted else code


def _leave_process_group() -> None:
    """Takes leave of the other processes where all of them end alike.

    After an error of one process alone the others may wait in a collective, and so would this one.
    """
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _failed(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    typer.echo(f"error{where}: {printable(' '.join(message.split()))}", err=True)
    return code


def _peer_is_gone(error: BaseException) -> bool:
    """Whether the processes have lost each other, which every backend reports in its own way."""
    if "torch.distributed" not in sys.modules or launched_processes() == 1:
        return False
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _LOST)
    )


def _machine_is_at_fault(error: BaseException) -> bool:
    """Whether memory or disk ran out, which PyTorch reports in several ways."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
    text = str(error).lower()
    return (
        isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
    )


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    return f"warning: {printable(str(message))}\n"
