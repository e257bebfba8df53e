"""``mimic-fast frames VIDEO... --out DIR``: frames of videos as images or tar shards."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.launch.arguments import Json, given, print_json

_SHARD = 1000  # frames


class Format(StrEnum):
    """What a frame is written as."""

    JPG = "jpg"
    PNG = "png"


def frames(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="Videos or folders.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for frames and frames.json.")],
    interval: Annotated[
        float | None, typer.Option("--interval", help="Seconds between frames; default 1.")
    ] = None,
    every: Annotated[bool, typer.Option("--every", help="Take every frame.")] = False,
    scenes: Annotated[
        float | None,
        typer.Option(
            "--scenes",
            metavar="CHANGE",
            help="Take the first frame of every scene; CHANGE, such as 0.3, of 0..1 begins one.",
        ),
    ] = None,
    near_duplicate: Annotated[
        float | None,
        typer.Option(
            "--near-duplicate",
            metavar="SHARE",
            help="Drop frames that differ from a recent one in at most this share of a hash's "
            "bits; default 0.03.",
        ),
    ] = None,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Drop no near-duplicates.")
    ] = False,
    short_side: Annotated[
        int | None, typer.Option("--short-side", help="Shrink to this shorter side, pixels.")
    ] = None,
    upscale: Annotated[
        bool, typer.Option("--upscale", help="With --short-side: enlarge smaller frames too.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Stop after so many frames of each video.")
    ] = None,
    file_format: Annotated[
        Format, typer.Option("--format", help="Format of the frames.")
    ] = Format.JPG,
    shards: Annotated[
        bool, typer.Option("--shards", help=f"Write tar shards of {_SHARD} frames.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Take clean frames out of videos, with their times; near-duplicates are dropped.

    A truncated video gives its good frames and exit code 4.
    """
    if (interval is not None) + every + (scenes is not None) > 1:
        raise UsageError("give one of --interval, --every and --scenes")
    if keep_duplicates and near_duplicate is not None:
        raise UsageError("give one of --near-duplicate and --keep-duplicates")
    if upscale and short_side is None:
        raise UsageError("--upscale needs --short-side")
    values = given(
        pick="every" if every else "interval" if scenes is None else "scenes",
        interval=interval,
        scene_threshold=scenes,
        drop_near_duplicates=not keep_duplicates,
        near_duplicate=near_duplicate,
        short_side=short_side,
        upscale=upscale,
        limit=limit,
        file_format=file_format.value,
        shard_frames=_SHARD if shards else None,
    )
    _run(videos, out, values, as_json=as_json)


def _run(videos: list[Path], out: Path, values: dict[str, Any], *, as_json: bool) -> None:
    from pydantic import ValidationError

    from mimic_fast.data.frames import FrameSettings, extract_frames
    from mimic_fast.data.video_files import list_videos
    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.launch.tables import printable

    try:
        settings = FrameSettings(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("scene_threshold", "scenes").replace("_", "-")
        raise UsageError(f"--{option}: {problem['msg']}, got {problem['input']}") from None
    with progress_bars() as report:
        manifest = extract_frames(list_videos(videos), out, settings=settings, report=report)
    if as_json:
        summary = manifest.model_dump(mode="json", include={"settings", "videos", "failed"})
        print_json({"out": str(out), "frames": len(manifest.frames), **summary})
    else:
        for video in manifest.videos:
            typer.echo(
                f"{printable(video.path)}: {video.frames_kept} frames kept, "
                f"{video.frames_dropped} near-duplicates dropped, {video.frames_found} decoded"
            )
        typer.echo(f"{len(manifest.frames)} frames in {printable(str(out))}")
    if manifest.problems():
        raise UnsafeInputError("; ".join(manifest.problems()))
