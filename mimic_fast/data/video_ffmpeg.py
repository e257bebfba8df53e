"""The FFmpeg process that decodes a video: which binary, and its arguments.

Two streams come back in one NUT stream: the frames that were picked, and a tiny tick for every
frame decoded, which tells how far it got. NUT keeps timestamps exactly, so that a frame's is the
file's own and never an index over a frame rate.
"""

import re
import subprocess
from functools import cache
from shutil import which

from mimic_fast.data.items import MAX_PIXELS
from mimic_fast.data.video_probe import OPENING, Video, VideoError, missing_packages
from mimic_fast.data.video_settings import FrameSettings
from mimic_fast.data.video_walk import SIZELESS
from mimic_fast.errors import UsageError

PICKED = 0  # index of the stream of picked frames; the other one is of ticks

_NAME = "VIDEO"  # stands for the file's, which ffmpeg-python only takes if it is text
_SHIFT_SECONDS = 86_400  # NUT has no negative timestamps; some videos have
_OLDEST = (5, 1)  # FFmpeg that knows -fps_mode
_SCALING = "bicubic+accurate_rnd+full_chroma_int+bitexact"  # the same bytes on every processor


@cache
def ffmpeg_binary() -> str:
    """The system's FFmpeg if it is new enough, else the one of imageio-ffmpeg.

    Raises:
        UsageError: If there is neither.
    """
    system = which("ffmpeg")
    if system is not None and _version(system) >= _OLDEST:
        return system
    try:
        import imageio_ffmpeg
    except ImportError:
        raise missing_packages() from None
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:  # it was installed without its binary
        raise UsageError(
            f"no FFmpeg found; install version {_OLDEST[0]}.{_OLDEST[1]} or newer, or run: "
            "pip install --force-reinstall imageio-ffmpeg"
        ) from None


def ffmpeg_command(video: Video, settings: FrameSettings, size: tuple[int, int]) -> list[str]:
    """Arguments of the FFmpeg process; it reads one file and writes to its standard output."""
    try:
        import ffmpeg
    except ImportError:
        raise missing_packages() from None
    file = ffmpeg.input(
        _NAME,
        **OPENING,
        max_pixels=MAX_PIXELS,
        **({} if video.container in SIZELESS else {"fflags": "+discardcorrupt"}),
        err_detect="explode",  # no frame rather than one with concealed errors
    )
    # FFmpeg itself turns what comes out of the decoder upright.
    shifted = file[str(video.stream)].filter("setpts", f"PTS+{shift(video)}").split()
    width, height = size
    picked = (
        shifted[0]
        .filter("select", _picking(settings))
        .filter("scale", width, height, flags=_SCALING)
        .filter("format", "rgb24")
    )
    side = min(2, video.width, video.height)
    ticks = (
        shifted[1]
        .filter("crop", side, side, 0, 0, exact=1)
        .filter("scale", side, side)  # without it FFmpeg may turn both branches gray
        .filter("format", "gray")
    )
    unit = video.time_base
    output = ffmpeg.output(
        picked,
        ticks,
        "pipe:1",
        format="nut",
        vcodec="rawvideo",
        fps_mode="passthrough",
        enc_time_base=f"{unit.numerator}:{unit.denominator}",
    )
    asked = output.global_args("-nostdin", "-hide_banner", "-loglevel", "repeat+error", "-copyts")
    words = [str(word) for word in ffmpeg.compile(asked, cmd=ffmpeg_binary())]
    # The protocol is named, so that no file name can name another or pass for an option.
    words[words.index(_NAME)] = f"file:{video.path}"
    return words


def target_size(size: tuple[int, int], settings: FrameSettings) -> tuple[int, int]:
    """Width and height that frames get.

    Raises:
        VideoError: If that is more than MAX_PIXELS.
    """
    short = min(size)
    wanted = settings.short_side or short
    if wanted > short and not settings.upscale:
        wanted = short
    width, height = (max(1, round(side * wanted / short)) for side in size)
    if width * height > MAX_PIXELS:
        raise VideoError(
            f"would give frames of {width} x {height} pixels, more than the {MAX_PIXELS} allowed"
        )
    return width, height


def shift(video: Video) -> int:
    """What FFmpeg adds to every pts, so that none is negative."""
    return -(-_SHIFT_SECONDS // video.time_base)


def _picking(settings: FrameSettings) -> str:
    """The expression that is positive for the frames to keep; the first one always is."""
    if settings.pick == "every":
        return "1"
    if settings.pick == "scenes":
        return f"isnan(prev_selected_t)+gt(scene,{settings.scene_threshold!r})"
    # Intervals are counted from the first frame: a late frame does not delay those after it. The
    # small term puts a frame that lies on the edge, but for rounding, into the later interval.
    place = "floor(({time}-start_t)/{interval!r}+1e-6)"
    now, before = (
        place.format(time=time, interval=settings.interval) for time in ("t", "prev_selected_t")
    )
    return f"isnan(prev_selected_t)+gt({now},{before})"


def _version(binary: str) -> tuple[int, int]:
    """Major and minor version; a build without one, made from the newest sources, is new."""
    done = subprocess.run(
        [binary, "-version"], capture_output=True, text=True, check=False, errors="replace"
    )
    match = re.match(r"ffmpeg version n?(\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else (99 if done.returncode == 0 else 0, 0)
