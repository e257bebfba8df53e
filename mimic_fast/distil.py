"""purify(): locate the benign knowledge, distil it into a random student, export, measure.

Method: Han et al., "Mutual Information Guided Backdoor Mitigation for Pre-trained Encoders",
arXiv:2406.03508.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mimic_fast import ops
from mimic_fast.after_passes import Watched, after_passes, check_held_out, check_watched
from mimic_fast.batchnorm import synchronize_batchnorm
from mimic_fast.checkpoint import newest_meta, refuse_other_run
from mimic_fast.config import (
    DataSettings,
    EvaluationSettings,
    RunSettings,
    Settings,
    StudentSettings,
)
from mimic_fast.data.augment import plain_view
from mimic_fast.data.clean_set import CleanSet, clean_images, write_clean_set
from mimic_fast.data.loader import TrainingImages, choose_backend
from mimic_fast.data.order import check_batch
from mimic_fast.distributed import Processes, restarted, start, wait_for_all
from mimic_fast.encoders.blocks import blocks
from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import LoadedEncoder, load_encoder, report_assumed
from mimic_fast.encoders.self_test import self_test
from mimic_fast.encoders.taps import (
    TappedEncoder,
    attention_free_taps,
    default_taps,
)
from mimic_fast.engines.fsdp2 import shard
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.checks import check_measurement
from mimic_fast.files import machine_errors, write_atomic
from mimic_fast.first_weights import FirstWeights, first_weights
from mimic_fast.mutual_information.locate import (
    MutualInformation,
    locate_layers,
    write_mutual_information,
)
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.recipe import settings_json, settings_record
from mimic_fast.step import Student, whole_encoder
from mimic_fast.training import Task, Trained, train

if TYPE_CHECKING:
    from accelerate import Accelerator

_NO_EVALUATION = EvaluationSettings()
_DATA = DataSettings()


@dataclass(frozen=True, kw_only=True, slots=True)
class PurifyResult:
    """What a purification leaves behind.

    Args:
        out: Run directory.
        encoder: Path of the purified encoder.
        purified: The encoder itself, on CPU, in eval mode.
        teacher: The suspect encoder it was distilled from.
        clean_set: The images used.
        pool: Those images decoded, uint8 ``[n, C, S, S]``; the last ``clean_set.hold_out`` were
            held out.
        mutual_information: Step A's result.
        trained: Cost of step B.
        seconds: Wall time of the whole call.
    """

    out: Path
    encoder: Path
    purified: Encoder
    teacher: LoadedEncoder
    clean_set: CleanSet
    pool: Tensor
    mutual_information: MutualInformation
    trained: Trained
    seconds: float


def purify(
    settings: Settings,
    *,
    world: int = 1,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> PurifyResult:
    """Purifies ``settings.encoder.teacher`` with clean images of ``settings.data.source``.

    Writes into ``settings.run.out``: config.json, clean_set.json, mutual_information.json,
    metrics.jsonl, state/, encoder.safetensors and encoder.json. Under torchrun every process calls
    it.

    Args:
        settings: Everything.
        world: Processes the launcher started (its WORLD_SIZE).
        report: Told of all progress.
        stop: Polled between chunks and steps; true saves the state and leaves.

    Raises:
        UsageError: If settings, paths, architecture or budget are wrong.
        SelfTestError: If a tap is dead or the mutual information unhealthy.
        UnsafeInputError: If the teacher's file is unsafe or corrupt.
        DivergedError: If training diverged.
        StoppedError: If ``stop`` told so.
        MachineError: If the run directory cannot be written.
    """
    began = time.perf_counter()
    if settings.evaluation.student_only and world > 1:
        raise UsageError(
            f"evaluation.student_only trains in one process, {world} run; leave it out here"
        )
    _check_settings(settings)
    accelerator, processes = start(settings.run, settings.optim, expected_world=world)
    if restarted(processes):
        run = settings.run.model_copy(update={"resume": "auto"})
        settings = settings.model_copy(update={"run": run})
    out = _checked_directory(settings.run)
    wait_for_all(processes)  # all have looked for an earlier run before one writes
    report(Event(phase="start", message=_running(processes, settings)))
    dtype = torch.float64 if settings.optim.precision == "fp64" else torch.float32
    with ops.force_for_run(settings.run.force_op, processes.device, dtype):
        return _purify(settings, out, began, accelerator, processes, report, stop)


def _purify(
    settings: Settings,
    out: Path,
    began: float,
    accelerator: "Accelerator",
    processes: Processes,
    report: Reporter,
    stop: Callable[[], bool],
) -> PurifyResult:
    setup = _set_up(settings, processes, report)
    if processes.is_main:
        write_atomic(out / "config.json", settings_json(settings).encode())
        write_clean_set(setup.clean_set, out)
    information = locate_layers(
        setup.teacher_taps if settings.mi.source == "teacher" else setup.student_taps,
        setup.pool,
        settings,
        names=setup.teacher_taps.taps,
        processes=processes,
        state_dir=out / "state" / "locate",
        report=report,
        stop=stop,
    )
    if processes.is_main:
        write_mutual_information(information, out)
    trained = _distil(setup, information, settings, accelerator, processes, report, stop)
    purified = whole_encoder(setup.student_taps.encoder, trained.whole, seed=settings.seed)
    path = out / "encoder.safetensors"
    if processes.is_main:
        card = _card(setup, information, settings, trained)
        path = export_encoder(purified, out, key_map=setup.teacher.key_map, card=card)
    wait_for_all(processes)
    return PurifyResult(
        out=out,
        encoder=path,
        purified=purified,
        teacher=_whole_teacher(setup.teacher, settings),
        clean_set=setup.clean_set,
        pool=setup.pool,
        mutual_information=information,
        trained=trained,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    teacher: LoadedEncoder
    teacher_taps: TappedEncoder
    student_taps: TappedEncoder
    clean_set: CleanSet
    pool: Tensor
    training: TrainingImages
    without_attention: tuple[str, ...]
    identity: dict[str, Any]
    trusted: str | None


def _set_up(settings: Settings, processes: Processes, report: Reporter) -> _Setup:
    """Teacher, clean images and student, all checked before anything is computed or written."""
    assert settings.encoder.teacher is not None
    teacher = load_encoder(settings.encoder.teacher, settings.encoder)
    report_assumed(teacher, report)
    spec = teacher.encoder.spec
    check_measurement(settings.evaluation, spec, seed=settings.seed)
    first = first_weights(teacher, settings.student, seed=settings.seed)
    images = clean_images(
        settings.data, spec, seed=settings.seed, world=processes.world, report=report
    )
    clean_set, pool = images.clean_set, images.squares
    identity = _identity(settings, teacher, clean_set, first)
    _check_state(settings.run, identity)
    training = TrainingImages(squares=pool[: len(pool) - clean_set.hold_out], files=images.files)
    check_held_out(settings, clean_set.hold_out)
    check_batch(len(training), batch_size=settings.optim.batch_size, processes=processes)
    backend, reason = choose_backend(
        training, settings=settings, image_size=spec.image_size, device=processes.device
    )
    report(Event(phase="data", message=f"views by {backend.name}: {reason}"))
    taps = settings.encoder.taps or default_taps(teacher.encoder)
    teacher.encoder.requires_grad_(False)
    teacher_taps = _placed_teacher(TappedEncoder(teacher.encoder, taps), settings, processes)
    # No weight or buffer of the teacher enters the student.
    student_taps = TappedEncoder(first.encoder, taps)
    student_taps.to(processes.device)
    sample = plain_view(pool[:16], image_size=spec.image_size).to(processes.device)
    self_test(student_taps, teacher_taps, sample)
    synchronize_batchnorm(student_taps, processes)
    return _Setup(
        teacher=teacher,
        teacher_taps=teacher_taps,
        student_taps=student_taps,
        clean_set=clean_set,
        pool=pool,
        training=training,
        without_attention=attention_free_taps(teacher_taps),
        identity=identity,
        trusted=first.sha256,
    )


def _placed_teacher(
    tapped: TappedEncoder, settings: Settings, processes: Processes
) -> TappedEncoder:
    """Whole on this process's device, or cut over all of them."""
    tapped.eval()
    if not settings.encoder.teacher_shard:
        return tapped.to(processes.device)
    if not dist.is_initialized():
        raise UsageError(
            "encoder.teacher_shard cuts the teacher over processes and needs a launcher: "
            "torchrun --nproc-per-node=N -m mimic_fast ..."
        )
    shard(tapped.encoder, blocks(tapped), processes)
    return tapped


