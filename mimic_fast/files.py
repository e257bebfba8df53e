"""Files that are either whole or absent: temporary name, fsync, rename."""

import errno
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mimic_fast.errors import MachineError

_MACHINE_ERRNO = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,  # a limit on the size of one file
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,  # a folder that cannot be made (/proc), or that somebody removes meanwhile
    errno.EIO,
}


def write_atomic(path: Path, data: bytes) -> None:
    """Writes ``data`` so that ``path`` holds either its old content or all of the new.

    Raises:
        MachineError: If the directory cannot be written or the disk is full.
    """
    with machine_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Makes renames inside ``path`` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """Turns the system's write errors into :class:`MachineError` that names the path.

    Raises:
        MachineError: If the block fails for want of space or permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _MACHINE_ERRNO or isinstance(error, NotADirectoryError | FileExistsError):
            raise MachineError(
                f"cannot write {path}: {error.strerror}; free space or choose a writable --out"
            ) from None
        raise


def user_cache() -> Path:
    """The folder of this user in which fetched data and built kernels are kept."""
    home = Path.home()
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mimic_fast"
