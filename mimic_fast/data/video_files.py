"""Video files by their names: which there are, and what their frames are called."""

import os
from collections.abc import Sequence
from pathlib import Path

from mimic_fast.data.folder import find_files
from mimic_fast.errors import UsageError

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts"),
    *(".flv", ".wmv", ".asf", ".ogv", ".3gp", ".mxf", ".gif"),
)
_LONGEST_STEM = 40  # characters, so that a file's name stays below 255 bytes in any script


def list_videos(paths: Sequence[Path]) -> list[Path]:
    """The files among ``paths``, and the videos below the folders among them, sorted.

    A file may have any name; in a folder only VIDEO_SUFFIXES count.

    Raises:
        UsageError: If a path does not exist or a folder holds no video.
    """
    videos: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = find_files(path, VIDEO_SUFFIXES)
            if not found:
                raise UsageError(
                    f"folder {path} holds no video; expected {', '.join(VIDEO_SUFFIXES)}"
                )
            videos += [path / name for name in found]
        elif path.is_file():
            videos.append(path)
        else:
            problem = "is no regular file" if path.exists() else "does not exist"
            raise UsageError(f"video {path} {problem}; give video files or folders of them")
    for video in videos:
        if not os.access(video, os.R_OK):
            raise UsageError(f"video {video} cannot be read: permission denied")
    return videos


def frame_prefixes(videos: Sequence[Path]) -> list[str]:
    """What the names of each video's frames begin with: its stem, made plain and unique.

    Dots would end the key of a tar shard's member, and anything else odd is replaced as well.
    """
    prefixes: list[str] = []
    for video in videos:
        plain = "".join(c if c.isalnum() or c in "_-" else "_" for c in video.stem)
        stem = plain[:_LONGEST_STEM].lstrip("-") or "video"
        prefix, number = stem, 1
        while prefix in prefixes:
            number += 1
            prefix = f"{stem}_{number}"
        prefixes.append(prefix)
    return prefixes


def frame_stem(prefix: str, seconds: float) -> str:
    """Name of a frame without its suffix: sorts by time within a video."""
    return f"{prefix}_{round(seconds * 1_000_000):013d}us"
