import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimic_fast.data.counter import uniforms

WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio, splitmix64's increment


def splitmix(value: int) -> int:
    """splitmix64's finalizer over Python's unbounded integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def by_hand(item: int, number: int, *, seed: int, epoch: int, stream: int) -> float:
    """The documented chain of keys: seed, epoch, stream, item, then a counter from 1."""
    key = GOLDEN
    for part in (seed, epoch, stream, item):
        key = splitmix((key + part * GOLDEN) & WORD)
    return (splitmix((key + (number + 1) * GOLDEN) & WORD) >> 40) / 2**24


@given(
    ids=st.lists(st.integers(0, 2**62), min_size=1, max_size=4),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 10**6),
    stream=st.integers(0, 5000),
)
def test_numbers_equal_splitmix64_over_plain_integers(ids, seed, epoch, stream):
    found = uniforms(torch.tensor(ids), 3, seed=seed, epoch=epoch, stream=stream)

    expected = [
        [by_hand(item, number, seed=seed, epoch=epoch, stream=stream) for number in range(3)]
        for item in ids
    ]
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor(expected))  # 24 bits are exact in float32


def test_splitmix_of_the_oracle_gives_the_published_sequence():
    # The first outputs of splitmix64 from state 1234567 (test vector of Rosetta Code).
    found = [splitmix((1234567 + step * GOLDEN) & WORD) for step in (1, 2, 3)]

    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(
    ids=st.lists(st.integers(0, 10**6), min_size=1, max_size=6),
    extra=st.lists(st.integers(0, 10**6), max_size=4),
    count=st.integers(1, 5),
)
def test_an_item_gets_the_same_numbers_in_any_company(ids, extra, count):
    key = {"seed": 3, "epoch": 2, "stream": 1}

    alone = torch.cat([uniforms(torch.tensor([item]), 5, **key) for item in ids])
    together = uniforms(torch.tensor([*extra, *ids]), count, **key)

    assert torch.equal(together[len(extra) :], alone[:, :count])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_numbers_do_not_depend_on_the_integer_type_of_the_ids(dtype):
    ids = torch.arange(100)

    found = uniforms(ids.to(dtype), 4, seed=1, epoch=2, stream=3)

    assert torch.equal(found, uniforms(ids, 4, seed=1, epoch=2, stream=3))


def test_numbers_lie_in_the_unit_interval_with_both_ends_reached():
    numbers = uniforms(torch.arange(50_000), 20, seed=0, epoch=0, stream=0)

    assert 0 <= numbers.min() < 1e-5
    assert 1 - 1e-5 < numbers.max() < 1


def test_numbers_are_uniform():
    numbers = uniforms(torch.arange(20_000), 10, seed=0, epoch=0, stream=0)

    for column in numbers.T:
        counts = torch.histc(column, 64, 0, 1)
        chi_square = ((counts - 20_000 / 64) ** 2 / (20_000 / 64)).sum().item()
        assert 63 - 4 * math.sqrt(126) < chi_square < 63 + 4 * math.sqrt(126)


# Neighbors in every part of the key; sequential keys are what a weak mixer fails on.
KEYS = [
    {"seed": seed, "epoch": epoch, "stream": stream}
    for seed, epoch, stream in [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2), (1, 1, 1), (0, 2, 1)]
]


def test_neighboring_seeds_epochs_streams_items_and_counters_are_uncorrelated():
    items = 20_000
    columns = torch.cat([uniforms(torch.arange(items + 1), 3, **key) for key in KEYS], dim=1)
    table = torch.cat([columns[:-1], columns[1:]], dim=1).double()  # each item beside its neighbor

    correlation = torch.corrcoef(table.T) - torch.eye(table.shape[1], dtype=torch.float64)

    # 630 pairs, standard error 1 / sqrt(items): the largest of them stays under 4.5 of it.
    assert correlation.abs().max() < 4.5 / math.sqrt(items)


def test_different_keys_share_no_numbers():
    rows = torch.cat([uniforms(torch.arange(1000), 4, **key) for key in KEYS])

    assert len(torch.unique(rows, dim=0)) == len(rows)
