"""The Triton histograms, interpreted, against torch.bincount and the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimic_fast.kernels import mi_histogram, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BINS = [4, 8, 16, 32, 64]
NATS = 1e-5  # float32 sums on the chip against float64


def codes(*shape: int, bins: int, seed: int = 0, missing: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(bins, shape, generator=generator)
    gone = torch.rand(shape, generator=generator) < missing
    return torch.where(gone, reference.MISSING, drawn).to(torch.uint8)


@pytest.mark.parametrize("images", [1, 97, 300], ids=lambda n: f"n{n}")
@pytest.mark.parametrize("bins", BINS, ids=lambda k: f"K{k}")
def test_matched_counts_are_those_of_bincount(bins, images):
    x, y = codes(3, images, bins=bins), codes(3, images, bins=bins, seed=1)

    counts = mi_histogram.joint_histogram(x, y, bins=bins)

    assert counts.dtype == torch.int32
    for pair in range(3):
        cell = x[pair].long() * bins + y[pair].long()
        expected = torch.bincount(cell, minlength=bins * bins).view(bins, bins)
        assert torch.equal(counts[0, 0, pair].long(), expected)


@pytest.mark.parametrize("bins", [4, 12, 16, 24], ids=lambda k: f"K{k}")
def test_cross_counts_are_those_of_every_pair(bins):
    x, y = codes(9, 150, bins=bins), codes(3, 150, bins=bins, seed=1)

    counts = mi_histogram.cross_histogram(x, y, bins=bins, rolls=(0, 5))

    assert torch.equal(counts, reference.cross_histogram(x, y, bins=bins, rolls=(0, 5)))


@pytest.mark.parametrize("bins", [128, 256])
def test_many_bins_are_counted_in_tiles(bins):
    x, y = codes(1, 400, bins=bins), codes(1, 400, bins=bins, seed=1)

    counts = mi_histogram.joint_histogram(x, y, bins=bins)

    assert torch.equal(counts, reference.joint_histogram(x, y, bins=bins))


@settings(max_examples=12)
@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from([2, 5, 16, 17]),
    st.integers(1, 4),
    st.lists(st.integers(-80, 80), min_size=1, max_size=3),
    st.data(),
)
def test_groups_rolls_and_ranges_are_those_of_the_oracle(
    pairs, images, bins, num_groups, rolls, data
):
    x = codes(pairs, images, bins=bins, missing=0.1)
    y = codes(pairs, images, bins=bins, seed=1, missing=0.1)
    groups = torch.arange(images) % num_groups
    start = data.draw(st.integers(0, images))
    chosen = {"rolls": tuple(rolls), "images": (start, data.draw(st.integers(start, images)))}

    counts = mi_histogram.joint_histogram(x, y, groups, bins=bins, num_groups=num_groups, **chosen)

    expected = reference.joint_histogram(x, y, groups, bins=bins, num_groups=num_groups, **chosen)
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("bins", BINS, ids=lambda k: f"K{k}")
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_matched_information_is_that_of_the_counts(bins, missing):
    x = codes(2, 333, bins=bins, missing=missing)
    y = torch.where(codes(2, 333, bins=3, seed=2) > 0, x, codes(2, 333, bins=bins, seed=1))

    found = mi_histogram.matched_information(x, y, bins=bins, rolls=(0, 100))

    assert found.dtype == torch.float32
    expected = reference.matched_information(x, y, bins=bins, rolls=(0, 100))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=NATS)


@pytest.mark.parametrize("bins", [4, 12, 16, 24], ids=lambda k: f"K{k}")
def test_cross_information_is_that_of_the_counts(bins):
    x, y = codes(9, 200, bins=bins, missing=0.1), codes(2, 200, bins=bins, seed=1)

    found = mi_histogram.cross_information(x, y, bins=bins, rolls=(0, 33))

    expected = reference.cross_information(x, y, bins=bins, rolls=(0, 33))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=NATS)


def test_information_of_what_determines_itself_is_its_entropy_and_of_a_constant_nothing():
    x = (torch.arange(64) % 16)[None].to(torch.uint8)
    constant = torch.full((1, 64), 7, dtype=torch.uint8)

    for information in (mi_histogram.matched_information, mi_histogram.cross_information):
        assert float(information(x, x, bins=16)) == pytest.approx(math.log(16), abs=NATS)
        assert float(information(x, constant, bins=16)) == pytest.approx(0, abs=NATS)
        assert float(information(constant, constant, bins=16)) == pytest.approx(0, abs=NATS)


def test_no_image_is_no_information():
    nothing = torch.full((1, 40), reference.MISSING, dtype=torch.uint8)

    assert mi_histogram.joint_histogram(nothing, nothing, bins=16).sum() == 0
    assert float(mi_histogram.matched_information(nothing, nothing, bins=16)) == 0
    assert float(mi_histogram.cross_information(nothing, nothing, bins=16)) == 0


def test_counts_beyond_a_byte_do_not_overflow():
    x = torch.zeros(8, 1000, dtype=torch.uint8)

    assert mi_histogram.cross_histogram(x, x[:1], bins=4)[0, :, 0, 0, 0].tolist() == [1000] * 8
    assert mi_histogram.joint_histogram(x[:1], x[:1], bins=4)[0, 0, 0, 0, 0] == 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_edge_codes_are_those_of_the_oracle(dtype):
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    edges = torch.linspace(-1, 1, 9).expand(3, 9).to(dtype).contiguous()
    values[1, :9] = edges[1]  # every edge, the last one included

    codes = mi_histogram.edge_codes(values, edges)

    assert torch.equal(codes, reference.edge_codes(values, edges))
    assert codes[0, 0] == reference.MISSING
    assert codes[1, 8] == 7


def test_strided_codes_count_as_their_values():
    x, y = (codes(50, 3, bins=5, seed=n).mT for n in (0, 1))

    counts = mi_histogram.joint_histogram(x, y, bins=5)

    assert torch.equal(counts, reference.joint_histogram(x, y, bins=5))
