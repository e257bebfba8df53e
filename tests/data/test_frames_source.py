"""Videos as a data source: frames are extracted once and found again."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mimic_fast.config import DataSettings
from mimic_fast.data import video_source
from mimic_fast.data.clean_set import draw_clean_set
from mimic_fast.data.items import CorruptItemError, Limits
from mimic_fast.data.video_source import VIDEO_SUFFIXES, open_video
from mimic_fast.errors import UnsafeInputError, UsageError

pytest.importorskip("av", reason="needs the extra 'video'")
pytest.importorskip("ffmpeg", reason="needs the extra 'video'")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs the extra 'video'")


@pytest.fixture
def make_video(tmp_path) -> Callable[..., Path]:
    """``make_video(name, source, seconds)``: a small video in a folder of videos."""
    (tmp_path / "videos").mkdir()

    def make(name: str, source: str = "testsrc", seconds: float = 4) -> Path:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error"]
        path = tmp_path / "videos" / name
        drawn = f"{source}=size=96x64:rate=10"
        inputs = ("-f", "lavfi", "-t", str(seconds), "-i", drawn, "-movflags", "+faststart")
        subprocess.run([*command, *inputs, "-c:v", "libx264", path], check=True)
        return path

    return make


@pytest.fixture
def no_extraction(monkeypatch) -> Callable[[], None]:
    """Call it, and any extraction from then on fails the test."""

    def forbid() -> None:
        monkeypatch.setattr(
            video_source, "extract_frames", lambda *a, **b: pytest.fail("extracts again")
        )

    return forbid


def test_video_is_a_source_and_is_extracted_once(make_video, tmp_path, no_extraction):
    video = make_video("clip.mp4", "mandelbrot")

    first = open_video([video], name="clip.mp4", cache=tmp_path / "cache")
    no_extraction()
    second = open_video([video], name="clip.mp4", cache=tmp_path / "cache")

    assert first.keys == tuple(f"clip_000000{second}000000us.jpg" for second in range(4))
    assert second.keys == first.keys
    assert [first.read(index) for index in range(4)] == [second.read(index) for index in range(4)]
    assert first.decode(first.read(0)).shape == (3, 64, 96)
    assert (first.name, first.labels, first.classes) == ("clip.mp4", None, None)


def test_keys_and_bytes_depend_on_neither_the_cache_nor_the_order(make_video, tmp_path):
    videos = [make_video("b.mp4", "mandelbrot"), make_video("a.mp4", "testsrc2")]

    one = open_video(videos, name="x", cache=tmp_path / "one")
    two = open_video(videos[::-1], name="x", cache=tmp_path / "two")
    folder = open_video([tmp_path / "videos"], name="x", cache=tmp_path / "two")

    assert one.keys == two.keys == folder.keys
    assert {key[0] for key in one.keys} == {"a", "b"}
    assert [one.read(index) for index in range(len(one))] == [
        two.read(index) for index in range(len(two))
    ]


def test_renamed_copy_finds_its_frames_and_a_changed_video_does_not(
    make_video, tmp_path, no_extraction
):
    video = make_video("clip.mp4", "mandelbrot")
    cache = tmp_path / "cache"
    first = open_video([video], name="x", cache=cache)
    other = make_video("clip2.mp4", "testsrc2")
    renamed = video.rename(video.with_name("other.name.mp4"))

    changed = open_video([other], name="x", cache=cache)
    no_extraction()
    again = open_video([renamed], name="x", cache=cache)

    assert [key.replace("other_name", "clip") for key in again.keys] == list(first.keys)
    assert again.read(0) == first.read(0) != changed.read(0)


def test_same_stem_and_same_content_are_told_apart(make_video, tmp_path):
    first, second = make_video("clip.mp4", "mandelbrot"), make_video("clip.mkv", "testsrc2")
    copy = tmp_path / "videos" / "copy.mp4"
    copy.write_bytes(first.read_bytes())

    source = open_video([copy, second, first], name="x", cache=tmp_path / "cache")

    assert {key.rpartition("_")[0] for key in source.keys} == {"clip", "clip_2"}


def test_settings_have_frames_of_their_own(make_video, tmp_path):
    video = make_video("clip.mp4", "mandelbrot")
    denser = video_source.SOURCE_FRAMES.model_copy(update={"interval": 0.5, "shard_frames": 2})

    usual = open_video([video], name="x", cache=tmp_path / "cache")
    dense = open_video([video], name="x", cache=tmp_path / "cache", settings=denser)

    assert (len(usual), len(dense)) == (4, 8)
    assert set(usual.keys) < set(dense.keys)


def test_truncated_video_warns_each_time_and_gives_its_good_frames(make_video, tmp_path):
    video = make_video("clip.mp4", "mandelbrot")
    with video.open("r+b") as file:
        file.truncate(video.stat().st_size * 6 // 10)

    for _ in range(2):
        with pytest.warns(UserWarning, match=r"clip.mp4 is truncated .* were kept; going on"):
            source = open_video([video], name="x", cache=tmp_path / "cache")
        assert 1 <= len(source) < 4


def test_bad_video_among_good_ones_warns_and_alone_is_refused(make_video, tmp_path):
    video = make_video("clip.mp4", "mandelbrot")
    bad = tmp_path / "videos" / "bad.mp4"
    bad.write_bytes(b"no video")

    with pytest.warns(UserWarning, match=r"bad\.mp4 is not a video"):
        source = open_video([video, bad], name="x", cache=tmp_path / "cache")
    with pytest.raises(UnsafeInputError, match=r"'x' gives no frame: .*bad\.mp4 is not a video"):
        open_video([bad], name="x", cache=tmp_path / "cache")

    assert len(source) == 4


def test_lost_frame_is_a_corrupt_item_and_a_damaged_manifest_is_refused(make_video, tmp_path):
    video = make_video("clip.mp4", "mandelbrot")
    source = open_video([video], name="x", cache=tmp_path / "cache")
    frame = next((tmp_path / "cache").rglob("clip_0000001*.jpg"))
    frame.unlink()

    with pytest.raises(CorruptItemError, match="cannot be read"):
        source.read(1)
    frame.with_name("frames.json").write_text("{}")
    with pytest.raises(UnsafeInputError, match=r"frames\.json is damaged.*remove"):
        open_video([video], name="x", cache=tmp_path / "cache")


def test_process_that_comes_second_uses_what_the_first_made(make_video, tmp_path, monkeypatch):
    video = make_video("clip.mp4", "mandelbrot")
    extract = video_source.extract_frames

    def slow(*arguments, **settings):
        extract(*arguments, **settings)  # the other process
        return extract(*arguments, **settings)

    monkeypatch.setattr(video_source, "extract_frames", slow)

    source = open_video([video], name="x", cache=tmp_path / "cache")

    assert len(source) == 4
    assert len(list((tmp_path / "cache" / "video_frames").iterdir())) == 1


def test_a_clean_set_is_drawn_from_a_video(make_video, tmp_path):
    video = make_video("clip.mp4", "mandelbrot")
    source = open_video([video], name="clip.mp4", cache=tmp_path / "cache")

    settings = DataSettings(clean_fraction=1, allow_budget=True)
    clean_set = draw_clean_set(source, settings, seed=1)

    assert sorted(item.key for item in clean_set.items) == list(source.keys)


def test_limits_and_missing_files_are_named(make_video, tmp_path):
    video = make_video("clip.mp4", "mandelbrot")

    source = open_video(
        [video], name="x", cache=tmp_path / "cache", limits=Limits(max_pixels=96 * 64 - 1)
    )

    with pytest.raises(CorruptItemError, match="pixels"):
        source.decode(source.read(0))
    with pytest.raises(UsageError, match="does not exist"):
        open_video([tmp_path / "absent.mp4"], name="x")


def test_importing_the_source_imports_no_video_package():
    code = (
        "import sys, mimic_fast.data.video_source;"
        "assert not {'av', 'ffmpeg', 'imageio_ffmpeg'} & set(sys.modules)"
    )

    assert ".mp4" in VIDEO_SUFFIXES
    subprocess.run([sys.executable, "-c", code], check=True)
