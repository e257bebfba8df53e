"""What a video file is, read with PyAV: stream, size, rotation, length, and whether it is whole."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from mimic_fast.data.items import MAX_PIXELS
from mimic_fast.data.video_walk import format_kind, missing_end, promised_seconds, walk_packets
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.files import sha256_file

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.error import FFmpegError
    from av.video.stream import VideoStream

# Formats that hold their video themselves: no playlists, which name other files or addresses, and
# no text, of which FFmpeg would draw pictures. No bare streams either: any bytes may pass for one.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,ivf,flv,asf,ogg,nut,gif,dv,mxf,rm,wtv,yuv4mpegpipe"
# What opens a video, here and in the decoder: nothing but the file itself.
OPENING = {"protocol_whitelist": "file,pipe", "format_whitelist": FORMATS}

_BUFFER = 2**20
_MOST_ASPECT = 8  # pixels more oblong than this are a mistake in the header


class VideoError(UnsafeInputError):
    """No frame can be had from a video; the message begins after its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One video file.

    Args:
        path: Where it is, as given.
        sha256: Of its bytes.
        size: Number of bytes.
        container: FFmpeg's name of its format.
        codec: Of its video stream.
        stream: Index of that stream.
        width: Pixels as stored, before rotation.
        height: Pixels as stored, before rotation.
        rotation: Degrees counterclockwise by which a player turns it.
        aspect: Width to height of one pixel.
        time_base: Seconds of one unit of its timestamps.
        duration: Seconds, as its header says or else to the end of the last packet.
        packets: Coded frames in it.
        damage: What is wrong with the file; None if it is whole.
        suspects: Timestamps of frames that lack a part although they can be decoded.
        last: Timestamp of the frame that lacks its end if the file does; None where none can.
    """

    path: Path
    sha256: str
    size: int
    container: str
    codec: str
    stream: int
    width: int
    height: int
    rotation: int
    aspect: Fraction
    time_base: Fraction
    duration: float
    packets: int
    damage: str | None
    suspects: frozenset[int]
    last: int | None

    def upright_size(self) -> tuple[int, int]:
        """Width and height as a player shows it: turned, pixels square, neither side enlarged."""
        width, height = self.width, self.height
        if self.aspect > 1:
            height = max(1, round(height / self.aspect))
        else:
            width = max(1, round(width * self.aspect))
        quarter_turn = abs(self.rotation % 180 - 90) <= 1
        return (height, width) if quarter_turn else (width, height)


def probe_video(path: Path) -> Video:
    """Reads what a video is.

    Raises:
        UsageError: If the file cannot be read, or PyAV is not installed.
        VideoError: If it is no video, or holds none that can be opened.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise missing_packages() from None
    try:
        size = path.stat().st_size
        if size == 0:
            raise VideoError("is empty: 0 bytes")
        with path.open("rb") as file:
            options = OPENING | {"max_pixels": str(MAX_PIXELS)}
            try:
                container = av.open(
                    file,
                    mode="r",
                    options=options,
                    metadata_errors="replace",
                    buffer_size=_BUFFER,
                )
            except FFmpegError as error:
                raise VideoError(_unreadable(path, error)) from None
            with container:
                return _described(container, path, size)
    except FFmpegError as error:  # also OSErrors, so these come first
        raise VideoError(f"cannot be read as a video: {error.strerror}") from None
    except OSError as error:
        raise UsageError(f"video {path} cannot be read: {error.strerror}") from None


def missing_packages() -> UsageError:
    """What to say where the packages for video are not installed."""
    return UsageError(
        "reading videos needs av, ffmpeg-python and imageio-ffmpeg; "
        "run: pip install 'mimic_fast[video]'"
    )


def _unreadable(path: Path, error: "FFmpegError") -> str:
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] in (b"ftyp", b"mdat", b"moov"):
        return (
            "has no readable index (moov, moof), which MP4 and MOV files often keep at their end: "
            "it is truncated or damaged, and no frame can be found in it"
        )
    return f"is not a video in a known format: {error.strerror}"


def _described(container: "InputContainer", path: Path, size: int) -> Video:
    stream = _video_stream(container)
    context = stream.codec_context
    if not (context.width and context.height):
        raise VideoError(f"has a video stream ({context.name}) without a picture size")
    if context.width * context.height > MAX_PIXELS:
        raise VideoError(
            f"has frames of {context.width} x {context.height} pixels, "
            f"more than the {MAX_PIXELS} allowed"
        )
    aspect = Fraction(context.sample_aspect_ratio or 1)
    promised = promised_seconds(container, stream)
    walk = walk_packets(container, stream, path)
    return Video(
        path=path,
        sha256=sha256_file(path),
        size=size,
        container=format_kind(container),
        codec=context.name,
        stream=stream.index,
        width=context.width,
        height=context.height,
        rotation=walk.rotation or 0,
        aspect=aspect if 1 / _MOST_ASPECT <= aspect <= _MOST_ASPECT else Fraction(1),
        time_base=Fraction(stream.time_base or Fraction(1, 1000)),
        duration=float(promised or walk.reached),
        packets=walk.packets,
        damage=walk.damage or missing_end(promised, walk),
        suspects=frozenset(walk.suspects),
        last=walk.last,
    )


def _video_stream(container: "InputContainer") -> "VideoStream":
    """The stream FFmpeg thinks best, but no cover picture."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
        raise VideoError(f"has no video stream, only {', '.join(kinds)}")
    best = container.streams.best("video")
    stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
    if stream.codec_context is None:
        raise VideoError("has a video stream of an unknown codec")
    return stream
