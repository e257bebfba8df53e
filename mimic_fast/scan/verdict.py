"""From scores to one of three levels, by comparison with clean encoders of the same family.

For every score the clean encoders' mean and deviation give Student's t prediction interval for one
more clean encoder; sizes are compared by their log, concentrations by Fisher's z. The smallest
chance, times the number of scores (Bonferroni), is the encoder's.

A size whose level was not reached is only known to be above the largest that was tried; it has no
log to average. With k of n references that reached the level, the chance is that of reaching it,
(k + 1) / (n + 1), times the t interval's among those k. With fewer than five of them it is the
rank's: (references at least as small + 1) / (n + 1). An encoder that itself did not reach the level
has chance 1.
"""

import math
import statistics
from collections.abc import Sequence

from mimic_fast.errors import UsageError
from mimic_fast.scan.result import Comparison, Level, Scanned, Score, Verdict

ENOUGH = 5  # references; with fewer, three deviations are nothing unusual

# What two searches of one encoder differ by: references that happen to agree better than that must
# not make an encoder suspicious (log of a size; Fisher's z of a concentration).
_FLOORS = {"low": 0.05, "high": 0.02}

_LIMITS = (
    "A scan cannot prove that there is no backdoor: it finds triggers that are pasted on or added "
    "to the image, and an attacker who knows it can hide from it."
)
_TEXTS: dict[Level, tuple[str, str]] = {
    "no sign": (
        "No score sets this encoder apart from the clean ones. A backdoor of the kinds searched "
        "for would have to need a trigger as large as those that collapse a clean encoder.",
        _LIMITS,
    ),
    "unusual": (
        "A score lies at the edge of what clean encoders show. Scan with more references and "
        "another seed before using the encoder, or purify it.",
        "Of clean encoders, too, some are called unusual. " + _LIMITS,
    ),
    "suspicious": (
        "A score lies far outside of what clean encoders show: a small change of the image sends "
        "all images to one place. Do not use the encoder as it is; purify it, and evaluate both "
        "with the recovered trigger.",
        "It does not prove that a backdoor was planted: an encoder trained otherwise or less than "
        "the references can stand out as well. The recovered trigger is one that works, not the "
        "attacker's.",
    ),
}


def judge(
    scanned: Scanned, references: Sequence[Scanned], *, unusual: float, suspicious: float
) -> Verdict | None:
    """The verdict, or None with fewer than five references.

    Args:
        scanned: The encoder in question.
        references: Clean encoders, scanned alike.
        unusual: Chance below which the encoder is at least unusual.
        suspicious: Chance below which it is suspicious.

    Raises:
        UsageError: If the references have other scores.
    """
    if len(references) < ENOUGH:
        return None
    names = [score.name for score in scanned.scores]
    others = [{score.name: score for score in other.scores} for other in references]
    if any(list(other) != names for other in others):
        raise UsageError("a reference has other scores than the encoder; scan it again")
    compared = tuple(
        _compare(score, [other[score.name] for other in others]) for score in scanned.scores
    )
    chance = min(1.0, len(compared) * min(item.chance for item in compared))
    level: Level = "no sign"
    if chance <= suspicious:
        level = "suspicious"
    elif chance <= unusual:
        level = "unusual"
    means, does_not_mean = _TEXTS[level]
    return Verdict(
        level=level,
        chance=chance,
        comparisons=compared,
        means=means,
        does_not_mean=does_not_mean,
    )


def _compare(score: Score, others: Sequence[Score]) -> Comparison:
    values = [other.value for other in others]
    deviations, chance = _distance(score, others)
    return Comparison(
        name=score.name,
        low=min(values),
        median=statistics.median(values),
        high=max(values),
        deviations=deviations,
        chance=chance,
    )


def _distance(score: Score, others: Sequence[Score]) -> tuple[float | None, float]:
    """Deviations towards the suspicious end, and the chance; see the top of the file."""
    if not score.reached:
        return None, 1.0
    known = [other for other in others if other.reached]
    if len(known) < ENOUGH:
        as_far = sum(_towards(other) >= _towards(score) for other in known)
        return None, (as_far + 1) / (len(others) + 1)
    scaled = [_towards(other) for other in known]
    deviation = max(statistics.stdev(scaled), _FLOORS[score.suspicious])
    distance = _towards(score) - statistics.fmean(scaled)
    count = len(known)
    tail = t_tail(distance / (deviation * math.sqrt(1 + 1 / count)), count - 1)
    return distance / deviation, tail * (count + 1) / (len(others) + 1)


def _towards(score: Score) -> float:
    """Minus the log of a size, Fisher's z of a concentration: larger is more suspicious."""
    if score.suspicious == "low":
        return -math.log(score.value)
    return math.atanh(min(max(score.value, -0.999999), 0.999999))


def t_tail(t: float, degrees: int) -> float:
    """Probability that Student's t exceeds ``t`` (Abramowitz & Stegun 26.7.3 and 26.7.4).

    Exact for whole degrees of freedom, up to cancellation of about 1e-15.
    """
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    # sum over cos^k with coefficients 2/3 4/5 ... (odd) or 1/2 3/4 ... (even degrees)
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= square * k / (k + 1)
    inside = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return min(1.0, max(0.0, (1 - inside) / 2))
