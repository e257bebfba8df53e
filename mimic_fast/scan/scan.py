"""``scan()``: measure an encoder, compare it with clean ones, write what was found."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from mimic_fast.config import CLEAN_SET_FIELDS, EncoderSpec
from mimic_fast.data.images import load_images
from mimic_fast.data.order import epoch_order
from mimic_fast.data.sources import limits_of, open_source
from mimic_fast.distributed import device_of
from mimic_fast.encoders.ingest import LoadedEncoder, load_encoder, report_assumed
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import Attack, recorded, write_attack
from mimic_fast.evaluation.triggers import Trigger
from mimic_fast.mutual_information.finished_parts import FinishedParts, tensor_digest
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.recipe import warn_ignored
from mimic_fast.scan.forms import ADDITIVE
from mimic_fast.scan.measure import Measured, Recovered, measure
from mimic_fast.scan.references import References, complete, find
from mimic_fast.scan.result import Scanned, Verdict, read_scan, write_scan
from mimic_fast.scan.settings import ScanSettings, protocol
from mimic_fast.scan.verdict import ENOUGH, judge

_UNUSED_DATA = (
    *CLEAN_SET_FIELDS, "backend", "decode", "cache", "cache_dir", "workers", "prefetch",
    "view_pool", "crop_scale", "crop_ratio", "flip", "jitter", "jitter_probability", "grayscale",
)  # fmt: skip
_KIND = "recovered"  # in attack.json
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
    must_judge: bool = False,
    reference_scans: Path | None = None,
) -> ScanResult:
    """Scans an encoder without trigger and without labels.

    Writes ``scan.json``, and the recovered trigger as ``trigger.safetensors`` with an
    ``attack.json`` that evaluations read (no reference image: the target is the class that most
    triggered images go to).

    Args:
        settings: What is scanned, and how hard it is tried.
        report: Told of progress.
        stop: Polled all the time; true saves and leaves.
        must_judge: Refuses, before it measures, references too few for a verdict.
        reference_scans: Where scans of references are kept; None: ``references/`` of the run.

    Raises:
        UsageError: If encoder, images, references or device are missing, too few, or the output
            directory holds a scan that is not to be resumed, or an attack that no scan wrote.
        UnsafeInputError: If the encoder's file or features are damaged.
        StoppedError: If ``stop`` told so; what is finished is kept.
    """
    run = settings.run
    if settings.encoder.teacher is None or settings.data.source is None:
        raise UsageError("a scan needs encoder.teacher (--encoder) and data.source (--data)")
    if run.out is not None:
        _refuse_foreign(run.out, resume=run.resume != "never")
    warn_ignored(settings.data, _UNUSED_DATA, prefix="data", user="a scan")
    warn_ignored(settings.run, _UNUSED_RUN, prefix="run", user="a scan")
    device = device_of(run)
    suspect = load_encoder(settings.encoder.teacher, settings.encoder)
    report_assumed(suspect, report)
    images, source = clean_images(settings, suspect.encoder.spec, report)

    def unmeasured(loaded: LoadedEncoder) -> Scanned:
        return Scanned(
            name=loaded.path.name,
            sha256=loaded.sha256,
            family=_family(loaded.encoder.spec),
            images=tensor_digest(images),
            source=source,
            protocol=protocol(settings),
            scores=(),
            device=_device_name(device),
        )

    def scores_of(loaded: LoadedEncoder, folder: Path | None) -> tuple[Scanned, Measured]:
        began = time.perf_counter()
        parts = _parts(loaded, settings, folder, device)
        found = measure(
            loaded.encoder, images, settings, parts=parts, device=device, report=report, stop=stop
        )
        seconds = time.perf_counter() - began
        scores = {"scores": found.scores, "seconds": seconds}
        return unmeasured(loaded).model_copy(update=scores), found

    references = _listed(settings, unmeasured(suspect), report, must_judge=must_judge)
    scanned, found = scores_of(suspect, run.out)
    if settings.references is not None:
        if reference_scans is None and run.out is not None:
            reference_scans = run.out / "references"

        def reference(path: Path) -> Scanned:
            return _reference(path, scanned, settings, reference_scans, scores_of, report)

        complete(references, settings.references, scanned, scan=reference)
    return _finish(settings, scanned, found, references, report)


def _refuse_foreign(out: Path, *, resume: bool) -> None:
    """A scan overwrites what an earlier scan wrote, if told to resume it, and nothing else."""
    if (out / "attack.json").exists():
        kind = recorded(out).kind
        if kind != _KIND:
            raise UsageError(
                f"{out} holds the attack.json of {kind!r}; give the scan another --out"
            )
    elif (out / "trigger.safetensors").exists() and not _begun(out):
        raise UsageError(f"{out} holds a trigger.safetensors; give the scan another --out")
    if not resume and _begun(out):
        raise UsageError(f"{out} already holds a scan; use --resume auto or another --out")


def _listed(
    settings: ScanSettings, wanted: Scanned, report: Reporter, *, must_judge: bool
) -> References:
    """The references before anything is measured: mistakes show at once, not after hours."""
    if settings.references is None:
        found = References()
    else:
        found = find(
            settings.references,
            wanted,
            family=lambda path: _family(_load(path, settings).encoder.spec),
        )
    comparable = len(found.used) + len(found.waiting)
    if must_judge and comparable < ENOUGH:
        for name, reason in found.left_out.items():
            report(Event(phase="scan", message=f"reference {name} left out: {reason}"))
        raise UsageError(
            f"a verdict needs {ENOUGH} references, too few comparable ones are in "
            f"{settings.references}: {comparable} ({len(found.left_out)} left out); add some"
        )
    return found


def _load(path: Path, settings: ScanSettings) -> LoadedEncoder:
    return load_encoder(path, settings.encoder.model_copy(update={"teacher": path}))


def _reference(
    path: Path,
    scanned: Scanned,
    settings: ScanSettings,
    scans: Path | None,
    scores_of: Callable[[LoadedEncoder, Path | None], tuple[Scanned, Measured]],
    report: Reporter,
) -> Scanned:
    """A clean encoder's scores, kept below ``scans`` for the next time."""
    loaded = _load(path, settings)
    folder = None if scans is None else scans / loaded.sha256[:12]
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
            _write_recovered(out, trigger, facts, report)
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


