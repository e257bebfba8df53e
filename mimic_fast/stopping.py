"""When a purification has learned enough, and how it then comes to its end.

More passes bring accuracy, and without hardening they bring the backdoor too, so a run should not
be longer than it has to. The rule asks for neither labels nor a trigger.
"""

from collections.abc import Sequence
from dataclasses import dataclass


def plateaued(losses: Sequence[float], *, patience: int, min_delta: float) -> bool:
    """Whether the last ``patience`` losses brought none below the best before by ``min_delta``.

    Args:
        losses: At least 0, in the order in which they were measured.
        patience: How many in a row.
        min_delta: Share of the best loss before them.
    """
    before, last = losses[:-patience], losses[-patience:]
    return bool(before) and min(last) > (1 - min_delta) * min(before)


@dataclass(frozen=True, slots=True)
class Cooldown:
    """Steps ``start`` (from 0) to ``end`` (excluded) in which the learning rate falls to zero."""

    start: int
    end: int

    @classmethod
    def after(cls, steps: int, *, share: float, at_most: int) -> "Cooldown":
        """One that lasts for a share of the steps done: at least one, and no run gets longer."""
        return cls(steps, min(at_most, steps + max(1, round(share * steps))))

    def factor(self, step: int) -> float:
        """What is left of the planned learning rate in a step; all of it before ``start``."""
        return min(1.0, (self.end - step) / (self.end - self.start))
