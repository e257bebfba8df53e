import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimic_fast.ops import joint_histogram


@given(st.integers(1, 4), st.integers(1, 30), st.integers(2, 9), st.integers(1, 4), st.integers(0))
def test_counts_equal_those_of_a_loop(pairs, images, bins, num_groups, seed):
    generator = torch.Generator().manual_seed(seed % 2**63)
    x, y = torch.randint(0, bins, (2, pairs, images), generator=generator).to(torch.uint8)
    groups = torch.randint(0, num_groups, (images,), generator=generator)

    counts = joint_histogram(x, y, groups, bins=bins, num_groups=num_groups)[0]

    expected = torch.zeros(num_groups, pairs, bins, bins, dtype=torch.int32)
    for pair in range(pairs):
        for image in range(images):
            expected[groups[image], pair, int(x[pair, image]), int(y[pair, image])] += 1
    assert torch.equal(counts, expected)


def test_the_largest_number_of_bins_does_not_overflow():
    x = torch.full((2, 3), 255, dtype=torch.uint8)
    groups = torch.tensor([0, 1, 1])

    counts = joint_histogram(x, x, groups, bins=256, num_groups=2)[0]

    assert counts[:, :, 255, 255].tolist() == [[1, 1], [2, 2]]
    assert int(counts.sum()) == 6


def test_strided_codes_count_as_their_values():
    x, y = torch.randint(0, 5, (2, 20, 3)).to(torch.uint8).mT
    groups = torch.zeros(20, dtype=torch.int64)

    counts = joint_histogram(x, y, groups, bins=5, num_groups=1)

    packed = joint_histogram(x.contiguous(), y.contiguous(), groups, bins=5, num_groups=1)
    assert torch.equal(counts, packed)


def test_groups_out_of_range_are_refused():
    codes = torch.zeros(1, 4, dtype=torch.uint8)
    groups = torch.zeros(4, dtype=torch.int64)

    with pytest.raises(ValueError, match=r"groups must lie in 0\.\.1"):
        joint_histogram(codes, codes, groups + 2, bins=4, num_groups=2)
    with pytest.raises(ValueError, match=r"groups must lie in 0\.\.1"):
        joint_histogram(codes, codes, groups - 1, bins=4, num_groups=2)
