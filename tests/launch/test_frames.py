"""``mimic-fast frames`` in processes of its own: what it prints, and its exit codes."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("av", reason="needs the extra 'video'")
pytest.importorskip("ffmpeg", reason="needs the extra 'video'")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs the extra 'video'")


@pytest.fixture
def make_video(tmp_path) -> Callable[[str], Path]:
    """Three seconds of a moving picture."""
    (tmp_path / "videos").mkdir()

    def make(name: str) -> Path:
        path = tmp_path / "videos" / name
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-f", "lavfi"]
        drawn = ("-t", "3", "-i", "mandelbrot=size=64x48:rate=10")
        subprocess.run([*command, *drawn, "-movflags", "+faststart", path], check=True)
        return path

    return make


def truncate(path: Path) -> Path:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 6 // 10)
    return path


def test_frames_of_a_folder_are_written_and_counted(cli, make_video, tmp_path):
    make_video("a.mp4")
    make_video("b.mkv")

    done = cli("frames", "videos", "--out", "out", "--interval", "0.5", "--short-side", "24")

    assert done.code == 0, done.err
    assert done.err == ""
    assert done.out.splitlines() == [
        "videos/a.mp4: 6 frames kept, 0 near-duplicates dropped, 30 decoded",
        "videos/b.mkv: 6 frames kept, 0 near-duplicates dropped, 30 decoded",
        "12 frames in out",
    ]
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 12


def test_json_is_one_object(cli, make_video, tmp_path):
    done = cli(
        *("frames", make_video("a.mp4"), "--out", "out", "--every", "--keep-duplicates"),
        *("--limit", "7", "--format", "png", "--shards", "--json"),
    )

    assert done.code == 0, done.err
    assert (done.json["frames"], done.json["out"], done.json["failed"]) == (7, "out", [])
    assert done.json["videos"][0]["limited"]
    written = json.loads((tmp_path / "out" / "frames.json").read_text())
    assert written["videos"] == done.json["videos"]
    assert {frame["shard"] for frame in written["frames"]} == {"frames-000000.tar"}


def test_truncated_video_gives_its_good_frames_and_exit_4(cli, make_video, tmp_path):
    torn = truncate(make_video("torn.mp4"))
    whole = make_video("whole.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"")

    done = cli("frames", torn, "bad.mp4", whole, "--out", "out", "--json")

    assert done.code == 4
    kept = done.json["videos"][0]["frames_kept"]
    assert f"torn.mp4 is truncated or damaged (it ends within a packet); its {kept} " in done.error
    assert "bad.mp4 is empty" in done.error
    assert done.json["frames"] == kept + 3 == len(list((tmp_path / "out").glob("*.jpg")))


@pytest.mark.parametrize("content", [b"", b"nothing to see\n" * 50])
def test_no_video_is_exit_4_and_nothing_is_written(cli, tmp_path, content):
    (tmp_path / "bad.mp4").write_bytes(content)

    done = cli("frames", "bad.mp4", "--out", "out")

    assert done.code == 4
    assert "nothing was written" in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.mp4", "--out", "out"), "absent.mp4 does not exist"),
        (("a.mp4", "--out", "taken"), "taken holds files"),
        (
            ("a.mp4", "--out", "out", "--every", "--interval", "2"),
            "give one of --interval, --every",
        ),
        (("a.mp4", "--out", "out", "--upscale"), "--upscale needs --short-side"),
        (("a.mp4", "--out", "out", "--interval", "0"), "--interval: Input should be greater"),
        (("a.mp4", "--out", "out", "--scenes", "2"), "--scenes: Input should be less than 1"),
        (
            ("a.mp4", "--out", "out", "--keep-duplicates", "--near-duplicate", "0.1"),
            "give one of --near-duplicate and --keep-duplicates",
        ),
        (("a.mp4",), "Missing option '--out'"),
        (("--out", "out"), "Missing argument"),
    ],
)
def test_wrong_command_line_is_exit_2(cli, tmp_path, arguments, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years")
    (tmp_path / "a.mp4").write_bytes(b"")

    done = cli("frames", *arguments)

    assert done.code == 2
    assert message in done.error
    assert not (tmp_path / "out").exists()
