"""Progress bars from :class:`mimic_fast.progress.Event`: rate, time left, numbers of the moment.

On a terminal, phases longer than two seconds get a bar. Elsewhere only the messages are printed,
and ranks above 0 say nothing. All of it goes to stderr.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import typer

from mimic_fast.launch.arguments import is_main_process
from mimic_fast.launch.tables import printable
from mimic_fast.progress import Event, Reporter, silent

if TYPE_CHECKING:
    from rich.progress import Progress, Task, TaskID

SHOW_AFTER = 2.0  # seconds
_BAR = 16  # columns
_TIME_LEFT = 8  # columns, up to 99:59:59
_FIRST = ("loss", "data_wait", "lr", "images_per_second_per_process", "teacher_ms", "student_ms")


@contextmanager
def progress_bars(
    *, stream: IO[str] | None = None, after: float = SHOW_AFTER
) -> Iterator[Reporter]:
    """Gives a reporter that draws on ``stream`` (stderr) while the block runs.

    Args:
        stream: Where to draw; bars only if it is a terminal.
        after: Seconds a phase must last before its bar is shown.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None or not is_main_process():
        yield silent
    elif not stream.isatty():
        yield (
            lambda event: (
                typer.echo(printable(event.message), file=stream) if event.message else None
            )
        )
    else:
        with _columns(stream) as progress:
            yield _drawn_on(progress, after)


def _columns(stream: IO[str]) -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=_BAR),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[metrics]}", style="dim"),
        console=Console(file=stream, force_terminal=True),
        speed_estimate_period=60,
    )


def _drawn_on(progress: "Progress", after: float) -> Reporter:
    tasks: dict[str, TaskID] = {}
    began: dict[str, tuple[float, int]] = {}

    def report(event: Event) -> None:
        if event.message:
            progress.console.print(printable(event.message), markup=False, highlight=False)
        if not event.total:
            return
        now = time.monotonic()
        task = tasks.get(event.phase)
        if task is None or event.done < progress.tasks[progress.task_ids.index(task)].completed:
            if task is not None:  # the same phase once more, e.g. for another data set
                progress.remove_task(task)
            task = tasks[event.phase] = progress.add_task(
                event.phase, total=event.total, visible=False, rate="", metrics=""
            )
            began[event.phase] = now, event.done
        start, first = began[event.phase]
        progress.update(
            task,
            completed=event.done,
            total=event.total,
            visible=now - start >= after,
            rate=_rate(event, event.done - first, now - start),
        )
        shown = [other for other in progress.tasks if other.visible]
        progress.update(
            task, metrics=_metrics(event, room=progress.console.width - _columns_taken(shown))
        )

    return report


def _columns_taken(tasks: "Sequence[Task]") -> int:
    """Width of all but the metrics: every column is as wide as its widest line, and a space."""
    described = max((len(task.description) for task in tasks), default=0)
    counted = max((2 * len(str(task.total)) + 1 for task in tasks), default=0)
    rated = max((len(task.fields["rate"]) for task in tasks), default=0)
    return max(described, 10) + _BAR + counted + rated + _TIME_LEFT + 5


def _rate(event: Event, units: int, seconds: float) -> str:
    """Images a second where the event knows, else units a second since the phase began."""
    rate = event.metrics.get("images_per_second")
    if rate is not None:
        return f"{_short(rate)} images/s"
    return f"{units / seconds:.1f} {event.unit}/s" if seconds > 0 else ""


def _metrics(event: Event, *, room: int) -> str:
    """As many metrics as fit, those first that tell most of a run's health."""
    known = event.metrics
    text = ""
    for name in (*_FIRST, *(name for name in known if name not in _FIRST)):
        if name not in known or name == "images_per_second":
            continue
        longer = f"{text} {_metric(name, known[name])}".strip()
        if len(longer) <= room:
            text = longer
    return text


def _metric(name: str, value: float) -> str:
    """A number with its name; of what took no time, nothing."""
    if name == "data_wait":
        return f"wait {value:.0%}"
    if name == "images_per_second_per_process":
        return f"{_short(value)}/s each"
    if name.endswith("_ms"):
        return f"{name.removesuffix('_ms')} {_short(value)} ms" if value else ""
    return f"{name} {value:.3g}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