def _distil(
    setup: _Setup,
    information: MutualInformation,
    settings: Settings,
    accelerator: "Accelerator",
    processes: Processes,
    report: Reporter,
    stop: Callable[[], bool],
) -> Trained:
    weights = tuple(
        0.0
        if layer.tap in setup.without_attention or settings.loss.attention_weight == 0
        else layer.weight
        for layer in information.layers
    )
    if setup.without_attention:
        names = ", ".join(setup.without_attention)
        report(Event(phase="distil", message=f"no attention loss on 1x1 maps: {names}"))
    projection = settings.loss.projection if settings.loss.contrastive > 0 else 0
    student = Student(setup.student_taps, projection=projection, seed=settings.seed)
    task = Task(
        student=student.to(processes.device),
        teacher=setup.teacher_taps,
        layer_weights=weights,
        images=setup.training,
        fingerprint={**setup.identity, "layer_weights": list(weights)},
        out=settings.run.out,
    )
    watched = Watched(
        student=setup.student_taps.encoder,
        teacher=setup.teacher,
        held_out=setup.pool[len(setup.training) :],
    )
    return train(
        task,
        settings=settings,
        accelerator=accelerator,
        processes=processes,
        report=report,
        stop=stop,
        on_epoch=after_passes(watched, settings, processes=processes, report=report, stop=stop),
    )


