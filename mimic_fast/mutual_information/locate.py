"""Step A: where the benign knowledge lies, as mutual information of each layer with the features.

Han et al., "Mutual Information Guided Backdoor Mitigation for Pre-trained Encoders",
arXiv:2406.03508; method page, section 2.
"""

import io
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from mimic_fast import ops
from mimic_fast.config import MutualInformationSettings, Settings
from mimic_fast.data.augment import plain_view
from mimic_fast.data.clean_set import clean_images, write_clean_set
from mimic_fast.distributed import Processes, start
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.ingest import load_encoder, report_assumed
from mimic_fast.encoders.self_test import self_test
from mimic_fast.encoders.taps import TappedEncoder, default_taps, has_class_token
from mimic_fast.errors import UsageError
from mimic_fast.files import write_atomic
from mimic_fast.mutual_information.activations import StepA, pooled_activations
from mimic_fast.mutual_information.dv_layers import estimate_critics
from mimic_fast.mutual_information.estimate import estimate_histogram
from mimic_fast.mutual_information.figure import mutual_information_figure
from mimic_fast.mutual_information.finished_parts import FinishedParts, encoder_origin
from mimic_fast.mutual_information.histogram import choose_bins
from mimic_fast.mutual_information.ksg_layers import check_images, estimate_ksg
from mimic_fast.mutual_information.result import (
    LayerEstimate,
    LayerInformation,
    MutualInformation,
    mutual_information_json,
)
from mimic_fast.mutual_information.weights import weighted_layers
from mimic_fast.progress import Reporter, silent
from mimic_fast.recipe import settings_json

__all__ = [
    "LayerInformation",
    "MutualInformation",
    "locate",
    "locate_layers",
    "mutual_information_json",
    "write_mutual_information",
]

_SELF_TEST_IMAGES = 16
_CRITICS = ("dv", "infonce")  # trained on whole maps


