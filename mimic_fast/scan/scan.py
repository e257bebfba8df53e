"""``scan()``: measure an encoder, compare it with clean ones, write what was found."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from mimic_fast.config import CLEAN_SET_FIELDS, EncoderSpec, RunSettings
from mimic_fast.data.images import load_images
from mimic_fast.data.order import epoch_order
from mimic_fast.data.sources import limits_of, open_source
from mimic_fast.encoders.ingest import LoadedEncoder, load_encoder, report_assumed
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import Attack, write_attack
from mimic_fast.evaluation.triggers import Trigger
from mimic_fast.mutual_information.finished_parts import FinishedParts, tensor_digest
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.recipe import warn_ignored
from mimic_fast.scan.forms import ADDITIVE
from mimic_fast.scan.measure import Measured, Recovered, measure
from mimic_fast.scan.references import References, collect, reference_files
from mimic_fast.scan.result import Scanned, Verdict, read_scan, write_scan
from mimic_fast.scan.settings import ScanSettings, protocol
from mimic_fast.scan.verdict import ENOUGH, judge

_UNUSED_DATA = (
    *CLEAN_SET_FIELDS, "backend", "decode", "cache", "cache_dir", "workers", "prefetch",
    "view_pool", "crop_scale", "crop_ratio", "flip", "jitter", "jitter_probability", "grayscale",
)  # fmt: skip
_UNUSED_RUN = ("engine", "deepspeed", "async_save", "trackers", "keep", "max_steps", "force_op")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanResult:
    """An encoder's scores and what they say.

    Args:
        scanned: The scores.
        verdict: None without enough references.
        references: The clean encoders compared with, and those left out.
        trigger: The recovered trigger that ``attack.json`` names; None if no level was reached.
        form: Of that trigger: ``patch`` or ``additive``.
        out: Where everything was written; None: nowhere.
    """

    scanned: Scanned
    verdict: Verdict | None
    references: References
    trigger: Trigger | None
    form: str | None
    out: Path | None


def scan(
    settings: ScanSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> ScanResult:
    """Scans an encoder without trigger and without labels.

    Writes ``scan.json``, and the recovered trigger as ``trigger.safetensors`` with an
    ``attack.json`` that evaluations read (no reference image: the target is the class that most
    triggered images go to).

    Raises:
        UsageError: If encoder, images or device are missing, too few, or the output directory holds
            a scan that is not to be resumed.
        UnsafeInputError: If the encoder's file or features are damaged.
        StoppedError: If ``stop`` told so; what is finished is kept.
    """
    run = settings.run
    if settings.encoder.teacher is None or settings.data.source is None:
        raise UsageError("a scan needs encoder.teacher (--encoder) and data.source (--data)")
    if run.out is not None and run.resume == "never" and _begun(run.out):
        raise UsageError(f"{run.out} already holds a scan; use --resume auto or another --out")
    warn_ignored(settings.data, _UNUSED_DATA, prefix="data", user="a scan")
    warn_ignored(settings.run, _UNUSED_RUN, prefix="run", user="a scan")
    device = _device(run)
    if settings.references is not None:
        reference_files(settings.references)  # a mistake shall not cost a scan
    suspect = load_encoder(settings.encoder.teacher, settings.encoder)
    report_assumed(suspect, report)
    images, source = _clean_images(settings, suspect.encoder.spec, report)

    def scores_of(loaded: LoadedEncoder, folder: Path | None) -> tuple[Scanned, Measured]:
        began = time.perf_counter()
        parts = _parts(loaded, settings, folder, device)
        found = measure(
            loaded.encoder, images, settings, parts=parts, device=device, report=report, stop=stop
        )
        scanned = Scanned(
            name=loaded.path.name,
            sha256=loaded.sha256,
            family=_family(loaded.encoder.spec),
            images=tensor_digest(images),
            source=source,
            protocol=protocol(settings),
            scores=found.scores,
            seconds=time.perf_counter() - began,
            device=_device_name(device),
        )
        return scanned, found

    scanned, found = scores_of(suspect, run.out)
    references = References()
    if settings.references is not None:

        def reference(path: Path) -> Scanned:
            return _reference(path, scanned, settings, scores_of, report)

        references = collect(settings.references, scanned, scan=reference)
    return _finish(settings, scanned, found, references, report)


def _reference(
    path: Path,
    scanned: Scanned,
    settings: ScanSettings,
    scores_of: Callable[[LoadedEncoder, Path | None], tuple[Scanned, Measured]],
    report: Reporter,
) -> Scanned:
    """A clean encoder's scores, kept in the run for the next time."""
    loaded = load_encoder(path, settings.encoder.model_copy(update={"teacher": path}))
    if _family(loaded.encoder.spec) != scanned.family:
        raise UsageError("is of another architecture or input size")
    out = settings.run.out
    folder = None if out is None else out / "references" / loaded.sha256[:12]
    kept = None if folder is None else folder / "scan.json"
    if kept is not None and kept.is_file():
        known = read_scan(kept)
        if (known.sha256, known.protocol, known.images) == (
            loaded.sha256, scanned.protocol, scanned.images
        ):  # fmt: skip
            return known
    report(Event(phase="scan", message=f"reference {path}"))
    other, _ = scores_of(loaded, folder)
    if kept is not None:
        write_scan(kept, other, verdict=None, references=(), left_out={}, trigger=None)
    return other


