"""When steps that are not finite are too many."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimic_fast.config import OptimSettings
from mimic_fast.divergence import Divergence
from mimic_fast.errors import DivergedError

Kind = Literal["good", "loss", "overflow"]  # a loss that is not finite; a gradient behind one


def counter(precision: str, limit: int = 3) -> Divergence:
    optim = {"max_nonfinite": limit, "precision": precision}
    return Divergence(OptimSettings.model_validate(optim))


def after(divergence: Divergence, *kinds: Kind) -> list[bool]:
    return [divergence.after(bad=kind != "good", finite_loss=kind != "loss") for kind in kinds]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_only_steps_in_a_row_count(precision):
    divergence = counter(precision)

    found = after(divergence, "loss", "loss", "good", "loss", "loss", "loss")

    assert found == [False] * 5 + [True]
    error = divergence.error(7)
    assert isinstance(error, DivergedError)
    assert "3 times in a row, at step 7" in str(error)
    assert "lower optim.lr or optim.precision" in str(error)


@pytest.mark.parametrize(
    ("precision", "last"), [("fp32", 3), ("bf16", 3), ("fp64", 3), ("fp16", 19)]
)
def test_overflow_of_float16_is_forgiven_while_its_scale_can_fall(precision, last):
    found = after(counter(precision), *["overflow"] * last)

    assert found == [False] * (last - 1) + [True]


def test_loss_that_is_not_finite_is_no_overflow():
    # Halving the scale does not help it, so it counts at once.
    assert after(counter("fp16"), "loss", "loss", "loss") == [False, False, True]


def test_a_good_step_gives_the_scale_its_room_back():
    one_more: list[Kind] = ["overflow"] * 18
    found = after(counter("fp16"), *one_more, "good", *one_more, "overflow")

    assert found == [False] * 37 + [True]


def test_forgiven_overflows_between_losses_do_not_end_the_row():
    # The steps in between were skipped as well: none of them was good.
    found = after(counter("fp16"), "loss", "loss", "overflow", "overflow", "loss")

    assert found == [False] * 4 + [True]


def test_first_bad_step_can_be_the_last():
    assert after(counter("fp32", limit=1), "good", "loss") == [False, True]


@given(st.lists(st.sampled_from(["good", "loss", "overflow"]), max_size=60), st.integers(0, 60))
def test_a_resumed_run_diverges_where_a_straight_one_does(kinds, where):
    straight, first, second = (counter("fp16") for _ in range(3))
    where = min(where, len(kinds))

    begun = after(first, *kinds[:where])
    second.restore(first.counts())

    assert begun + after(second, *kinds[where:]) == after(straight, *kinds)
    assert second.counts() == straight.counts()


@given(st.lists(st.sampled_from(["good", "loss", "overflow"]), max_size=60))
def test_outside_of_float16_every_bad_step_is_alike(kinds):
    flat: list[Kind] = ["good" if kind == "good" else "loss" for kind in kinds]

    assert after(counter("bf16"), *kinds) == after(counter("bf16"), *flat)
