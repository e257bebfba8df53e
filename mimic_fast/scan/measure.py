"""All scores of one encoder; every finished piece is kept, so that a killed scan goes on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mimic_fast.encoders.build import Encoder
from mimic_fast.mutual_information.finished_parts import FinishedParts
from mimic_fast.progress import Event, Reporter
from mimic_fast.scan.concentration import clean_center, concentration
from mimic_fast.scan.forms import ADDITIVE, PATCH, Form, from_probe, grey_square, noise
from mimic_fast.scan.inversion import Inverted, Schedule, Search, invert
from mimic_fast.scan.probing import Answer, answers, patch_probes, spectral_probes, strongest
from mimic_fast.scan.result import Score
from mimic_fast.scan.settings import ScanSettings
from mimic_fast.watch import leave_if

_HELD_OUT = 4  # one image in so many only checks the triggers that were found
_GOLDEN = (0.7548776662, 0.5698402910)  # steps of a sequence that fills the square evenly


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovered:
    """A trigger that an inversion found.

    Args:
        form: ``patch`` or ``additive``.
        level: Concentration it was made for.
        inverted: The trigger.
        held_out: Concentration on images that the search never saw.
    """

    form: str
    level: float
    inverted: Inverted
    held_out: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a scan measures of one encoder."""

    scores: tuple[Score, ...]
    triggers: tuple[Recovered, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What all parts of a scan share.

    Args:
        encoder: On the device, in eval mode, without gradients of its own.
        images: In [0, 1], on the device.
        center: Mean clean feature, on the device.
        settings: Of the scan.
        parts: Where finished pieces are.
        data: What the parts are computed from: the stored images.
        report: Told of progress.
        stop: Polled all the time.
    """

    encoder: Encoder
    images: Float[Tensor, "image channel height width"]
    center: Float[Tensor, " feature"]
    settings: ScanSettings
    parts: FinishedParts
    data: Tensor
    report: Reporter
    stop: Callable[[], bool]


def measure(
    encoder: Encoder,
    images: UInt8[Tensor, "image channel height width"],
    settings: ScanSettings,
    *,
    parts: FinishedParts,
    device: torch.device,
    report: Reporter,
    stop: Callable[[], bool],
) -> Measured:
    """Probes the encoder and inverts triggers. The encoder is moved, and loses its gradients.

    Args:
        encoder: To be scanned.
        images: Clean ones; the last quarter only checks.
        settings: How hard it is tried.
        parts: Finished pieces of an earlier try, and where new ones go.
        device: Where to compute.
        report: Told of progress.
        stop: Polled all the time; true saves and leaves.

    Raises:
        UsageError: If the encoder gives all images the same features.
        UnsafeInputError: If features are not finite.
        StoppedError: If ``stop`` told so.
    """
    # channels_last halves the backward pass of convolutions on a CPU and is right on a GPU too
    encoder.to(device=device, dtype=torch.float32).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    encoder.eval().requires_grad_(False)
    pixels = (images.float() / 255).to(device).contiguous(memory_format=torch.channels_last)
    center = clean_center(encoder, pixels, batch_size=settings.batch_size).to(device)
    work = Work(
        encoder=encoder,
        images=pixels,
        center=center,
        settings=settings,
        parts=parts,
        data=images,
        report=report,
        stop=stop,
    )
    found = _probe(work)
    strong = [strongest(found, "patch"), strongest(found, "spectral")]
    scores: list[Score] = []
    triggers: list[Recovered] = []
    patches = patch_starts(
        found,
        image_size=encoder.spec.image_size,
        channels=encoder.spec.in_channels,
        count=settings.patch_starts,
        seed=settings.seed,
    )
    for form, starts in ((PATCH, patches), (ADDITIVE, _noise_starts(work))):
        for recovered in _smallest(work, form, starts):
            triggers.append(recovered)
            scores.append(_size_score(form, recovered))
    scores.extend(
        Score(
            name=f"{answer.probe.kind} shift",
            value=answer.concentration,
            unit="cosine",
            suspicious="high",
            detail=answer.probe.name,
        )
        for answer in strong
    )
    return Measured(scores=tuple(scores), triggers=tuple(triggers))


def _probe(work: Work) -> list[Answer]:
    spec, settings = work.encoder.spec, work.settings
    size, channels = spec.image_size, spec.in_channels
    probes = [
        *patch_probes(image_size=size, channels=channels, seed=settings.seed),
        *spectral_probes(image_size=size, channels=channels),
    ]
    if (known := work.parts.find("probes", work.data)) is not None:
        values = known["concentration"].tolist()
        pairs = zip(probes, values, strict=True)
        return [Answer(probe=probe, concentration=value) for probe, value in pairs]
    found = answers(
        work.encoder,
        work.images[: settings.probe_images],
        work.center,
        probes,
        batch_size=settings.batch_size,
        report=work.report,
        stop=work.stop,
    )
    values = torch.tensor([answer.concentration for answer in found], dtype=torch.float64)
    work.parts.keep("probes", work.data, {"concentration": values})
    return found


def patch_starts(
    found: Sequence[Answer], *, image_size: int, channels: int, count: int, seed: int
) -> list[list[Tensor]]:
    """The best probes, each of another content or place, and grey squares spread evenly.

    Args:
        found: Answers to patch probes, in any order; others are left out.
        image_size: Pixels a side.
        channels: Of the image.
        count: Starts in all; half of them, rounded down, from probes.
        seed: Draws the roughness.

    Returns:
        Parameters of the form ``PATCH``.
    """
    draw = torch.Generator().manual_seed(seed)
    patches = [answer for answer in found if answer.probe.kind == "patch"]
    patches.sort(key=lambda answer: -answer.concentration)
    starts = [from_probe(answer.probe, draw) for answer in patches[: count // 2]]
    for number in range(count - len(starts)):
        top, left = ((0.5 + number * step) % 1.0 for step in _GOLDEN)
        starts.append(
            grey_square(
                image_size=image_size, channels=channels, top=top, left=left, generator=draw
            )
        )
    return starts


def _noise_starts(work: Work) -> list[list[Tensor]]:
    spec = work.encoder.spec
    draw = torch.Generator().manual_seed(work.settings.seed + 1)
    return [
        noise(image_size=spec.image_size, channels=spec.in_channels, generator=draw)
        for _ in range(work.settings.additive_starts)
    ]


def _smallest(work: Work, form: Form, starts: Sequence[Sequence[Tensor]]) -> list[Recovered]:
    """The smallest trigger of all starts, for each level."""
    results: list[tuple[Inverted, ...]] = []
    for number, start in enumerate(starts):
        work.report(Event(phase=form.name, message=f"{form.name} {number + 1} of {len(starts)}"))
        results.append(_search(work, form, start, number))
    best = [min(tried, key=lambda one: one.size) for tried in zip(*results, strict=True)]
    return [
        Recovered(
            form=form.name,
            level=level,
            inverted=inverted,
            held_out=_held_out(work, form, inverted),
        )
        for level, inverted in zip(work.settings.levels, best, strict=True)
    ]


def _search(work: Work, form: Form, start: Sequence[Tensor], number: int) -> tuple[Inverted, ...]:
    settings, name = work.settings, f"{form.name}_{number}"
    schedule = Schedule(
        levels=settings.levels,
        steps=settings.steps,
        batch_size=settings.batch_size,
        seed=settings.seed + number,
    )
    search = Search(form, start, schedule, work.images.device)
    if (state := work.parts.find(name, work.data)) is not None:
        search.restore(state)
    if search.step == search.total:
        return search.results()
    leave_if(work.stop)
    keep = partial(work.parts.keep, name, work.data)

    def save(state: Mapping[str, Tensor]) -> None:
        keep(state)

    def tick(step: int, value: float) -> None:
        metrics = {"cosine": value, "size": search.size * form.shown}
        work.report(
            Event(phase=form.name, done=step, total=search.total, unit="steps", metrics=metrics)
        )

    return invert(
        search,
        work.encoder,
        work.images[: len(work.images) - len(work.images) // _HELD_OUT],
        work.center,
        every=settings.run.checkpoint_every,
        save=save,
        tick=tick,
        stop=work.stop,
    )


def _held_out(work: Work, form: Form, inverted: Inverted) -> float:
    images = work.images[-(len(work.images) // _HELD_OUT) :]
    with torch.no_grad():
        triggered = form.stamp(images, inverted.mask, inverted.pattern)
        parts = [work.encoder(part).float() for part in triggered.split(work.settings.batch_size)]
        return float(concentration(torch.cat(parts), work.center))


def _size_score(form: Form, recovered: Recovered) -> Score:
    inverted = recovered.inverted
    detail = f"cosine {recovered.held_out:.3f} on held-out images"
    return Score(
        name=f"{form.name} size at {recovered.level:g}",
        value=inverted.size * form.shown,
        unit=form.unit,
        suspicious="low",
        reached=inverted.reached,
        detail=detail if inverted.reached else "the level was not reached at any size",
    )
