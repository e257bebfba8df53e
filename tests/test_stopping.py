"""When it is enough, and how a run then ends."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimic_fast.stopping import Cooldown, plateaued


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], False),
        ([1.0], False),
        ([1.0, 1.0], False),
        ([1.0, 1.0, 1.0], True),
        ([1.0, 1.1, 0.995], True),  # lower by less than 1 %
        ([1.0, 1.1, 0.98], False),
        ([1.0, 0.5, 0.6, 0.7], True),
        ([1.0, 0.9, 0.8, 0.7], False),
        ([0.0, 0.0, 0.0], False),  # nothing is left to learn, and nothing lower than 0
    ],
)
def test_plateau_is_two_losses_without_a_better_one(losses, expected):
    assert plateaued(losses, patience=2, min_delta=0.01) is expected


@given(st.lists(st.floats(0.001, 2), max_size=12), st.integers(1, 5), st.floats(0, 0.5))
def test_plateau_is_what_a_loop_over_the_losses_finds(losses, patience, min_delta):
    best, best_at = float("inf"), -1
    for at, loss in enumerate(losses[:-patience]):
        if loss < best:
            best, best_at = loss, at
    better = any(loss <= (1 - min_delta) * best for loss in losses[-patience:])
    assert plateaued(losses, patience=patience, min_delta=min_delta) is (
        best_at >= 0 and not better
    )


@given(st.integers(1, 1000), st.floats(0, 1), st.integers(1, 1000))
def test_cooldown_falls_to_zero_and_makes_no_run_longer(done, share, left):
    cooldown = Cooldown.after(done, share=share, at_most=done + left)

    assert done < cooldown.end <= done + left
    factors = [cooldown.factor(step) for step in range(done - 1, cooldown.end)]
    assert factors[0] == factors[1] == 1
    assert all(a > b > 0 for a, b in pairwise(factors[1:]))
    assert cooldown.factor(cooldown.end) == 0
