"""What a recipe takes in: the teacher, the clean images, packages of trackers."""

import glob
from importlib.util import find_spec
from pathlib import Path

import torch

from mimic_fast import trackers
from mimic_fast.config import Settings
from mimic_fast.data.folder import find_files
from mimic_fast.data.items import IMAGE_SUFFIXES
from mimic_fast.data.video_files import VIDEO_SUFFIXES
from mimic_fast.doctor.finding import Finding, failed, ok, refused, warning
from mimic_fast.doctor.trial import Trial
from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import UnsafeInputError, UsageError


def teacher(settings: Settings) -> tuple[Finding, Encoder | None]:
    """Reads the suspect encoder as a run would, taps included."""
    asked = settings.encoder
    if asked.teacher is None:
        return failed("teacher", "none given", "use --teacher or encoder.teacher"), None
    try:
        loaded = load_encoder(asked.teacher, asked)
        tapped = TappedEncoder(loaded.encoder, asked.taps or default_taps(loaded.encoder))
    except (UsageError, UnsafeInputError) as error:
        return refused("teacher", error), None
    spec = loaded.encoder.spec
    weights = sum(parameter.numel() for parameter in loaded.encoder.parameters())
    seen = (
        f"{asked.teacher}: {spec.architecture}, {weights:,} weights, {spec.image_size} pixels, "
        f"{len(tapped.taps)} taps"
    )
    if loaded.assumed:
        todo = "give them as encoder.* if they are wrong"
        return warning(
            "teacher", f"{seen}; assumed: {', '.join(loaded.assumed)}", todo
        ), loaded.encoder
    return ok("teacher", seen), loaded.encoder


def data_opens_at_once(settings: Settings) -> bool:
    """Whether there is a source that opens in seconds: videos are decoded in whole first."""
    source = settings.data.source
    return source is not None and not _is_video(source)


def data(settings: Settings, trial: Trial | None) -> Finding:
    """What came of opening the source."""
    source = settings.data.source
    if source is None:
        return failed("data", "no clean images given", "use --data or data.source")
    if trial is None:
        if find_spec("av") is None or find_spec("ffmpeg") is None:
            todo = "pip install 'mimic_fast[video]'"
            return failed("data", f"{source} is video, whose packages are missing", todo)
        return warning("data", f"{source} is video, not opened here", "see: mimic-fast data check")
    outcome = trial.outcome()
    if outcome.worked:
        return ok("data", outcome.said)
    if outcome.late:
        return warning("data", f"opening {source}: {outcome.said}", "see: mimic-fast data check")
    seen, _, todo = outcome.said.partition("; ")
    return failed("data", seen, todo or "see: mimic-fast data check")


def tracker_packages(settings: Settings) -> Finding | None:
    """Whether the trackers asked for are installed."""
    if not settings.run.trackers:
        return None
    try:
        trackers.check_packages(settings.run.trackers)
    except UsageError as error:
        return refused("trackers", error)
    return ok("trackers", f"{', '.join(settings.run.trackers)} can be imported")


def has_dali() -> bool:
    """Whether DALI is installed."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def dali(trial: Trial | None, *, needed: bool, device: torch.device) -> Finding:
    """Whether DALI decodes here, and on what."""
    make = failed if needed else warning
    if trial is None:
        return make(
            "dali", "DALI is not installed", "pip install 'mimic_fast[dali]', or backend torch"
        )
    outcome = trial.outcome()
    where = "the GPU" if device.type == "cuda" else "the CPU; no GPU is there to decode on"
    if outcome.worked:
        return ok("dali", f"{outcome.said}, decoded on {where}")
    if outcome.late:
        return warning("dali", outcome.said, "its first start is slow; run doctor again")
    return make("dali", outcome.said, "use data.backend 'torch'")


def _is_video(source: str) -> bool:
    """Whether a source is of videos, which are decoded in whole before a run begins."""
    path = Path(source).expanduser()
    if path.is_dir():
        names = find_files(path, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".tar"))
        return bool(names) and all(name.lower().endswith(VIDEO_SUFFIXES) for name in names)
    files = [str(path)] if path.is_file() else glob.glob(str(path))
    return bool(files) and all(name.lower().endswith(VIDEO_SUFFIXES) for name in files)
