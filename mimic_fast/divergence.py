"""When a run has diverged: too many steps in a row that were not finite."""

from mimic_fast.config import OptimSettings
from mimic_fast.errors import DivergedError

# Overflows of float16 from its first factor of 2^16 down to 1, each of which halves it.
_OVERFLOWS = 16


class Divergence:
    """Counts steps that were skipped in a row.

    A gradient of float16 that overflows behind a finite loss says only that the loss scale is too
    large; such steps are counted apart and forgiven for as long as the scale has room to fall.
    """

    def __init__(self, optim: OptimSettings) -> None:
        self._limit, self._scaled = optim.max_nonfinite, optim.precision == "fp16"
        self._in_a_row = self._overflows = 0

    def after(self, *, bad: bool, finite_loss: bool) -> bool:
        """Takes note of a step; true if the run has diverged with it."""
        overflow = bad and finite_loss and self._scaled
        self._overflows = self._overflows + 1 if overflow else 0
        if overflow and self._overflows <= _OVERFLOWS:
            return False
        self._in_a_row = self._in_a_row + 1 if bad else 0
        return self._in_a_row >= self._limit

    def error(self, step: int) -> DivergedError:
        """What to raise behind step ``step``."""
        return DivergedError(
            f"loss or gradient not finite {self._in_a_row} times in a row, at step {step} "
            "(batch ids in metrics.jsonl); lower optim.lr or optim.precision"
        )

    def counts(self) -> list[int]:
        """What a run state keeps."""
        return [self._in_a_row, self._overflows]

    def restore(self, counts: list[int]) -> None:
        """Goes on from what :meth:`counts` gave."""
        self._in_a_row, self._overflows = counts
