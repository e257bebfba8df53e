"""Memory that a call takes at its height, as the system sees it: also what C++ code allocates."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path


def peak_growth(call: Callable[[], object]) -> int | None:
    """Bytes by which resident memory grows at most while ``call`` runs; None if not on Linux.

    Freed memory is handed back to the system first, so that taking it again is seen. Call it once
    with small arguments before: loading code is no memory of the algorithm.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if sys.platform != "linux" or trim is None:
        return None
    trim(0)
    reset.write_text("5")  # the high-water mark is set to what is resident now
    before = _status("VmRSS")
    result = call()
    grown = _status("VmHWM") - before
    del result
    return grown


def _status(key: str) -> int:
    """A figure of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
