"""How long work tells the caller where it stands, without printing.

Library functions take ``report: Reporter`` and call it; ``launch/`` draws bars from it, tests
record it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One sign of progress.

    Args:
        phase: What is going on, a short noun such as ``locate`` or ``distil``.
        done: Units finished so far.
        total: Units in all; 0 for a message that belongs to no count.
        unit: What is counted, e.g. ``images`` or ``steps``.
        message: One line worth keeping in a log; empty for a mere tick.
        metrics: Numbers to show beside the bar (loss, accuracy, ...).
    """

    phase: str
    done: int = 0
    total: int = 0
    unit: str = ""
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


Reporter = Callable[[Event], None]


def silent(event: Event) -> None:
    """The reporter that says nothing."""
