"""The squares of a clean set, decoded once: in memory, or in one file that processes share.

A file is named after what decides its content and holds a NumPy array, mapped and not read: eight
processes of a machine keep one copy. The first that needs it makes it, under a lock.
"""

import fcntl
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mimic_fast.data.images import load_images, square_side
from mimic_fast.data.items import Source
from mimic_fast.data.manifest import CleanItem, items_digest
from mimic_fast.data.stored import StoredFiles
from mimic_fast.errors import UnsafeInputError
from mimic_fast.files import fsync_directory, machine_errors, sha256_file, user_cache
from mimic_fast.progress import Event, Reporter, silent

_FORM = 1  # changes when the same files would give other pixels
_TOGETHER = 1024
_SMALL = 2**31  # bytes that one process keeps for itself


def load_squares(
    files: StoredFiles,
    *,
    image_size: int,
    channels: int,
    cache: Literal["auto", "memory", "disk"] = "memory",
    cache_dir: Path | None = None,
    world: int = 1,
    report: Reporter = silent,
) -> UInt8[Tensor, "image channel side side"]:
    """Decodes all files to squares; sizes and channels as in ``images.load_images``.

    Args:
        files: The clean set's files.
        image_size: Input size of the encoder, pixels.
        channels: 1 or 3.
        cache: ``disk`` maps a file and makes it if it is not there; ``auto`` takes it for several
            processes or more than 2 GiB.
        cache_dir: Its folder; None: the user's cache.
        world: Processes of the run.
        report: Told how many images are done.

    Raises:
        UnsafeInputError: If a file is no longer what was drawn, or cannot be decoded any more.
        MachineError: If the folder cannot be written or is full.
    """
    side = square_side([(i.height, i.width) for i in files.items], image_size=image_size)
    shape = (len(files), channels, side, side)
    if cache == "auto":
        big = len(files) * channels * side * side > _SMALL
        cache = "disk" if world > 1 or big else "memory"
    if cache == "memory":
        squares = torch.empty(shape, dtype=torch.uint8)
        _decode(files, squares, report)
        return squares
    folder = user_cache() / "squares" if cache_dir is None else cache_dir
    path = folder / f"{_key(files.items, shape)}.npy"
    with machine_errors(path), _locked(folder, path.stem):
        if not _whole(path, shape):
            _make(files, shape, path, report)
    # Private to the process: nothing that writes into the tensor reaches the file.
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def _decode(files: StoredFiles, squares: Tensor, report: Reporter) -> None:
    source = Source(
        name=files.name,
        keys=tuple(item.key for item in files.items),
        labels=None,
        classes=None,
        read=files.read,
        decode=files.decode,
        encoded=files.encoded,
    )
    total, side = len(files), squares.shape[-1]
    for start in range(0, total, _TOGETHER):
        wanted = range(start, min(start + _TOGETHER, total))
        images, kept = load_images(
            source, wanted, image_size=side, channels=squares.shape[1], side=side
        )
        if len(kept) < len(wanted):
            lost = files.items[min(set(wanted) - set(kept))].key
            raise UnsafeInputError(f"{lost} of {files.name} can no longer be read")
        squares[start : wanted.stop] = images
        report(Event(phase="images", done=wanted.stop, total=total, unit="images"))


def _make(files: StoredFiles, shape: Sequence[int], path: Path, report: Reporter) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        array = np.lib.format.open_memmap(name, mode="w+", dtype=np.uint8, shape=tuple(shape))
        _decode(files, torch.from_numpy(array), report)
        array.flush()
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        digest = {"sha256": sha256_file(Path(name))}
        _sidecar(path).write_text(json.dumps(digest) + "\n")
        os.replace(name, path)
        fsync_directory(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _whole(path: Path, shape: Sequence[int]) -> bool:
    """Whether the file is there and holds what was once written."""
    if not path.exists():
        return False
    try:
        digest = json.loads(_sidecar(path).read_text())["sha256"]
        right = digest == sha256_file(path)
        found = np.load(path, mmap_mode="r", allow_pickle=False).shape if right else ()
    except (OSError, ValueError, KeyError, TypeError):
        found = ()
    if found != tuple(shape):
        warnings.warn(f"{path} is damaged and made again", stacklevel=4)
        return False
    return True


def _key(items: Sequence[CleanItem], shape: Sequence[int]) -> str:
    text = json.dumps([_FORM, items_digest(tuple(items)), *shape])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """One process of all that share the folder at a time; the lock ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
