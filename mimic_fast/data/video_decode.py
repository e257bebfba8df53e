"""Decodes a video in an FFmpeg process and reads its frames, with their timestamps, from a pipe.

One frame is held at a time. However reading ends, the process is ended and waited for.
"""

import re
import subprocess
import threading
from collections import deque
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import IO, TYPE_CHECKING

from PIL import Image

from mimic_fast.data.video_ffmpeg import PICKED, ffmpeg_command, shift, target_size
from mimic_fast.data.video_probe import Video
from mimic_fast.data.video_settings import FrameSettings

if TYPE_CHECKING:
    from av.packet import Packet

# What FFmpeg 5 to 9 say, apart from the decoder's own words, of packets that give no frame.
_LOST = re.compile(
    r"Error while decoding stream|Error submitting packet to decoder|Decoding error:"
)


_MOST_HELD = 16  # more than any codec reorders


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One decoded frame.

    Args:
        pts: Its presentation timestamp in the video's time base.
        image: Upright RGB pixels.
    """

    pts: int
    image: Image.Image


@dataclass(kw_only=True, slots=True)
class Decoding:
    """How far decoding got.

    Args:
        found: Frames decoded so far.
        dropped: Picked frames that the reader left out.
        damage: What went wrong; None if nothing did, or it was not run to its end.
    """

    found: int = 0
    dropped: int = 0
    damage: str | None = None


def decode_frames(
    video: Video, settings: FrameSettings, decoding: Decoding
) -> Generator[Frame | None, None, None]:
    """The picked frames in order of time, and None for every frame decoded.

    Close the iterator when leaving it early: that ends the FFmpeg process.

    Args:
        video: What to decode.
        settings: What to pick, and its size.
        decoding: Kept up to date.

    Raises:
        UsageError: If packages are missing.
        VideoError: If the frames would be larger than allowed.
    """
    size = target_size(video.upright_size(), settings)
    command = ffmpeg_command(video, settings, size)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for this process, which then ends that one
    )
    assert process.stdout is not None
    assert process.stderr is not None
    words = _Words()
    listener = threading.Thread(target=words.listen, args=(process.stderr,), daemon=True)
    listener.start()
    try:
        held: deque[Frame] = deque()  # the one coded last and the few shown after it
        with closing(_frames(process.stdout, video, size, decoding)) as frames:
            for frame in frames:
                if frame is None or video.last is None or frame.pts < video.last:
                    yield frame
                    continue
                held.append(frame)
                if len(held) > _MOST_HELD:  # timestamps that began anew
                    yield held.popleft()
        process.stdout.close()
        code = process.wait()
        listener.join()
        decoding.damage = _damage(code, words)
        if not (video.damage or decoding.damage):
            yield from held
    finally:
        process.kill()  # nothing if it has ended
        process.wait()
        process.stdout.close()
        listener.join()
        process.stderr.close()


def _frames(
    pipe: IO[bytes], video: Video, size: tuple[int, int], decoding: Decoding
) -> Generator[Frame | None, None, None]:
    import av
    from av.error import FFmpegError

    try:
        container = av.open(pipe, mode="r", format="nut")
    except FFmpegError:  # FFmpeg ended before it wrote anything; it says why
        return
    whole = 3 * size[0] * size[1]
    # The stream breaks off if FFmpeg is ended from outside; its exit code says so.
    with container, suppress(FFmpegError):
        for packet in container.demux():
            if packet.pts is None or (pts := _pts(packet.pts, packet, video)) in video.suspects:
                continue
            if packet.stream_index != PICKED:
                decoding.found += 1
                yield None
            elif packet.size == whole:
                image = Image.frombytes("RGB", size, bytes(packet))
                yield Frame(pts=pts, image=image)


def _pts(shifted: int, packet: "Packet", video: Video) -> int:
    """A timestamp of the pipe as one of the file."""
    return round(shifted * Fraction(packet.time_base or 1) / video.time_base) - shift(video)


@dataclass(kw_only=True, slots=True)
class _Words:
    """What FFmpeg says on its standard error: the last lines, and how often a frame was lost."""

    lines: deque[str] = field(default_factory=lambda: deque(maxlen=8))
    lost: int = 0

    def listen(self, stream: IO[bytes]) -> None:
        for line in iter(lambda: stream.readline(4096), b""):
            text = line.decode(errors="replace").strip()
            self.lost += bool(_LOST.search(text))
            self.lines.append(text)


def _damage(code: int, words: _Words) -> str | None:
    said = words.lines[-1] if words.lines else "it gave no reason"
    if code:
        return f"decoding ended with: {said}"
    return f"{words.lost} of its frames cannot be decoded" if words.lost else None
