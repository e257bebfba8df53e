"""Errors that carry the documented exit code of the command line.

Library code raises them; only ``launch/`` turns them into a process exit. Every message is one
line: what was expected, what came, what to do.
"""


class MimicError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UsageError(MimicError, ValueError):
    """Settings, paths, architectures or budgets that the caller can correct (exit 2)."""

    exit_code = 2


class SelfTestError(MimicError, RuntimeError):
    """A start-up check failed: the recipe cannot run as written (exit 3)."""

    exit_code = 3


class UnsafeInputError(MimicError, RuntimeError):
    """An input that is unsafe, corrupt or tampered with (exit 4)."""

    exit_code = 4


class DivergedError(MimicError, RuntimeError):
    """Training produced non-finite values too many times in a row (exit 5)."""

    exit_code = 5


class StoppedError(MimicError, RuntimeError):
    """Stopped by a signal with the state saved; go on with ``--resume auto`` (exit 6)."""

    exit_code = 6


class MachineError(MimicError, RuntimeError):
    """The machine, not the input: disk full, not writable, out of memory (exit 7)."""

    exit_code = 7


class NothingSavedError(MimicError, RuntimeError):
    """Stopped by a signal where no state is kept: start again (exit 130, as shells report it)."""

    exit_code = 130