def locate(
    settings: Settings,
    report: Reporter = silent,
    *,
    world: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> MutualInformation:
    """Mutual information of every layer of ``settings.encoder.teacher`` on its clean images.

    Writes config.json, clean_set.json, mutual_information.json and mutual_information.png into
    ``settings.run.out`` if that is given.

    Args:
        settings: Encoder, data, estimator, run directory.
        report: Told of progress.
        world: Processes the launcher started (its WORLD_SIZE); each of them calls.
        stop: Polled between chunks; true leaves, to be resumed.

    Raises:
        UsageError: If settings, paths, architecture or budget are wrong.
        SelfTestError: If a tap is dead, a layer not finite, or the bins too many for the images.
        UnsafeInputError: If the encoder's file is unsafe or corrupt.
        StoppedError: If ``stop`` told so.
        MachineError: If the run directory cannot be written.
    """
    _check_required(settings)
    # No student is trained: how it would be cut does not matter.
    run = settings.run.model_copy(update={"engine": "ddp", "deepspeed": None})
    _, processes = start(run, settings.optim, expected_world=world)
    out = settings.run.out
    tapped = _tapped_pair(settings, processes.device, report)
    spec = tapped["teacher"].encoder.spec
    found = clean_images(
        settings.data, spec, seed=settings.seed, world=processes.world, report=report
    )
    clean_set, images = found.clean_set, found.squares
    sample = plain_view(images[:_SELF_TEST_IMAGES], image_size=spec.image_size)
    self_test(tapped["student"], tapped["teacher"], sample.to(processes.device))
    if out is not None and processes.is_main:
        write_atomic(out / "config.json", settings_json(settings).encode())
    with ops.force_for_run(settings.run.force_op, processes.device, torch.float32):
        result = locate_layers(
            tapped[settings.mi.source],
            images,
            settings,
            names=tapped["teacher"].taps,
            processes=processes,
            state_dir=None if out is None else out / "state" / "locate",
            report=report,
            stop=stop,
        )
    if out is not None and processes.is_main:
        write_clean_set(clean_set, out)
        write_mutual_information(result, out)
    return result


def locate_layers(
    tapped: TappedEncoder,
    images: UInt8[Tensor, "image channel side side"],
    settings: Settings,
    *,
    names: Sequence[str],
    processes: Processes,
    state_dir: Path | None = None,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> MutualInformation:
    """Step A on an encoder and images at hand; bit-identical for any number of processes.

    Args:
        tapped: Whose activations are measured, on ``processes.device``; left as it was.
        images: All clean images, the same on every process; seen without augmentation.
        settings: ``mi`` and ``seed``.
        names: Name of each tap.
        processes: All of them must call.
        state_dir: Keeps finished parts, so that a killed step A goes on; None keeps nothing.
        report: Told of progress.
        stop: Polled between chunks; true leaves with the finished parts on disk.

    Raises:
        SelfTestError: If a layer is not finite, or the bins are too many for the images.
        StoppedError: If ``stop`` told so on any process.
        MachineError: If ``state_dir`` cannot be written.
    """
    began = time.perf_counter()
    mi = settings.mi
    _warn_of_ignored(tapped, settings)
    estimates: list[LayerEstimate]
    if mi.estimator in _CRITICS:
        origin = {"seed": settings.seed, mi.estimator: [mi.dv_epochs, mi.dv_batch, mi.chunk]}
        step = _step(tapped, origin, processes, state_dir, report, stop)
        estimates = estimate_critics(
            tapped, images, mi, names=tuple(names), seed=settings.seed, step=step
        )
    else:
        _check_images(mi, len(images))  # before hours of forward passes
        step = _step(tapped, {"pool": mi.pool}, processes, state_dir, report, stop)
        features, layers = pooled_activations(
            tapped, images, chunk=mi.chunk, pool=mi.pool, step=step
        )
        estimate = estimate_ksg if mi.estimator == "ksg" else estimate_histogram
        estimates = estimate(
            layers,
            features,
            mi,
            names=names,
            seed=settings.seed,
            processes=processes,
            report=report,
        )
    return MutualInformation(
        estimator=_estimator_name(mi),
        source=mi.source,
        images=len(images),
        bins=estimates[0].bins,
        layers=weighted_layers(estimates, base=mi.base, gain=mi.gain, weighting=mi.weighting),
        seconds=time.perf_counter() - began,
    )


def write_mutual_information(result: MutualInformation, out: Path) -> None:
    """Writes mutual_information.json and mutual_information.png into ``out``.

    Raises:
        MachineError: If ``out`` cannot be written.
    """
    picture = io.BytesIO()
    mutual_information_figure(result).savefig(picture, format="png", dpi=160)
    text = json.dumps(mutual_information_json(result), indent=2, allow_nan=False)
    write_atomic(out / "mutual_information.json", (text + "\n").encode())
    write_atomic(out / "mutual_information.png", picture.getvalue())


def _check_required(settings: Settings) -> None:
    if settings.encoder.teacher is None:
        raise UsageError("no encoder given; use --teacher or encoder.teacher in the recipe")
    if settings.data.source is None:
        raise UsageError("no clean images given; use --data or data.source in the recipe")
    out = settings.run.out
    if settings.run.resume == "never" and out is not None and (out / "config.json").exists():
        raise UsageError(f"{out} already holds a run; use --resume auto or another --out")


def _tapped_pair(
    settings: Settings, device: torch.device, report: Reporter
) -> dict[str, TappedEncoder]:
    assert settings.encoder.teacher is not None
    loaded = load_encoder(settings.encoder.teacher, settings.encoder)
    report_assumed(loaded, report)
    encoder = loaded.encoder
    taps = settings.encoder.taps or default_taps(encoder)
    student = build_encoder(encoder.spec, seed=settings.seed)
    return {
        "teacher": TappedEncoder(encoder.requires_grad_(False), taps).to(device),
        "student": TappedEncoder(student, taps).to(device),
    }


def _estimator_name(mi: MutualInformationSettings) -> str:
    """What the numbers were estimated by, as results and pictures say it."""
    form = {"canonical": "", "cross": ", cross pairs", "sliced": ", sliced"}[mi.pairs]
    return mi.estimator + form if mi.estimator == "histogram" else mi.estimator


def _check_images(mi: MutualInformationSettings, images: int) -> None:
    if mi.estimator == "ksg":
        check_images(images)
    else:
        choose_bins(mi.bins, images // 2, force=mi.force)


def _warn_of_ignored(tapped: TappedEncoder, settings: Settings) -> None:
    estimator = settings.mi.estimator
    if settings.mi.pairs != "canonical" and estimator != "histogram":
        warnings.warn(
            f"mi.pairs is ignored: the {estimator} estimator pairs no directions", stacklevel=3
        )
    if settings.mi.pool == "mean":
        return
    if estimator in _CRITICS:
        warnings.warn(
            f"mi.pool is ignored: the {estimator} estimator takes whole maps", stacklevel=3
        )
    elif not has_class_token(tapped.encoder):
        architecture = tapped.encoder.spec.architecture
        warnings.warn(
            f"mi.pool = 'class_token' is ignored: {architecture} has none, maps are averaged",
            stacklevel=3,
        )


def _step(
    tapped: TappedEncoder,
    origin: dict[str, Any],
    processes: Processes,
    state_dir: Path | None,
    report: Reporter,
    stop: Callable[[], bool],
) -> StepA:
    known = {} if state_dir is None else encoder_origin(tapped)  # hashing weights takes time
    parts = FinishedParts(folder=state_dir, origin={**known, **origin})
    return StepA(processes=processes, parts=parts, report=report, stop=stop)
