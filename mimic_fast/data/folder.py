"""Image folders: every image below a folder; first-level subfolders are its classes."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mimic_fast.data.items import (
    DEFAULT_LIMITS,
    IMAGE_SUFFIXES,
    Limits,
    Source,
    check_unique,
    decode_image,
    printable,
    read_whole,
)
from mimic_fast.errors import UsageError


def open_folder(folder: Path, *, name: str, limits: Limits = DEFAULT_LIMITS) -> Source:
    """Opens an image folder: :func:`open_images` of every image that :func:`find_files` finds.

    Raises:
        UsageError: If the folder cannot be read or holds no image.
        UnsafeInputError: As in :func:`open_images`.
    """
    return open_images(folder, find_files(folder, IMAGE_SUFFIXES), name=name, limits=limits)


def open_images(
    folder: Path, paths: Sequence[str], *, name: str, limits: Limits = DEFAULT_LIMITS
) -> Source:
    """Opens images of a folder; keys are their paths relative to it, in the given order.

    The classes are the first-level subfolders that hold images, in the order of their names (as
    torchvision's ``ImageFolder`` numbers them). Where images lie in the folder itself there are no
    labels.

    Args:
        folder: The folder.
        paths: Paths of images relative to it, as :func:`find_files` gives them.
        name: Recorded as the source's name.
        limits: What one image may take.

    Raises:
        UsageError: If there is no image.
        UnsafeInputError: If two paths become one key, as only bytes that are no text can.
    """
    if not paths:
        raise UsageError(
            f"folder {folder} holds no image; expected {', '.join(IMAGE_SUFFIXES)} or .tar files"
        )
    keys = tuple(printable(path) for path in paths)
    check_unique(keys, f"folder {folder}")
    labels, classes = _labels(keys)
    return Source(
        name=name,
        keys=keys,
        labels=labels,
        classes=classes,
        read=lambda index: read_whole(folder / paths[index], limits),
        decode=partial(decode_image, limits=limits),
    )


def find_files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Paths, relative to a folder and sorted, of all files below it that end in ``suffixes``.

    Links are followed, hidden files and folders are not looked at.

    Raises:
        UsageError: If the folder cannot be read.
    """
    try:
        return sorted(_found(folder, suffixes))
    except OSError as error:
        where = error.filename or folder
        raise UsageError(f"folder {where} cannot be read: {error.strerror}") from None


def _found(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        prefix, above = pending.pop()
        status = os.stat(root / prefix)
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link that leads back up
            continue
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append((f"{prefix}{entry.name}/", above | {identity}))
                elif entry.name.lower().endswith(suffixes) and entry.is_file():
                    found.append(prefix + entry.name)
    return found


def _labels(keys: tuple[str, ...]) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    if any("/" not in key for key in keys):
        return None, None
    names = [key.partition("/")[0] for key in keys]
    classes = tuple(sorted(set(names)))
    index = {name: position for position, name in enumerate(classes)}
    return tuple(index[name] for name in names), classes
