"""Step D: what can be measured of a purification, as report.json and report.html."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mimic_fast.baselines.student_only import student_only
from mimic_fast.config import DataSettings, EncoderSettings, RunSettings, Settings
from mimic_fast.data.augment import plain_view
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.evaluation.agreement import agreement
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.feature_cache import Measurable
from mimic_fast.evaluation.features import encode, place
from mimic_fast.evaluation.triggers import Trigger
from mimic_fast.mutual_information.locate import mutual_information_json
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.recipe import settings_record
from mimic_fast.report.clean_sheet import recovered_figure
from mimic_fast.report.collect import RunFacts, build_report, write_report
from mimic_fast.report.draw import draw_figures
from mimic_fast.report.examples import load_examples
from mimic_fast.report.figures import save_figures
from mimic_fast.scan.result import scan_json
from mimic_fast.scan.scan import scan
from mimic_fast.scan.settings import ScanSettings
from mimic_fast.watch import leave_if

if TYPE_CHECKING:
    from mimic_fast.distil import PurifyResult

_SCANNED_DATA = {"source", "max_item_mb", "max_megapixels"}  # what a scan reads of ``data``
_ENOUGH = 2  # held-out images below which agreement cannot be measured


def write_evidence(
    result: "PurifyResult",
    settings: Settings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measures teacher and purified encoder; writes the report into the run directory.

    Agreement on the held-out clean images is always measured; accuracy and ASR where
    ``settings.evaluation`` names labeled sets and an attack, beside the student-only floor and a
    clean encoder where it asks for them.

    Args:
        result: A finished purification.
        settings: Its settings; ``evaluation`` may have been extended since.
        report: Told of progress.
        stop: Polled all the time; true leaves, and a resumed run measures again.

    Raises:
        StoppedError: If ``stop`` told so.
    """
    paths = {"purified": result.encoder}
    if settings.evaluation.student_only:
        paths["student_only"] = _floor(result, settings, report, stop)
    if settings.evaluation.clean is not None:
        paths["clean"] = settings.evaluation.clean
    encoders: dict[str, Measurable] = {"teacher": result.teacher}
    encoders |= {role: load_encoder(path) for role, path in paths.items()}
    place((one.encoder for one in encoders.values()), settings.run)
    evaluation = evaluate_encoders(
        encoders, settings.evaluation, seed=settings.seed, report=report, stop=stop
    )
    leave_if(stop)
    scans, triggers = _scans(result, settings, report, stop)
    drawn = draw_figures(
        {role: one.encoder for role, one in encoders.items()},
        evaluation,
        settings.evaluation,
        seed=settings.seed,
        taps=settings.encoder.taps,
        power=settings.loss.attention_power,
        pool=result.pool,
        stop=stop,
    )
    if triggers:
        drawn.append(recovered_figure(triggers))
    content = build_report(
        evaluation,
        run=RunFacts(
            settings=settings_record(settings),
            clean_set={
                "source": result.clean_set.source,
                "size": len(result.clean_set.items),
                "fraction": result.clean_set.fraction,
                "sha256": result.clean_set.sha256,
                "quarantined": len(result.clean_set.quarantined),
            },
            cost={
                "seconds": result.seconds,
                "images_per_second": result.trained.images_per_second,
                "peak_memory_bytes": peak_memory_bytes(),
                "steps": result.trained.steps,
                "skipped_steps": result.trained.skipped,
            },
            provenance={"teacher_file": result.teacher.path.name},
        ),
        agreement=_agreement(result, stop),
        mutual_information=mutual_information_json(result.mutual_information),
        scan=scans,
        figures=save_figures(result.out, drawn),
    )
    spec = result.purified.spec
    examples = load_examples(
        evaluation, settings.evaluation, image_size=spec.image_size, channels=spec.in_channels
    )
    write_report(result.out, content, metrics=result.out / "metrics.jsonl", examples=examples)
    return content


def peak_memory_bytes() -> int:
    """Largest memory of this process so far: on the GPU if one was used, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _floor(
    result: "PurifyResult", settings: Settings, report: Reporter, stop: Callable[[], bool]
) -> Path:
    """Trains the student-only floor on the same images into ``student_only/``; resumable."""
    report(Event(phase="student_only", message="training the student-only floor"))
    run = settings.run.model_copy(update={"out": result.out / "student_only"})
    floor = student_only(
        result.purified.spec,
        result.pool[: len(result.pool) - result.clean_set.hold_out],
        settings=settings.model_copy(update={"run": run}),
        report=report,
        stop=stop,
    )
    assert floor.path is not None
    return floor.path


def _scans(
    result: "PurifyResult", settings: Settings, report: Reporter, stop: Callable[[], bool]
) -> tuple[dict[str, Any], dict[str, Trigger]]:
    """Scans of teacher and purified encoder in ``scan/ROLE``, and the triggers they recovered.

    Both use the same scans of the references, in ``scan/references``.
    """
    scans: dict[str, Any] = {}
    triggers: dict[str, Trigger] = {}
    if not settings.evaluation.scan:
        return scans, triggers
    teacher = settings.encoder.model_copy(update={"teacher": result.teacher.path})
    for role, encoder in (
        ("teacher", teacher),
        ("purified", EncoderSettings(teacher=result.encoder)),
    ):
        scanned = scan(
            scan_settings(settings, encoder, result.out / "scan" / role),
            report=report,
            stop=stop,
            reference_scans=result.out / "scan" / "references",
        )
        scans[role] = scan_json(scanned.scanned, scanned.verdict)
        if scanned.trigger is not None:
            triggers[role] = scanned.trigger
    return scans, triggers


def scan_settings(settings: Settings, encoder: EncoderSettings, out: Path) -> ScanSettings:
    """A purification's settings as those of a scan of one of its encoders, into ``out``."""
    return ScanSettings(
        seed=settings.seed,
        encoder=encoder,
        data=DataSettings(**settings.data.model_dump(include=_SCANNED_DATA)),
        references=settings.evaluation.scan_references,
        run=RunSettings(out=out, resume="auto", device=settings.run.device, checkpoint_every=25),
    )


def _agreement(result: "PurifyResult", stop: Callable[[], bool]) -> dict[str, Any] | None:
    held_out = result.clean_set.hold_out
    if held_out < _ENOUGH:
        return None
    images = plain_view(result.pool[-held_out:], image_size=result.purified.spec.image_size)
    teacher = result.teacher.encoder.to("cpu", torch.float32)
    features = [encode(encoder, images, stop=stop) for encoder in (teacher, result.purified)]
    leave_if(stop)
    return agreement(*features)