def _whole_teacher(teacher: LoadedEncoder, settings: Settings) -> LoadedEncoder:
    """Read once more where it was cut: what comes now is process 0's alone."""
    if not settings.encoder.teacher_shard:
        return teacher
    return load_encoder(teacher.path, settings.encoder)


def _check_settings(settings: Settings) -> None:
    """What can be refused before any process talks to another."""
    if settings.encoder.teacher is None:
        raise UsageError("no teacher given; use --teacher or encoder.teacher in the recipe")
    if settings.data.source is None:
        raise UsageError("no clean images given; use --data or data.source in the recipe")
    if settings.run.out is None:
        raise UsageError("no run directory given; use --out or run.out in the recipe")
    check_watched(settings)
    if settings.encoder.teacher_shard and settings.optim.precision == "fp64":
        raise UsageError("encoder.teacher_shard keeps float32 weights; use another precision")
    if settings.encoder.teacher_shard and settings.mi.estimator in ("dv", "infonce"):
        raise UsageError(
            f"encoder.teacher_shard cannot run with mi.estimator '{settings.mi.estimator}', which "
            "processes compute each for themselves; use 'histogram'"
        )


def _checked_directory(run: RunSettings) -> Path:
    """The run directory, made if absent, or an error before any work is done."""
    out = run.out
    assert out is not None
    if run.resume == "never" and (out / "config.json").exists():
        raise UsageError(f"{out} already holds a run; use --resume auto or another --out")
    with machine_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    return out


def _card(
    setup: _Setup, information: MutualInformation, settings: Settings, trained: Trained
) -> dict[str, Any]:
    return {
        "kind": "purified",
        "teacher": {"sha256": setup.teacher.sha256, "format": setup.teacher.format},
        "clean_set": {
            "sha256": setup.clean_set.sha256,
            "size": len(setup.clean_set.items),
            "fraction": setup.clean_set.fraction,
        },
        "student": {"init": settings.student.init, "sha256": setup.trusted},
        "layer_weights": {layer.tap: layer.weight for layer in information.layers},
        "steps": trained.steps,
        "settings": settings_record(settings),
    }


def _identity(
    settings: Settings, teacher: LoadedEncoder, clean_set: CleanSet, first: FirstWeights
) -> dict[str, Any]:
    """What decides the weights, as far as it is known before step A; where they are written is not.

    The specification stands beside the teacher's digest: part of it may come from a card.
    """
    run = RunSettings(max_steps=settings.run.max_steps)
    # Where squares lie and how far ahead batches are made changes no pixel.
    same = {name: getattr(_DATA, name) for name in ("cache", "cache_dir", "workers", "prefetch")}
    decisive = settings.model_copy(
        update={
            "run": run,
            "evaluation": _NO_EVALUATION,
            "data": settings.data.model_copy(update=same),
            "student": StudentSettings(),  # the checkpoint's digest stands for it
        }
    )
    return {
        "kind": "purify",
        "teacher": teacher.sha256,
        "spec": teacher.encoder.spec.model_dump(mode="json"),
        "student": first.sha256,
        "clean_set": clean_set.sha256,
        "settings": settings_json(decisive),
    }


def _check_state(run: RunSettings, identity: dict[str, Any]) -> None:
    """Refuses another run's state now: step A and its files would come before training looks."""
    assert run.out is not None
    found = newest_meta(run.out / "state") if run.resume == "auto" else None
    if found is not None:
        refuse_other_run(*found, identity)


def _running(processes: Processes, settings: Settings) -> str:
    return (
        f"{processes.world} process(es) on {processes.device.type}, engine {settings.run.engine}, "
        f"precision {settings.optim.precision}, preset {settings.preset}"
    )
