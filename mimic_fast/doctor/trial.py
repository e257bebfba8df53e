"""Running a probe in processes of its own, beside other checks, with a hard end."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

# An error of ours or of a library as Python prints it last: its class, then what it says.
_ERROR = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Za-z_]\w*(?:Error|Exception|Warning)\w*: ?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a trial ended.

    Args:
        worked: Whether every process did what it should.
        late: Whether it was still running at its end.
        said: What the first process returned, or the error of the first that failed.
        seconds: From start to end.
    """

    worked: bool
    late: bool
    said: str
    seconds: float


class Trial:
    """Processes that each call one function of ``mimic_fast.doctor.probes``.

    Args:
        function: Its name.
        calls: Arguments of each process, as plain values.
        seconds: After which they are killed.
    """

    def __init__(
        self, function: str, calls: Sequence[tuple[object, ...]] = ((),), *, seconds: int
    ) -> None:
        self._began, self._limit = time.monotonic(), seconds
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", _program(function, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # so that what it starts ends with it
            )
            for arguments in calls
        ]

    def outcome(self) -> Outcome:
        """Waits for all of them, no longer than the limit."""
        said: list[str] = []
        errors: list[str] = []
        late = False
        try:
            for process in self._processes:
                left = self._limit - (time.monotonic() - self._began)
                try:
                    out, err = process.communicate(timeout=max(0.1, left))
                except subprocess.TimeoutExpired:
                    late = True
                    continue
                said += out.strip().splitlines()[-1:]
                if process.returncode:
                    errors.append(_reason(err, process.returncode))
        finally:
            self.end()
        seconds = time.monotonic() - self._began
        if errors or late:
            text = errors[0] if errors else f"not done after {self._limit} s"
            return Outcome(worked=False, late=late, said=text, seconds=seconds)
        return Outcome(worked=True, late=False, said=said[0] if said else "", seconds=seconds)

    def end(self) -> None:
        """Kills what still runs; nothing of it stays behind."""
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def _program(function: str, arguments: tuple[object, ...]) -> str:
    # What a library prints on stdout comes before the last line, which is the result's.
    called = ", ".join(map(repr, arguments))
    return f"from mimic_fast.doctor.probes import {function}\nprint({function}({called}))"


def _reason(stderr: str, code: int) -> str:
    """The message of the exception, without its traceback."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if errors:
        return _ERROR.sub("", errors[-1]) or errors[-1]
    return lines[-1] if lines else f"exit code {code}"