def _write_recovered(out: Path, trigger: Trigger, facts: dict[str, Any], report: Reporter) -> None:
    """Writes the attack; what evaluations recorded of the very same trigger is kept."""
    attack = Attack(kind=_KIND, trigger=trigger, reference=None, facts=facts)
    if (out / "attack.json").exists():
        before = recorded(out)
        if all(before.facts.get(name) == value for name, value in facts.items()):
            attack = replace(attack, targets=before.targets, facts={**before.facts, **facts})
        elif before.targets:
            message = "another trigger was recovered: the recorded target classes are dropped"
            report(Event(phase="scan", message=message))
    write_attack(out, attack)


def telling(triggers: Sequence[Recovered], verdict: Verdict | None) -> Recovered | None:
    """The trigger of the least likely size; without a verdict the first pasted one.

    Of one form the trigger of the highest level reached is taken: it works best.
    """
    firsts: dict[str, Recovered] = {}
    for trigger in triggers:
        if trigger.inverted.reached:
            firsts.setdefault(trigger.form, trigger)
    if not firsts or verdict is None:
        return next(iter(firsts.values()), None)
    compared = verdict.comparisons

    def outlying(form: str) -> tuple[float, float]:
        own = [item for item in compared if item.name.startswith(f"{form} size")]
        chance = min(item.chance for item in own)
        return -chance, max(item.deviations or 0.0 for item in own)

    return firsts[max(firsts, key=outlying)]


def _as_trigger(best: Recovered) -> Trigger:
    name, found = f"recovered_{best.form}", best.inverted
    mask = found.mask.detach().cpu().float().clamp(0, 1).contiguous()
    pattern = found.pattern.detach().cpu().float().contiguous()
    if best.form == ADDITIVE.name:
        # a trigger file holds no more; pixels in [0, 1] saturate at that anyway
        return Trigger(name=name, mask=mask, pattern=pattern.clamp(-1, 1), add=True)
    return Trigger(name=name, mask=mask, pattern=pattern)


def _facts(best: Recovered) -> dict[str, Any]:
    return {
        "form": best.form,
        "level": best.level,
        "size": best.inverted.size,
        "held_out_cosine": best.held_out,
    }


def clean_images(
    settings: ScanSettings, spec: EncoderSpec, report: Reporter = silent
) -> tuple[UInt8[Tensor, "image channel height width"], str]:
    """A seeded draw of clean images as an evaluation sees them, and the source's name.

    Args:
        settings: Name the source, the seed and how many.
        spec: Size and channels of the encoder that they are for.
        report: Told what could not be decoded.

    Raises:
        UsageError: If there are too few.
    """
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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
