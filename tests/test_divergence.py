"""When steps that are not finite are too many."""

import pytest

from mimic_fast.config import OptimSettings
from mimic_fast.divergence import Divergence


def test_only_steps_in_a_row_count():
    counter = Divergence(OptimSettings(max_nonfinite=3))
    bad = (True, True, False, True, True, True)

    found = [counter.after(bad=step, finite_loss=not step) for step in bad]

    assert found == [False] * 5 + [True]
    assert "3 times in a row, at step 7" in str(counter.error(7))


@pytest.mark.parametrize(("precision", "last"), [("fp32", 3), ("fp16", 19)])
def test_overflow_of_float16_is_forgiven_while_its_scale_can_fall(precision, last):
    counter = Divergence(OptimSettings(max_nonfinite=3, precision=precision))

    found = [counter.after(bad=True, finite_loss=True) for _ in range(last)]

    assert found == [False] * (last - 1) + [True]


def test_counts_come_back():
    one, other = (Divergence(OptimSettings(max_nonfinite=3)) for _ in range(2))
    for _ in range(2):
        one.after(bad=True, finite_loss=False)
    other.restore(one.counts())

    assert other.after(bad=True, finite_loss=False)
