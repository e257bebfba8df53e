"""Videos as a data source: their frames, extracted once into the user's cache.

A video's frames are kept under its digest and the settings, so that a renamed copy finds them and
a changed video does not.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mimic_fast.data.frames import extract_frames
from mimic_fast.data.items import (
    DEFAULT_LIMITS,
    Limits,
    Source,
    decode_image,
    printable,
    read_whole,
)
from mimic_fast.data.video_files import VIDEO_SUFFIXES, frame_prefixes, list_videos
from mimic_fast.data.video_manifest import MANIFEST, FrameManifest, read_frame_manifest
from mimic_fast.data.video_settings import FrameSettings
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.files import sha256_file, user_cache
from mimic_fast.progress import Reporter, silent

__all__ = ["SOURCE_FRAMES", "VIDEO_SUFFIXES", "open_video"]

# One frame a second, near-duplicates dropped, at the size from which encoders' views are cropped.
SOURCE_FRAMES = FrameSettings(short_side=256)
_FOLDER = "video_frames"
_EXTRACTION = 1  # raise it when the same settings come to mean other frames


def open_video(
    paths: list[Path],
    *,
    name: str,
    cache: Path | None = None,
    report: Reporter = silent,
    settings: FrameSettings = SOURCE_FRAMES,
    limits: Limits = DEFAULT_LIMITS,
) -> Source:
    """Opens the frames of videos; keys are ``STEM_TIMEus.jpg``, sorted.

    Frames are extracted when a video is first opened. Truncated videos give the frames they have,
    with a warning; so do a few bad videos among good ones.

    Args:
        paths: Video files or folders of them, in any order.
        name: Recorded as the source's name.
        cache: Where the frames are kept; None: the user's cache.
        report: Told of every few frames extracted.
        settings: Which frames, and in what form; never in shards.
        limits: What one frame may take.

    Raises:
        UsageError: If a video cannot be read or packages are missing.
        UnsafeInputError: If no video gives a frame.
    """
    settings = settings.model_copy(update={"shard_frames": None})
    videos = _distinct(list_videos(paths))
    files: dict[str, Path] = {}
    problems: list[str] = []
    for video, prefix in zip(videos, frame_prefixes(list(videos)), strict=True):
        folder = (cache or user_cache()) / _FOLDER / _cache_key(videos[video], settings)
        try:
            manifest = _extracted(video, folder, settings, report)
        except UnsafeInputError as error:
            problems.append(str(error))
            continue
        entry = manifest.videos[0].model_copy(update={"path": printable(str(video))})
        problems += manifest.model_copy(update={"videos": (entry,)}).problems()
        files |= {
            prefix + frame.file.removeprefix(entry.prefix): folder / frame.file
            for frame in manifest.frames
        }
    if not files:
        raise UnsafeInputError(f"data source {name!r} gives no frame: {'; '.join(problems)}")
    for problem in problems:
        warnings.warn(f"data source {name!r}: {problem}; going on", stacklevel=2)
    keys = tuple(sorted(files))
    return Source(
        name=name,
        keys=keys,
        labels=None,
        classes=None,
        read=lambda index: read_whole(files[keys[index]], limits),
        decode=partial(decode_image, limits=limits),
    )


def _distinct(videos: Sequence[Path]) -> dict[Path, str]:
    """Digests of the videos, in an order that only names and contents decide; no copies."""
    digests = sorted((path.name, sha256_file(path), path) for path in videos)
    first: dict[str, Path] = {}
    for _, digest, path in digests:
        first.setdefault(digest, path)
    return {path: digest for digest, path in first.items()}


def _cache_key(digest: str, settings: FrameSettings) -> str:
    how = json.dumps([_EXTRACTION, settings.model_dump(mode="json")], sort_keys=True)
    return f"{digest[:32]}-{hashlib.sha256(how.encode()).hexdigest()[:16]}"


def _extracted(
    video: Path, folder: Path, settings: FrameSettings, report: Reporter
) -> FrameManifest:
    if (folder / MANIFEST).is_file():
        return read_frame_manifest(folder)
    try:
        return extract_frames([video], folder, settings=settings, report=report)
    except UsageError:
        if not (folder / MANIFEST).is_file():
            raise
        return read_frame_manifest(folder)  # another process was faster