def _finish(
    settings: ScanSettings,
    scanned: Scanned,
    found: Measured,
    references: References,
    report: Reporter,
) -> ScanResult:
    """Judges, and writes what there is to write."""
    used = list(references.used.values())
    verdict = judge(scanned, used, unusual=settings.unusual, suspicious=settings.suspicious)
    if settings.references is not None and verdict is None:
        message = f"{len(used)} comparable references, {ENOUGH} are needed: scores, no verdict"
        report(Event(phase="scan", message=message))
    for name, reason in references.left_out.items():
        report(Event(phase="scan", message=f"reference {name} left out: {reason}"))
    best = telling(found.triggers, verdict)
    trigger = None if best is None else _as_trigger(best)
    out = settings.run.out
    if out is not None:
        facts = None if best is None else _facts(best)
        if trigger is not None and facts is not None:
            attack = Attack(kind="recovered", trigger=trigger, reference=None, facts=facts)
            write_attack(out, attack)
        write_scan(
            out / "scan.json",
            scanned,
            verdict=verdict,
            references=used,
            left_out=references.left_out,
            trigger=facts,
        )
    return ScanResult(
        scanned=scanned,
        verdict=verdict,
        references=references,
        trigger=trigger,
        form=None if best is None else best.form,
        out=out,
    )


def telling(triggers: Sequence[Recovered], verdict: Verdict | None) -> Recovered | None:
    """The trigger whose size is most out of the ordinary; without a verdict the first pasted one.

    Of one form the trigger of the highest level reached is taken: it works best.
    """
    firsts: dict[str, Recovered] = {}
    for trigger in triggers:
        if trigger.inverted.reached:
            firsts.setdefault(trigger.form, trigger)
    if not firsts or verdict is None:
        return next(iter(firsts.values()), None)
    outlying = {
        form: max(c.deviations for c in verdict.comparisons if c.name.startswith(f"{form} size"))
        for form in firsts
    }
    return firsts[max(outlying, key=lambda form: outlying[form])]


def _as_trigger(best: Recovered) -> Trigger:
    name, found = f"recovered_{best.form}", best.inverted
    mask = found.mask.detach().cpu().float().clamp(0, 1).contiguous()
    pattern = found.pattern.detach().cpu().float().contiguous()
    if best.form == ADDITIVE.name:
        return Trigger(name=name, mask=mask, pattern=pattern, add=True)
    return Trigger(name=name, mask=mask, pattern=pattern)


def _facts(best: Recovered) -> dict[str, Any]:
    return {
        "form": best.form,
        "level": best.level,
        "size": best.inverted.size,
        "held_out_cosine": best.held_out,
    }


def _clean_images(
    settings: ScanSettings, spec: EncoderSpec, report: Reporter
) -> tuple[UInt8[Tensor, "image channel height width"], str]:
    """A seeded draw of clean images as an evaluation sees them, and the source's name."""
    assert settings.data.source is not None
    source = open_source(settings.data.source, limits=limits_of(settings.data), report=report)
    least = 2 * settings.batch_size
    if len(source) < least:
        raise UsageError(
            f"{source.name} has {len(source)} images, a scan with batch_size "
            f"{settings.batch_size} needs {least}; give more or lower batch_size"
        )
    order = epoch_order(len(source), seed=settings.seed, epoch=0)[: settings.images].tolist()
    images, _ = load_images(
        source,
        order,
        image_size=spec.image_size,
        channels=spec.in_channels,
        evaluation=True,
        report=report,
    )
    return images, source.name


def _parts(
    loaded: LoadedEncoder, settings: ScanSettings, folder: Path | None, device: torch.device
) -> FinishedParts:
    return FinishedParts(
        folder=None if folder is None else folder / "parts",
        origin={
            "encoder": loaded.sha256,
            "spec": loaded.encoder.spec.model_dump(mode="json"),
            "protocol": protocol(settings),
            "torch": torch.__version__,
            "device": device.type,
        },
    )


def _begun(out: Path) -> bool:
    return (out / "scan.json").exists() or (out / "parts").exists()


def _family(spec: EncoderSpec) -> dict[str, Any]:
    """What encoders must share for their scores to compare."""
    fields = {"architecture", "arguments", "stem", "in_channels", "image_size"}
    return spec.model_dump(mode="json", include=fields)


def _device(run: RunSettings) -> torch.device:
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("run.device is 'cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    on_gpu = run.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
