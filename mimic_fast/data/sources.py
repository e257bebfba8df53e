"""Opens data sources by name: an image folder, tar shards, or the built-in Fashion-MNIST."""

import glob
from pathlib import Path
from typing import Literal

from mimic_fast.data.fashion_mnist import open_fashion_mnist
from mimic_fast.data.folder import open_folder
from mimic_fast.data.items import CorruptItemError, Source
from mimic_fast.data.tar_shards import open_tar_shards
from mimic_fast.errors import UsageError
from mimic_fast.progress import Reporter, silent

__all__ = ["CorruptItemError", "Source", "open_source", "open_split"]

_BUILT_IN = "fashion-mnist"


def open_source(text: str, *, cache: Path | None = None, report: Reporter = silent) -> Source:
    """Opens a data source without decoding anything.

    Args:
        text: An image folder; a tar shard, a folder of tar shards or a glob of tar shards;
            ``fashion-mnist:train`` or ``fashion-mnist:test``.
        cache: Where built-in data is kept; None: the user's cache.
        report: Told about downloads.

    Raises:
        UsageError: If it does not exist, is empty, or is none of these.
        UnsafeInputError: If a tar shard is damaged.
    """
    if text.partition(":")[0] == _BUILT_IN:
        return _open_built_in(text, cache, report)
    path = Path(text).expanduser()
    if path.is_dir():
        shards = _shards(path, "*.tar")
        return open_tar_shards(shards, name=text) if shards else open_folder(path, name=text)
    if path.is_file():
        return _open_files([path], text)
    matches = [Path(match) for match in glob.glob(str(path))] if glob.has_magic(text) else []
    if not matches:
        raise UsageError(
            f"data source {text!r} does not exist; "
            f"give an image folder, .tar shards (path or glob) or '{_BUILT_IN}:train'"
        )
    return _open_files(matches, text)


def open_split(
    root: str,
    split: Literal["train", "test"],
    *,
    cache: Path | None = None,
    report: Reporter = silent,
) -> Source:
    """Opens the training or the test part of a data set.

    Args:
        root: ``fashion-mnist``, or a folder that holds subfolders ``train`` and ``test`` or shards
            ``train-*.tar`` and ``test-*.tar``.
        split: Which part.
        cache: As in :func:`open_source`.
        report: As in :func:`open_source`.

    Raises:
        UsageError: If there is no such part.
        UnsafeInputError: If a tar shard is damaged.
    """
    if root == _BUILT_IN:
        return open_source(f"{_BUILT_IN}:{split}", cache=cache, report=report)
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UsageError(f"data set {root!r} does not exist; give a folder or '{_BUILT_IN}'")
    name = f"{root.rstrip('/')}/{split}"
    if (folder / split).is_dir():
        return open_source(name, cache=cache, report=report)
    shards = _shards(folder, f"{split}-*.tar")
    if not shards:
        raise UsageError(
            f"data set {root!r} has no part '{split}'; "
            f"expected a subfolder '{split}' or shards '{split}-*.tar'"
        )
    return open_tar_shards(shards, name=f"{name}-*.tar")


def _open_built_in(text: str, cache: Path | None, report: Reporter) -> Source:
    match text.partition(":")[2]:
        case "train" | "test" as split:
            return open_fashion_mnist(split, cache=cache, report=report)
        case _:
            raise UsageError(
                f"built-in data is '{_BUILT_IN}:train' or '{_BUILT_IN}:test', got {text!r}"
            )


def _open_files(paths: list[Path], text: str) -> Source:
    other = next((path for path in paths if path.suffix.lower() != ".tar"), None)
    if other is not None:
        raise UsageError(f"data source {text!r}: {other} is no .tar shard; give a folder or shards")
    return open_tar_shards(paths, name=text)


def _shards(folder: Path, pattern: str) -> list[Path]:
    return [path for path in folder.glob(pattern) if not path.name.startswith(".")]
