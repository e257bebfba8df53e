"""Images that look tampered with: a patch pasted on many, a pattern laid over many, odd spectra.

No labels, no encoder, no trigger: only what the images have in common that photographs do not have.
Every limit comes from the set itself, so that a clean set gives next to nothing; what falls under
it is in ``docs/data_check.md``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from mimic_fast.data.images import with_channels
from mimic_fast.data.suspicious_fixed import fixed_patches
from mimic_fast.data.suspicious_moving import moving_patches
from mimic_fast.data.suspicious_overlays import overlays
from mimic_fast.data.suspicious_patterns import frequent_patterns
from mimic_fast.data.suspicious_spectrum import energy_outliers, spectra
from mimic_fast.progress import Event, Reporter, silent

SMALLEST = 16  # pixels; smaller images are not searched
FEWEST = 64  # images; among fewer nothing can be told
_LEAST = 8  # images that share something before it is a group ...
_LEAST_SHARE = 0.001  # ... and at least this share of all
_RATIO = 5.0  # how far a pattern must exceed its expectation to be looked into
_TOGETHER = 4096

PATCH, MOVING_PATCH = "patch at one place", "patch at changing places"
OVERLAY, SPECTRUM = "pattern all over", "spectrum of its own"


@dataclass(frozen=True, kw_only=True, slots=True)
class SuspiciousGroup:
    """Images that share something.

    Args:
        reason: What they share.
        place: Top, left, height and width of a patch as shares of the searched square.
        images: How many.
        expected: How many of them are there by chance.
    """

    reason: str
    place: tuple[float, float, float, float] | None
    images: int
    expected: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SuspiciousImage:
    """One suspicious image.

    Args:
        index: Its position.
        reason: Why.
        score: For patches 0 (at the limit) .. 1 (the very patch); else robust standard deviations.
        group: Which group it belongs to; None: it is odd by itself.
    """

    index: int
    reason: str
    score: float
    group: int | None


def find_suspicious(
    images: UInt8[Tensor, "image 3 side side"], *, report: Reporter = silent
) -> tuple[tuple[SuspiciousGroup, ...], tuple[SuspiciousImage, ...]]:
    """Groups of images that share what they should not, and every suspicious image, once.

    Args:
        images: One square size.
        report: Told what is being looked for.
    """
    least = max(_LEAST, round(_LEAST_SHARE * len(images)))
    if len(images) < FEWEST or images.shape[-1] < SMALLEST:
        return (), ()
    found = _patches(images, least, report)
    report(Event(phase="suspicious", done=2, total=3, unit="steps"))
    seen = spectra(images)
    found += [
        (
            SuspiciousGroup(
                reason=OVERLAY, place=None, images=len(group.images), expected=group.expected
            ),
            group.images,
            group.scores,
        )
        for group in overlays(seen, least=least)
    ]
    report(Event(phase="suspicious", done=3, total=3, unit="steps"))
    return tuple(group for group, _, _ in found), _listed(found, *energy_outliers(seen))


def gray_rows(
    images: UInt8[Tensor, "image channel side side"],
) -> UInt8[Tensor, "row image column"]:
    """Luma with the rows first, so that windows of one row of all images lie together."""
    side = images.shape[-1]
    rows = torch.empty(side, len(images), side, dtype=torch.uint8)
    for start in range(0, len(images), _TOGETHER):
        part = with_channels(images[start : start + _TOGETHER], 1)[:, 0]
        rows[:, start : start + _TOGETHER] = part.transpose(0, 1)
    return rows


def _patches(
    images: Tensor, least: int, report: Reporter
) -> list[tuple[SuspiciousGroup, Tensor, Tensor]]:
    side = images.shape[-1]
    gray = gray_rows(images)
    fixed, anywhere = frequent_patterns(gray, least=least, ratio=_RATIO)
    report(Event(phase="suspicious", done=1, total=3, unit="steps"))
    groups = fixed_patches(images, gray, fixed, least=least)
    explained = torch.zeros(len(images), dtype=torch.bool)
    for group in groups:
        explained[group.images] = True
    groups += moving_patches(images, gray, anywhere, explained, least=least)
    found: list[tuple[SuspiciousGroup, Tensor, Tensor]] = []
    for group in groups:
        place = None
        if group.place is not None:
            top, left, height, width = (value / side for value in group.place)
            place = (top, left, height, width)
        described = SuspiciousGroup(
            reason=MOVING_PATCH if place is None else PATCH,
            place=place,
            images=len(group.images),
            expected=group.expected,
        )
        found.append((described, group.images, group.scores))
    return found


def _listed(
    found: list[tuple[SuspiciousGroup, Tensor, Tensor]], odd: Tensor, away: Tensor
) -> tuple[SuspiciousImage, ...]:
    """Each image under the first group that has it, the best match first."""
    listed: dict[int, SuspiciousImage] = {}
    for number, (group, images, scores) in enumerate(found):
        for place in scores.argsort(descending=True).tolist():
            index = int(images[place])
            listed.setdefault(
                index,
                SuspiciousImage(
                    index=index, reason=group.reason, score=float(scores[place]), group=number
                ),
            )
    for place in away.argsort(descending=True).tolist():
        index = int(odd[place])
        listed.setdefault(
            index,
            SuspiciousImage(index=index, reason=SPECTRUM, score=float(away[place]), group=None),
        )
    return tuple(listed.values())
