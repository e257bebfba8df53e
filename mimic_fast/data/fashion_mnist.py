"""Fashion-MNIST, the built-in labeled data set: fetched once, digests checked at every opening.

Han Xiao, Kashif Rasul, Roland Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking
Machine Learning Algorithms", arXiv:1708.07747, MIT license. 60,000 + 10,000 gray images of 28 x 28
pixels in 10 classes.
"""

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mimic_fast.data.fashion_mnist_ways import (
    DEBIAN_FOLDER,
    DEBIAN_PACKAGE,
    FetchError,
    RefusedError,
    from_apt,
    from_folder,
    from_mirrors,
)
from mimic_fast.data.items import CorruptItemError, Source
from mimic_fast.errors import MachineError, MimicError, UnsafeInputError, UsageError
from mimic_fast.files import sha256_file, user_cache, write_atomic
from mimic_fast.progress import Event, Reporter, silent

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# Of the decompressed files, since the archives differ by where they come from. Debian's lack name
# and time in the gzip header; with these put back (2017-08-31 10:50) each has the MD5 that
# torchvision publishes, so the content is the authors'.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

_SIZE = 28
_STALE_SECONDS = 3600
_IMAGE_HEADER, _LABEL_HEADER = 16, 8  # idx files: magic and dimensions, then bytes


def open_fashion_mnist(
    split: Literal["train", "test"], *, cache: Path | None = None, report: Reporter = silent
) -> Source:
    """Opens one part of Fashion-MNIST, fetching it first if need be.

    The bytes of an item are its 784 pixels.

    Raises:
        UsageError: If it cannot be fetched; the message says how to install it by hand.
        UnsafeInputError: If all that can be fetched is something else.
        MachineError: If the cache cannot be written.
    """
    files = fetch_fashion_mnist(cache=cache, report=report)
    stem = "train" if split == "train" else "t10k"
    pixels = np.memmap(files[f"{stem}-images-idx3-ubyte"], dtype=np.uint8, mode="r")
    labels = files[f"{stem}-labels-idx1-ubyte"].read_bytes()[_LABEL_HEADER:]
    area = _SIZE * _SIZE
    return Source(
        name=f"fashion-mnist:{split}",
        keys=tuple(f"{split}/{index:05d}" for index in range(len(labels))),
        labels=tuple(labels),
        classes=CLASSES,
        read=lambda index: pixels[_IMAGE_HEADER + index * area :][:area].tobytes(),
        decode=_decode,
        encoded=False,
    )


def fetch_fashion_mnist(
    *,
    cache: Path | None = None,
    installed: Path = DEBIAN_FOLDER,
    mirrors: Sequence[str] | None = None,
    report: Reporter = silent,
) -> dict[str, Path]:
    """The four decompressed files of Fashion-MNIST in the user's cache, fetched on the first call.

    Tried in this order: archives put into the cache folder by hand, the installed Debian package,
    the mirrors, and apt-get without root, its state and cache inside our cache folder. Whatever the
    way, content whose SHA-256 is not the recorded one is refused. Processes that fetch at the same
    time wait for the first.

    Args:
        cache: Cache folder; None: :func:`user_cache`.
        installed: Folder of the Debian package.
        mirrors: Addresses of folders with the four .gz files; None: torchvision's.
        report: Told which way was taken.

    Returns:
        File name (without .gz) to path.

    Raises:
        UsageError: If every way fails; the message says what to do.
        UnsafeInputError: If every way fails, and one because its files were not the recorded ones.
        MachineError: If the cache cannot be written.
    """
    folder = (user_cache() if cache is None else cache) / "fashion-mnist"
    files = {name: folder / name for name in SHA256}
    if _intact(files):
        return files
    with _cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            if not _intact(files):
                _remove_stale(folder)
                for name, data in _fetch(folder, installed, mirrors, report).items():
                    write_atomic(files[name], data)
    return files


def _fetch(
    folder: Path, installed: Path, mirrors: Sequence[str] | None, report: Reporter
) -> dict[str, bytes]:
    ways = (
        ("cache", lambda: from_folder(folder, tuple(SHA256))),
        ("installed package", lambda: from_folder(installed, tuple(SHA256))),
        ("download", lambda: from_mirrors(mirrors, tuple(SHA256), report)),
        ("apt-get", lambda: from_apt(folder, tuple(SHA256), report)),
    )
    reasons: list[str] = []
    kind: type[MimicError] = UsageError
    for name, way in ways:
        try:
            contents = way()
            _check(contents)
        except FetchError as error:
            reasons.append(f"{name}: {error}")
            kind = UnsafeInputError if isinstance(error, RefusedError) else kind
            continue
        report(Event(phase="fetch", message=f"Fashion-MNIST fetched ({name}) into {folder}"))
        return contents
    raise kind(
        f"Fashion-MNIST cannot be fetched ({'; '.join(reasons)}); "
        f"install the Debian package {DEBIAN_PACKAGE}, or copy "
        f"{', '.join(f'{name}.gz' for name in SHA256)} into {folder}"
    )


def _check(contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        digest = hashlib.sha256(data).hexdigest()
        if digest != SHA256[name]:
            raise RefusedError(f"{name} has SHA-256 {digest[:12]}, expected {SHA256[name][:12]}")


def _intact(files: dict[str, Path]) -> bool:
    try:
        return all(sha256_file(path) == SHA256[name] for name, path in files.items())
    except OSError:
        return False


def _remove_stale(folder: Path) -> None:
    """Removes what killed processes left; what is young may be in use where there are no locks."""
    for path in folder.glob(".*-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _decode(data: bytes) -> UInt8[Tensor, "1 28 28"]:
    if len(data) != _SIZE * _SIZE:
        raise CorruptItemError(f"holds {len(data)} bytes, expected {_SIZE * _SIZE}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(1, _SIZE, _SIZE)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes; where there is none, work is done twice but never wrongly."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with path.open("ab") as file:
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except MachineError as error:
        reason = str(error).partition(";")[0]
    except OSError as error:
        reason = f"cannot write {error.filename or folder}: {error.strerror}"
    else:
        return
    raise MachineError(f"{reason}; free space or make the cache folder {folder} writable")
