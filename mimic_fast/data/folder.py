"""Image folders: every image below a folder; first-level subfolders are its classes."""

import os
from pathlib import Path

from mimic_fast.data.items import (
    IMAGE_SUFFIXES,
    Source,
    decode_image,
    is_image_name,
    printable,
    read_whole,
)
from mimic_fast.errors import UsageError


def open_folder(folder: Path, *, name: str) -> Source:
    """Opens an image folder; keys are paths relative to it, sorted.

    The classes are the first-level subfolders that hold images, in the order of their names (as
    torchvision's ``ImageFolder`` numbers them). Where images lie in the folder itself there are no
    labels. Links are followed, hidden files and folders are not looked at.

    Raises:
        UsageError: If the folder cannot be read or holds no image.
    """
    try:
        paths = sorted(_image_paths(folder))
    except OSError as error:
        where = error.filename or folder
        raise UsageError(f"folder {where} cannot be read: {error.strerror}") from None
    if not paths:
        raise UsageError(
            f"folder {folder} holds no image; expected {', '.join(IMAGE_SUFFIXES)} or .tar files"
        )
    keys = tuple(printable(path) for path in paths)
    labels, classes = _labels(keys)
    return Source(
        name=name,
        keys=keys,
        labels=labels,
        classes=classes,
        read=lambda index: read_whole(folder / paths[index]),
        decode=decode_image,
    )


def _image_paths(root: Path) -> list[str]:
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
                elif is_image_name(entry.name) and entry.is_file():
                    found.append(prefix + entry.name)
    return found


def _labels(keys: tuple[str, ...]) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    if any("/" not in key for key in keys):
        return None, None
    names = [key.partition("/")[0] for key in keys]
    classes = tuple(sorted(set(names)))
    index = {name: position for position, name in enumerate(classes)}
    return tuple(index[name] for name in names), classes
