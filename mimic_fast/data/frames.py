"""Frames of videos: taken, thinned out, resized and written with a manifest of their times.

FFmpeg decodes in a process of its own and hands frames through a pipe, one at a time; PyAV says
what the file is and whether it is whole. A truncated video gives the frames it still has.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from mimic_fast.data.items import printable
from mimic_fast.data.video_decode import Decoding, Frame, decode_frames
from mimic_fast.data.video_duplicates import difference_hash, is_near_duplicate
from mimic_fast.data.video_ffmpeg import ffmpeg_binary
from mimic_fast.data.video_files import frame_prefixes, frame_stem
from mimic_fast.data.video_manifest import (
    MANIFEST,
    FailedVideo,
    FrameEntry,
    FrameManifest,
    VideoEntry,
)
from mimic_fast.data.video_probe import Video, VideoError, probe_video
from mimic_fast.data.video_settings import FrameSettings
from mimic_fast.data.video_writer import (
    AddFrame,
    check_vacant,
    encode_frame,
    frame_writer,
    new_folder,
    write_synced,
)
from mimic_fast.errors import UnsafeInputError
from mimic_fast.progress import Event, Reporter, silent

__all__ = ["FrameManifest", "FrameSettings", "extract_frames"]

_PHASE = "frames"
_REPORT_EVERY = 32  # frames


def extract_frames(
    videos: Sequence[Path],
    out: Path,
    *,
    settings: FrameSettings,
    report: Reporter = silent,
) -> FrameManifest:
    """Writes frames of videos, and ``frames.json``, into a new folder.

    The folder appears when all is done. A video that gives no frame does not keep the others from
    being written: look at ``failed`` and ``truncated`` of what is returned.

    Args:
        videos: Video files.
        out: The folder; it must not exist or be empty.
        settings: Which frames, and in what form.
        report: Told of every few frames.

    Returns:
        What ``frames.json`` says.

    Raises:
        UsageError: If ``out`` is taken, a file cannot be read, or packages are missing.
        UnsafeInputError: If no video gives a frame; nothing is written then.
        MachineError: If the folder cannot be written.
    """
    check_vacant(out)
    ffmpeg_binary()
    entries: list[VideoEntry] = []
    failed: list[FailedVideo] = []
    frames: list[FrameEntry] = []
    with new_folder(out) as folder:
        with frame_writer(folder, settings) as add:
            for path, prefix in zip(videos, frame_prefixes(videos), strict=True):
                try:
                    entry, kept = _take(path, prefix, settings, add, report)
                except VideoError as error:
                    failed.append(FailedVideo(path=printable(str(path)), reason=str(error)))
                    continue
                frames += [frame.model_copy(update={"video": len(entries)}) for frame in kept]
                entries.append(entry)
        manifest = FrameManifest(
            settings=settings, videos=tuple(entries), failed=tuple(failed), frames=tuple(frames)
        )
        if not frames:
            raise UnsafeInputError("; ".join([*manifest.problems(), "nothing was written"]))
        write_synced(folder / MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest


def _take(
    path: Path, prefix: str, settings: FrameSettings, add: AddFrame, report: Reporter
) -> tuple[VideoEntry, list[FrameEntry]]:
    """Writes the frames of one video; their ``video`` is still 0.

    Raises:
        VideoError: If it gives none.
    """
    video = probe_video(path)
    decoding = Decoding()
    with closing(_kept(video, settings, decoding, report)) as kept:
        frames = _written(kept, video, prefix, add, settings.file_format)
    if not frames:
        raise VideoError(
            f"gives no frame: {video.damage or decoding.damage or 'none could be decoded'}"
        )
    return _entry(video, prefix, decoding, len(frames), limit=settings.limit), frames


def _kept(
    video: Video, settings: FrameSettings, decoding: Decoding, report: Reporter
) -> Generator[Frame, None, None]:
    """The picked frames without near-duplicates, up to the limit."""
    hashes: deque[int] = deque(maxlen=settings.compared)
    kept = 0
    with closing(decode_frames(video, settings, decoding)) as decoded:
        for frame in decoded:
            if frame is None:
                if decoding.found % _REPORT_EVERY == 0:
                    _tell(report, decoding.found, video, kept)
                continue
            if settings.drop_near_duplicates:
                hashed = difference_hash(frame.image)
                if is_near_duplicate(hashed, hashes, share=settings.near_duplicate):
                    decoding.dropped += 1
                    continue
                hashes.append(hashed)
            kept += 1
            yield frame
            if kept == settings.limit:
                break
    _tell(report, video.packets, video, kept)


def _tell(report: Reporter, found: int, video: Video, kept: int) -> None:
    total = max(video.packets, 1)
    done = min(found, total)  # a packet may hold two fields, or more than one frame
    report(
        Event(phase=_PHASE, done=done, total=total, unit="frames", metrics={"kept": float(kept)})
    )


def _written(
    kept: Iterator[Frame], video: Video, prefix: str, add: AddFrame, file_format: str
) -> list[FrameEntry]:
    """Writes frames under names that tell their times."""
    frames: list[FrameEntry] = []
    names: set[str] = set()
    for frame in kept:
        seconds = float(frame.pts * video.time_base)
        stem = frame_stem(prefix, seconds)
        while stem in names:  # only in a video whose timestamps are damaged
            stem += "+"
        names.add(stem)
        name = f"{stem}.{file_format}"
        shard = add(name, encode_frame(frame.image, file_format))
        frames.append(FrameEntry(file=name, shard=shard, video=0, timestamp=seconds, pts=frame.pts))
    return frames


def _entry(
    video: Video, prefix: str, decoding: Decoding, kept: int, *, limit: int | None
) -> VideoEntry:
    reason = video.damage or decoding.damage
    return VideoEntry(
        path=printable(str(video.path)),
        prefix=prefix,
        sha256=video.sha256,
        size=video.size,
        container=video.container,
        codec=video.codec,
        width=video.width,
        height=video.height,
        rotation=video.rotation,
        duration=video.duration,
        time_base=str(video.time_base),
        frames_found=decoding.found,
        frames_kept=kept,
        frames_dropped=decoding.dropped,
        limited=kept == limit,
        truncated=reason is not None,
        reason=reason,
    )
