"""Opens data sources by name: images, tar shards, videos, Hugging Face data, Fashion-MNIST."""

import glob
import warnings
from pathlib import Path
from typing import Literal

from mimic_fast.config import DataSettings
from mimic_fast.data.fashion_mnist import open_fashion_mnist
from mimic_fast.data.folder import find_files, open_images
from mimic_fast.data.hf_folder import hf_split, is_hf_folder, open_hf_folder
from mimic_fast.data.items import (
    DEFAULT_LIMITS,
    IMAGE_SUFFIXES,
    CorruptItemError,
    Limits,
    Source,
)
from mimic_fast.data.tar_shards import open_tar_shards
from mimic_fast.data.video_files import VIDEO_SUFFIXES
from mimic_fast.errors import UsageError
from mimic_fast.progress import Reporter, silent

__all__ = ["CorruptItemError", "Limits", "Source", "open_source", "open_split"]

_BUILT_IN = "fashion-mnist"


def open_source(
    text: str,
    *,
    cache: Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
    report: Reporter = silent,
) -> Source:
    """Opens a data source without decoding any image.

    Args:
        text: An image folder; a tar shard, a folder of tar shards or a glob of tar shards; a video,
            a folder of videos or a glob of videos; a folder that ``datasets`` saved, with
            ``:SPLIT`` if it has several; ``fashion-mnist:train`` or ``fashion-mnist:test``.
        cache: Where built-in data, indexes of shards and frames of videos are kept; None: the
            user's cache.
        limits: What one image may take. Built-in data is what it is.
        report: Told about downloads and videos.

    Raises:
        UsageError: If it does not exist, is empty, or is none of these.
        UnsafeInputError: If a shard, a video or a data set is damaged.
    """
    if text.partition(":")[0] == _BUILT_IN:
        return _open_built_in(text, cache, report)
    path = Path(text).expanduser()
    if path.is_dir():
        return _open_folder(path, text, cache, limits, report)
    if path.is_file():
        return _open_files([path], text, cache, limits, report)
    matches = [Path(match) for match in glob.glob(str(path))] if glob.has_magic(text) else []
    if matches:
        return _open_files(matches, text, cache, limits, report)
    split = hf_split(text)
    if split is not None:
        return open_hf_folder(split, name=text, limits=limits)
    raise UsageError(
        f"data source {text!r} does not exist; give an image folder, .tar shards or videos (path "
        f"or glob), a Hugging Face data set on disk or '{_BUILT_IN}:train'"
    )


def limits_of(settings: DataSettings) -> Limits:
    """What one item may take, as the settings have it."""
    return Limits(
        max_item_bytes=round(settings.max_item_mb * 1e6),
        max_pixels=round(settings.max_megapixels * 1e6),
    )


def open_split(
    root: str,
    split: Literal["train", "test"],
    *,
    cache: Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
    report: Reporter = silent,
) -> Source:
    """Opens the training or the test part of a data set.

    Args:
        root: ``fashion-mnist``, or a folder that holds subfolders ``train`` and ``test`` or shards
            ``train-*.tar`` and ``test-*.tar``.
        split: Which part.
        cache: As in :func:`open_source`.
        limits: As in :func:`open_source`.
        report: As in :func:`open_source`.

    Raises:
        UsageError: If there is no such part.
        UnsafeInputError: As in :func:`open_source`.
    """
    if root == _BUILT_IN:
        return open_source(f"{_BUILT_IN}:{split}", cache=cache, report=report)
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UsageError(f"data set {root!r} does not exist; give a folder or '{_BUILT_IN}'")
    name = f"{root.rstrip('/')}/{split}"
    if (folder / split).is_dir():
        return open_source(name, cache=cache, limits=limits, report=report)
    shards = _shards(folder, f"{split}-*.tar")
    if not shards:
        raise UsageError(
            f"data set {root!r} has no part '{split}'; "
            f"expected a subfolder '{split}' or shards '{split}-*.tar'"
        )
    return open_tar_shards(shards, name=f"{name}-*.tar", cache=cache, limits=limits)


def _open_built_in(text: str, cache: Path | None, report: Reporter) -> Source:
    match text.partition(":")[2]:
        case "train" | "test" as split:
            return open_fashion_mnist(split, cache=cache, report=report)
        case _:
            raise UsageError(
                f"built-in data is '{_BUILT_IN}:train' or '{_BUILT_IN}:test', got {text!r}"
            )


def _open_folder(
    path: Path, text: str, cache: Path | None, limits: Limits, report: Reporter
) -> Source:
    if is_hf_folder(path):
        return open_hf_folder(path, name=text, limits=limits)
    shards = _shards(path, "*.tar")
    if shards:
        return open_tar_shards(shards, name=text, cache=cache, limits=limits)
    names = find_files(path, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if names and not images:
        return _open_videos([path / name for name in names], text, cache, limits, report)
    if len(images) < len(names):
        warnings.warn(
            f"folder {path} holds {len(images)} images and {len(names) - len(images)} videos; "
            "the videos are left out, give them as a source of their own",
            stacklevel=3,
        )
    return open_images(path, images, name=text, limits=limits)


def _open_files(
    paths: list[Path], text: str, cache: Path | None, limits: Limits, report: Reporter
) -> Source:
    if all(path.suffix.lower() in VIDEO_SUFFIXES for path in paths):
        return _open_videos(paths, text, cache, limits, report)
    other = next((path for path in paths if path.suffix.lower() != ".tar"), None)
    if other is not None:
        raise UsageError(
            f"data source {text!r}: {other} is no .tar shard; "
            "give a folder, .tar shards, or nothing but videos"
        )
    return open_tar_shards(paths, name=text, cache=cache, limits=limits)


def _open_videos(
    paths: list[Path], text: str, cache: Path | None, limits: Limits, report: Reporter
) -> Source:
    from mimic_fast.data.video_source import open_video

    return open_video(paths, name=text, cache=cache, limits=limits, report=report)


def _shards(folder: Path, pattern: str) -> list[Path]:
    return [
        path for path in folder.glob(pattern) if not path.name.startswith(".") and path.is_file()
    ]
