"""Lets a signal end a process that waits in vain for the others of its run to start.

Such a process stands in a call that no Python signal handler interrupts, for half an hour by
default, while torchrun takes another thirty seconds before it kills it. Nothing is lost by leaving.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mimic_fast.errors import StoppedError
from mimic_fast.launch.arguments import launched_processes

_PATIENCE = 5.0  # seconds for the others to come, so that all stop together
_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


@contextmanager
def signals_end_the_start() -> Iterator[None]:
    """While the block runs, a caught signal that finds no process group up ends the process."""
    if launched_processes() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(heard,), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # only caught signals come through the socket
        signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        told.close()  # the thread reads the end and leaves


def _listen(heard: socket.socket) -> None:
    with heard:
        while number := heard.recv(1):
            if number[0] not in _SIGNALS or _is_up():
                continue
            if _came_up(within=_PATIENCE):
                os.kill(os.getpid(), number[0])  # now there is somebody who saves
            else:
                os.write(2, b"error: stopped by a signal before all processes had started; ")
                os.write(2, b"continue with --resume auto\n")
                os._exit(StoppedError.exit_code)


def _came_up(*, within: float) -> bool:
    end = time.monotonic() + within
    while not _is_up():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _is_up() -> bool:
    if "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()
