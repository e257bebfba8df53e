"""Where the time of a training step goes: sections by the host's clock or by the device's events.

On CUDA nothing here waits for the device: an event is left on the current stream wherever a section
begins or ends, and ``read`` looks at them once the loop has synchronized anyway.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from mimic_fast.encoders.taps import Listener

SECTIONS = ("data", "teacher", "student", "loss", "backward", "communication", "optimizer")

_OUTSIDE = ""  # what a step does outside every section
Mark = TypeVar("Mark")


class StepClock:
    """Divides the time between two ``step_done`` among named sections.

    A section inside another takes its time off the outer one's: the sections of a step never add up
    to more than the step. What no section names belongs to none.

    On CUDA the device's own time is divided: ``data`` is then how long the device stood still for
    want of a batch, not how long the host looked for one while the device had work.
    """

    def __init__(self, device: torch.device) -> None:
        """``device`` is where the steps run."""
        source = _Events(device) if device.type == "cuda" else _Host()
        self._marks: _Marks[Any] = _Marks(source)

    def begin(self) -> None:
        """Starts the first step; an earlier one that was not closed is forgotten."""
        self._marks.begin()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Counts the block's time as ``name``, less the sections inside it.

        Before ``begin`` it costs nothing and counts nothing.
        """
        self._marks.enter(name)
        try:
            yield
        finally:
            self._marks.leave()

    def step_done(self) -> None:
        """Closes a step; the next one starts here."""
        self._marks.close()

    def read(self) -> list[dict[str, float]]:
        """Seconds of every step closed since the last call: ``seconds`` in all, and by section.

        On CUDA the caller has synchronized since the last ``step_done``; if not, this waits.
        """
        return self._marks.read()


def listener_timed(listener: Listener | None, clock: StepClock) -> "TimedListener | None":
    """``listener`` for the student's forward pass, its work at the taps counted as ``loss``.

    Only the network gets it; the losses are asked of ``listener`` itself.
    """
    return None if listener is None else TimedListener(listener, clock)


class TimedListener:
    """Hands every tap on, inside a section ``loss``."""

    def __init__(self, listener: Listener, clock: StepClock) -> None:
        """``listener`` does the work, ``clock`` times it."""
        self._listener, self._clock = listener, clock

    def tap(self, index: int, activation: Tensor, *, prefix: int = 0) -> Tensor:
        """What the listener makes of it."""
        with self._clock.section("loss"):
            return self._listener.tap(index, activation, prefix=prefix)


@runtime_checkable
class _Source(Protocol[Mark]):
    def mark(self) -> Mark: ...
    def wait(self, last: Mark) -> None: ...
    def seconds(self, first: Mark, second: Mark) -> float: ...
    def free(self, marks: list[Mark]) -> None: ...


class _Marks(Generic[Mark]):
    """The moments at which the innermost section changed, with what ran before each."""

    def __init__(self, source: _Source[Mark]) -> None:
        self._source = source
        self._open: list[str] = [_OUTSIDE]
        self._start: Mark | None = None
        self._passed: list[tuple[str, Mark]] = []
        self._steps: list[tuple[Mark, list[tuple[str, Mark]]]] = []

    def begin(self) -> None:
        self._passed = []
        self._start = self._source.mark()

    def enter(self, name: str) -> None:
        self._pass()
        self._open.append(name)

    def leave(self) -> None:
        self._pass()
        self._open.pop()

    def close(self) -> None:
        if self._start is None:
            raise RuntimeError("StepClock.begin() must be called before the first step")
        self._pass()
        self._steps.append((self._start, self._passed))
        self._start, self._passed = self._passed[-1][1], []

    def read(self) -> list[dict[str, float]]:
        steps, self._steps = self._steps, []
        if not steps:
            return []
        self._source.wait(steps[-1][1][-1][1])
        rows = [self._row(start, passed) for start, passed in steps]
        # The last mark is where the step in progress starts.
        marks = [mark for start, passed in steps for mark in (start, *(m for _, m in passed[:-1]))]
        self._source.free(marks)
        return rows

    def _pass(self) -> None:
        if self._start is not None:  # else nobody will read it
            self._passed.append((self._open[-1], self._source.mark()))

    def _row(self, start: Mark, passed: list[tuple[str, Mark]]) -> dict[str, float]:
        spent: dict[str, float] = {"seconds": 0.0}
        before = start
        for name, mark in passed:
            seconds = self._source.seconds(before, mark)
            spent["seconds"] += seconds
            if name != _OUTSIDE:
                spent[name] = spent.get(name, 0.0) + seconds
            before = mark
        return {name: round(seconds, 7) for name, seconds in spent.items()}


class _Host:
    """Moments of the host's clock."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self, last: float) -> None:
        pass

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def free(self, marks: list[float]) -> None:
        pass


class _Events:
    """Events on the device's current stream, used again once they have been read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._unused: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, last: torch.cuda.Event) -> None:
        last.synchronize()

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return first.elapsed_time(second) / 1000

    def free(self, marks: list[torch.cuda.Event]) -> None:
        self._unused += marks
