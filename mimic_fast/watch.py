"""While process 0 works alone the others wait for it, and a signal to any of them reaches it.

The wait is a collective that process 0 joins whenever it polls, a few times a second. It costs no
CPU, and it ends with the work however that ends: done, failed or stopped.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from mimic_fast.distributed import SINGLE, Processes
from mimic_fast.errors import MimicError, StoppedError

Result = TypeVar("Result")

_EVERY = 0.2  # seconds between two exchanges
_ERRORS = {kind.exit_code: kind for kind in MimicError.__subclasses__()}


def running_processes() -> Processes:
    """Where this process stands in the process group that is up; alone if there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return SINGLE
    # Flags go over gloo where it is there: waiting for NCCL would keep a core and a GPU busy.
    on_cpu = "gloo" in dist.get_backend_config()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    return Processes(rank=dist.get_rank(), world=dist.get_world_size(), device=device)


def process_0_alone(
    work: Callable[[Callable[[], bool]], Result],
    *,
    processes: Processes,
    stop: Callable[[], bool] = lambda: False,
) -> Result | None:
    """Calls ``work`` on process 0 while the others wait; all of them call this.

    Args:
        work: Gets a ``stop`` of its own to poll: true once any process was asked to stop.
        processes: All that wait.
        stop: Whether this process was asked to stop.

    Returns:
        What ``work`` returned; None on the processes that waited.

    Raises:
        MimicError: Where process 0 failed, on the others: of the same exit code.
        RuntimeError: If another process is gone.
    """
    if processes.world == 1:
        return work(stop)
    watch = _Watch(processes, stop)
    if not processes.is_main:
        watch.wait()
        return None
    code = MimicError.exit_code
    try:
        result = work(watch.stopped)
        code = 0
    except MimicError as error:
        code = error.exit_code
        raise
    finally:
        watch.end(code)
    return result


def leave_if(stop: Callable[[], bool]) -> None:
    """Leaves work that keeps no state of its own.

    Raises:
        StoppedError: If ``stop`` tells so.
    """
    if stop():
        raise StoppedError("stopped by a signal while evaluating; continue with --resume auto")


class _Watch:
    """The flags that all processes exchange: asked to stop, process 0 has ended, its exit code."""

    def __init__(self, processes: Processes, stop: Callable[[], bool]) -> None:
        self._device, self._stop = processes.device, stop
        self._stopped = self._lost = False
        self._next = 0.0

    def stopped(self) -> bool:
        """For process 0 to poll."""
        if not self._stopped and time.monotonic() >= self._next:
            self._stopped, _, _ = self._exchange()
            self._next = time.monotonic() + _EVERY
        return self._stopped

    def end(self, code: int) -> None:
        """Tells the others how process 0 has ended."""
        if self._lost:
            return
        try:
            self._exchange(ended=True, code=code)
        except RuntimeError:
            if code == 0:  # else the error that process 0 leaves with says more
                raise

    def wait(self) -> None:
        """For the other processes: returns when process 0 is done."""
        ended, code = False, 0
        while not ended:
            _, ended, code = self._exchange()
        if code == StoppedError.exit_code:
            raise StoppedError("stopped by a signal to the run; continue with --resume auto")
        if code:
            raise _ERRORS.get(code, MimicError)("process 0 failed; its own message says why")

    def _exchange(self, *, ended: bool = False, code: int = 0) -> tuple[bool, bool, int]:
        flags = torch.tensor([int(self._stop()), int(ended), code], device=self._device)
        try:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            stopped, over, result = flags.tolist()
        except RuntimeError:
            self._lost = True
            raise
        return bool(stopped), bool(over), result
