"""Patterns laid over whole images, found in their spectra: noise blended in, sinusoids.

Natural images have as many large positive as large negative coefficients: a mirrored image is as
natural. A pattern that many images share breaks this symmetry in the same coefficients. From there
follows a template of the pattern, and how far each image leans towards it; how many images lean as
far the other way says how many do so by chance (Tran et al., NeurIPS 2018, look for such a
direction in features; here it is looked for in pixels, which needs no encoder).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mimic_fast.data.suspicious_spectrum import STEP, Spectra, robust_deviation

_TAILS = (3.5, 5.0)  # of coefficients
_SURPRISE = 4.2  # standard deviations of the difference between tails
_RATIO = 3.0  # one tail against the other
_ROUNDS = 3
_COSTS = (1.0, 2.0, 4.0)  # of one image by chance against one more that carries the pattern
_MOST_BY_CHANCE = 0.02  # share of images that may lean as far the other way
_TIMES_CHANCE = 4.0
_FEW = 40  # coefficients that lean; more do where all pictures are of one kind
_SURPLUS = 0.004  # share of images; smaller asymmetries are natural in large sets
_SEPARATE = 2.0  # median score of a group over the furthest score the other way ...
_BEYOND = 1.25  # ... and what then belongs to the group
_MOST_SHARE = 0.1  # of images; a larger group is a kind of picture
_MOST_TRIES = 8
_TOGETHER = 1024
_SAMPLE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlayGroup:
    """Images that share a pattern all over.

    Args:
        images: Positions.
        scores: Per image: how far it leans towards the pattern, robust standard deviations.
        expected: Images that would lean as far by chance.
    """

    images: Int[Tensor, " member"]
    scores: Float[Tensor, " member"]
    expected: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asymmetry:
    """A coefficient with many more large values of one sign."""

    column: int
    sign: int
    tail: float
    surprise: float
    surplus: int


def overlays(spectra: Spectra, *, least: int) -> list[OverlayGroup]:
    """Groups of at least ``least`` images that share a pattern, each pattern once."""
    stored = spectra.coefficients
    groups: list[OverlayGroup] = []
    explained = torch.zeros(len(stored), dtype=torch.bool)
    tries = 0
    asymmetric = _asymmetric(stored, least)
    few = len({found.column for found in asymmetric}) <= _FEW
    for found in asymmetric:
        members = stored[:, found.column].float() * found.sign * STEP > found.tail
        if explained[members].float().mean() > 0.3:
            continue
        tries += 1
        # Where many coefficients lean to a side, or lean little, pictures of one kind can be the
        # reason (mirror-symmetric objects): then a group must stand apart from all the others.
        large = found.tail == max(_TAILS) and found.surplus >= _SURPLUS * len(stored)
        group = _group(stored, members, least, overlapping=few and large)
        if group is not None:
            groups.append(group)
            explained[group.images] = True
        if tries == _MOST_TRIES:
            break
    return groups


def _asymmetric(stored: Tensor, least: int) -> list[_Asymmetry]:
    """Coefficients whose tails differ, the most surprising first."""
    found: list[_Asymmetry] = []
    for tail in _TAILS:
        positive = torch.zeros(stored.shape[1], dtype=torch.long)
        negative = torch.zeros_like(positive)
        for part in stored.split(_TOGETHER):
            positive += (part > tail / STEP).sum(dim=0)
            negative += (part < -tail / STEP).sum(dim=0)
        surprise = (positive - negative) / (positive + negative + 4).sqrt()
        more, fewer = torch.maximum(positive, negative), torch.minimum(positive, negative)
        chosen = (surprise.abs() >= _SURPRISE) & (more >= least)
        chosen &= more + 3 >= _RATIO * (fewer + 3)
        found += [
            _Asymmetry(
                column=column,
                sign=1 if surprise[column] > 0 else -1,
                tail=tail,
                surprise=abs(float(surprise[column])),
                surplus=int(more[column] - fewer[column]),
            )
            for column in chosen.nonzero()[:, 0].tolist()
        ]
    return sorted(found, key=lambda each: -each.surprise)


def _group(
    stored: Tensor, members: Tensor, least: int, *, overlapping: bool
) -> OverlayGroup | None:
    """The group that the first members lead to; None if it does not stand out."""
    chosen = members
    scores = torch.zeros(len(stored))
    for _ in range(_ROUNDS):
        template = _template(stored, chosen)
        if not bool(template.any()):
            return None
        scores = torch.cat([part.float() @ template for part in stored.split(_TOGETHER)])
        scores = scores - scores.median()
        scores = scores / robust_deviation(scores[:, None]).clamp(min=1e-6)
        chosen = scores > _limit(scores, _COSTS[-1])[0]
        if chosen.sum() < least:
            return None
    furthest = -scores.min()  # the other way: what no image reaches without the pattern
    if scores[chosen].median() >= _SEPARATE * furthest:
        return _members(scores, scores > _BEYOND * furthest, 0.0)
    for cost in _COSTS if overlapping else ():
        limit, expected = _limit(scores, cost)
        chosen = scores > limit
        if chosen.sum() >= max(least, _TIMES_CHANCE * (expected + 1)):
            return _members(scores, chosen, expected)
    return None


def _members(scores: Tensor, chosen: Tensor, expected: float) -> OverlayGroup | None:
    if chosen.sum() > _MOST_SHARE * len(scores):
        return None
    return OverlayGroup(images=chosen.nonzero()[:, 0], scores=scores[chosen], expected=expected)


def _template(stored: Tensor, chosen: Tensor) -> Float[Tensor, " column"]:
    """What the chosen images have on average and the others have not."""
    usual = stored[:: max(1, len(stored) // _SAMPLE)].float().mean(dim=0)
    members = stored[chosen][:_SAMPLE].float()
    template = members.mean(dim=0) - usual
    noise = members.std(dim=0) / math.sqrt(len(members))
    return torch.where(template.abs() > 4 * noise, template, 0)


def _limit(scores: Tensor, cost: float) -> tuple[float, float]:
    """Where nearly all of the surplus of one tail lies above, and what of the other lies beyond.

    ``cost`` is what one of the other tail weighs: the higher, the purer the group.
    """
    levels = torch.logspace(math.log10(2.5), 2, 75)
    above = (scores[:, None] > levels).sum(dim=0)
    below = (scores[:, None] < -levels).sum(dim=0)
    allowed = below <= _MOST_BY_CHANCE * len(scores)
    surplus = torch.where(allowed, above - cost * below, 0)
    at = int((surplus >= 0.97 * surplus.max()).nonzero().max())
    return float(levels[at]), float(below[at])
