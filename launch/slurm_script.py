"""The Slurm job script: values checked and quoted, text from ``slurm/purify.sbatch.j2``."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mimic_fast.errors import UsageError

_TEMPLATES = Path(__file__).parent / "slurm"
# What sbatch's manual allows, in minutes, hours:minutes:seconds or days-hours:minutes:seconds.
_MINUTES = re.compile(r"(\d+)(?::(\d+))?", re.ASCII)
_HOURS = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_DIRECTIVE = re.compile(r"[\w.,:@%/+=\[\]()|&*-]+", re.ASCII)
_EARLY = 60  # seconds by which Slurm may send the signal too soon


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """One job.

    Args:
        nodes: Machines.
        tasks: Processes per machine.
        gpus: GPUs per machine; 0: none.
        cpus: Cores per process.
        time: Time limit as sbatch takes it.
        signal_before: Seconds before the limit at which the processes are told to save.
        command: Words of the command, in groups that share a line.
        partition: Queue; None: the cluster's default.
        account: Who pays; None: the user's default.
        env: Shell lines that run first, such as ``module load cuda``.
        sbatch: More options of sbatch.
        srun: More options of srun.
    """

    nodes: int
    tasks: int
    gpus: int
    cpus: int
    time: str
    signal_before: int
    command: Sequence[Sequence[str]]
    partition: str | None = None
    account: str | None = None
    env: Sequence[str] = ()
    sbatch: Sequence[str] = ()
    srun: Sequence[str] = ()


def job_script(job: SlurmJob) -> str:
    """The script's text.

    Raises:
        UsageError: If a value cannot stand in a script.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    _check(job)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=False,  # shell, not HTML: quoted below
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    quoted = {
        "command": [shlex.join(words) for words in job.command],
        "srun": [shlex.quote(option) for option in job.srun],
    }
    plain = {name: getattr(job, name) for name in SlurmJob.__slots__ if name not in quoted}
    return environment.get_template("purify.sbatch.j2").render(job=plain | quoted)


def limit_seconds(time: str) -> int:
    """Seconds of a time limit in one of sbatch's forms.

    Raises:
        UsageError: If it has none of them.
    """
    if match := _MINUTES.fullmatch(time):
        minutes, seconds = (int(part or 0) for part in match.groups())
        return 60 * minutes + seconds
    match = _HOURS.fullmatch(time)
    if match is None:
        raise UsageError(
            f"--time must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, "
            f"got {time!r}"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 86400 * days + 3600 * hours + 60 * minutes + seconds


def _check(job: SlurmJob) -> None:
    """Directives have no quoting that every Slurm reads alike: only plain values pass."""
    directives = {"--partition": job.partition, "--account": job.account}
    for name, value in directives.items():
        if value is not None and not _DIRECTIVE.fullmatch(value):
            raise UsageError(f"{name} takes letters, digits and .,:@%/+=-_, got {value!r}")
    for option in job.sbatch:
        if not (option.startswith("-") and _DIRECTIVE.fullmatch(option)):
            raise UsageError(f"--sbatch takes one option such as '--qos=high', got {option!r}")
    for option in job.srun:
        if not option.startswith("-"):
            raise UsageError(f"--srun takes one option such as '--label', got {option!r}")
    for line in job.env:
        if not line.strip() or "\n" in line:
            raise UsageError(f"--env takes one shell line, repeat it for more; got {line!r}")
    least = job.signal_before + 2 * _EARLY
    if limit_seconds(job.time) < least:
        raise UsageError(
            f"--time {job.time} leaves no time to work before the signal: it must be at least "
            f"{least} s, {2 * _EARLY} s more than --signal-before"
        )
