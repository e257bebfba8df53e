"""Whether a video is whole: its packets are walked to the end of the file and held to its header.

Nothing is decoded but the first frame, which knows how the picture is turned.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from mimic_fast.data.video_tail import torn_end

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

# Formats in which a coded frame has no size, or FFmpeg does not hold it to one: where the file
# breaks off within a frame, what is there of it passes for whole. They are decoded without dropping
# damaged packets, so that the packets seen here are those that FFmpeg decodes.
SIZELESS = {"mpegts", "mpeg", "gif", "asf"}
# Formats whose header says how long the video is; elsewhere the length is read off the packets.
_LENGTH_IN_HEADER = {"mov", "matroska", "avi", "flv", "asf"}
_SLACK = Fraction(1, 5)  # seconds by which a header may err
_TRIED = 64  # packets decoded at most to see a first frame


@dataclass(kw_only=True, slots=True)
class Walk:
    """What the packets of a file say.

    Args:
        packets: Packets of the video stream.
        reached: Seconds at which the last packet of any stream ends.
        suspects: Timestamps of frames that lack a part, in SIZELESS formats.
        last: Timestamp of the frame coded last, in SIZELESS formats.
        rotation: Of the first frame; None if none could be decoded.
        damage: What is wrong; None if nothing is.
    """

    packets: int = 0
    reached: Fraction = Fraction(0)
    suspects: set[int] = field(default_factory=set)
    last: int | None = None
    rotation: int | None = None
    damage: str | None = None


def walk_packets(container: "InputContainer", stream: "VideoStream", path: Path) -> Walk:
    """Reads all packets of a file just opened."""
    from av.error import FFmpegError

    walk = Walk()
    try:
        for packet in container.demux():
            if packet.size == 0:  # says that the stream has ended
                continue
            if packet.pts is not None and packet.time_base is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base
                walk.reached = max(walk.reached, end)
            if packet.is_corrupt:
                walk.damage = "it ends within a packet"
            if packet.stream_index == stream.index:
                walk.packets += 1
                walk.last = packet.pts
                if packet.is_corrupt and packet.pts is not None:
                    walk.suspects.add(packet.pts)
                if walk.rotation is None and walk.packets <= _TRIED:
                    walk.rotation = _rotation(packet)
    except FFmpegError as error:
        walk.damage = f"reading its packets ended with: {error.strerror}"
    kind = format_kind(container)
    walk.damage = walk.damage or torn_end(path, kind)
    if kind not in SIZELESS:
        walk.suspects.clear()
        walk.last = None
    return walk


def format_kind(container: "InputContainer") -> str:
    """FFmpeg's name of the format, the first of them if it has several."""
    return container.format.name.split(",")[0]


def promised_seconds(container: "InputContainer", stream: "VideoStream") -> Fraction | None:
    """Where the header says that the video ends; None if it does not say."""
    kind = format_kind(container)
    if kind not in _LENGTH_IN_HEADER:
        return None
    seconds = Fraction(container.duration or 0, 1_000_000)
    if kind == "avi" and stream.average_rate:  # FFmpeg shortens the duration to the file's size
        seconds = max(seconds, stream.frames / Fraction(stream.average_rate))
    return seconds or None


def missing_end(promised: Fraction | None, walk: Walk) -> str | None:
    """What is wrong where packets end before the header says so; None if they do not."""
    if promised is None:
        return None
    between = walk.reached / max(walk.packets, 1)
    if promised - walk.reached <= max(_SLACK, 2 * between):
        return None
    return f"it ends at {float(walk.reached):.2f} of {float(promised):.2f} seconds"


def _rotation(packet: "Packet") -> int | None:
    """Degrees by which the frames of a packet are turned; None if it gives no frame (yet)."""
    from av.error import FFmpegError

    with suppress(FFmpegError):
        for frame in packet.decode():
            return frame.rotation
    return None
