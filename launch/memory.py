"""Keeps freed memory in the process, so that CPU training does not fault pages in every step.

glibc gives large blocks back to the system as soon as they are freed; a step's activations then
cost tens of thousands of page faults, a third of the CPU time of a small ResNet's step. The price
is a process that stays as large as it once was.
"""

import ctypes
import platform
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_TOP_PAD = 64 * 2**20  # bytes asked for at a time


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep what is freed; returns whether it agreed (Linux only)."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _TOP_PAD))
    agreed = [mallopt(option, value) == 1 for option, value in wanted]
    return all(agreed)
