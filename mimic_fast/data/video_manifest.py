"""``frames.json``: which videos a folder of frames came from, and the time of every frame."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from mimic_fast.config import Frozen
from mimic_fast.data.items import is_image_name
from mimic_fast.data.video_settings import FrameSettings
from mimic_fast.errors import UnsafeInputError, UsageError

MANIFEST = "frames.json"
SCHEMA = 1


class VideoEntry(Frozen):
    """One video that frames were kept of."""

    path: str = Field(description="path as given")
    prefix: str = Field(description="what the names of its frames begin with")
    sha256: str = Field(description="of the file's bytes")
    size: int = Field(description="bytes")
    container: str = Field(description="FFmpeg's name of the format")
    codec: str = Field(description="of the video stream")
    width: int = Field(description="pixels as stored, before rotation")
    height: int = Field(description="pixels as stored, before rotation")
    rotation: int = Field(description="degrees counterclockwise, already applied to the frames")
    duration: float = Field(description="seconds")
    time_base: str = Field(description="seconds of one unit of pts, as a fraction")
    frames_found: int = Field(description="frames decoded")
    frames_kept: int = Field(description="frames written")
    frames_dropped: int = Field(description="frames left out as near-duplicates")
    limited: bool = Field(description="whether decoding stopped at the limit on kept frames")
    truncated: bool = Field(description="whether the file is truncated or damaged")
    reason: str | None = Field(description="what is wrong with it")


class FailedVideo(Frozen):
    """One video that gave no frame."""

    path: str = Field(description="path as given")
    reason: str = Field(description="what is wrong with it")


class FrameEntry(Frozen):
    """One frame."""

    file: str = Field(description="file name of the frame, in the folder or in its shard")
    shard: str | None = Field(description="file name of the tar shard it is in")
    video: int = Field(description="index into videos")
    timestamp: float = Field(description="presentation time in the video, seconds")
    pts: int = Field(description="presentation timestamp in units of the video's time_base")


class FrameManifest(Frozen):
    """All of ``frames.json``."""

    schema_version: Literal[1] = Field(default=SCHEMA, description="of this file")
    settings: FrameSettings = Field(description="how frames were taken")
    videos: tuple[VideoEntry, ...] = Field(description="videos that gave frames")
    failed: tuple[FailedVideo, ...] = Field(description="videos that gave none")
    frames: tuple[FrameEntry, ...] = Field(description="frames, video by video, in order of time")

    def problems(self) -> list[str]:
        """One sentence for every video that is not whole."""
        damaged = [
            f"{video.path} is truncated or damaged ({video.reason}); "
            f"its {video.frames_kept} good frames were kept"
            for video in self.videos
            if video.truncated
        ]
        return damaged + [f"{video.path} {video.reason}" for video in self.failed]


def read_frame_manifest(folder: Path) -> FrameManifest:
    """Reads ``frames.json`` of a folder.

    Raises:
        UsageError: If it cannot be read.
        UnsafeInputError: If it is no such file, or names files outside the folder.
    """
    path = folder / MANIFEST
    try:
        manifest = FrameManifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise UnsafeInputError(
            f"{path} is damaged: {where}: {problem['msg']}; remove its folder"
        ) from None
    for frame in manifest.frames:
        plain = "/" not in frame.file and is_image_name(frame.file)
        if not plain or not 0 <= frame.video < len(manifest.videos):
            raise UnsafeInputError(
                f"{path} is damaged: it names the frame {frame.file!r}; remove its folder"
            )
    return manifest
