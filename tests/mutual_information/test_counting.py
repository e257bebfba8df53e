import torch

from mimic_fast.distributed import SINGLE
from mimic_fast.mutual_information.counting import bin_codes, count_matched, jackknife_group
from mimic_fast.ops import equal_mass_codes


def count_pairs(x, y, *, bins, **settings):
    codes = bin_codes((x, y), bins=bins, processes=SINGLE)
    return count_matched(*codes, bins=bins, processes=SINGLE, **settings)


def test_counts_are_those_of_the_codes_apart_for_every_group():
    x, y = torch.rand(2, 3, 47)

    counts = count_pairs(x, y, bins=4, num_groups=5, shuffles=2)

    group = jackknife_group(47, num_groups=5)
    expected = torch.zeros(5, 3, 4, 4, dtype=torch.int32)
    codes = equal_mass_codes(x, bins=4).tolist(), equal_mass_codes(y, bins=4).tolist()
    for pair in range(3):
        for image in range(47):
            expected[group[image], pair, codes[0][pair][image], codes[1][pair][image]] += 1
    assert torch.equal(counts.groups, expected)


def test_shuffled_pairings_keep_both_margins_and_no_pair():
    x = torch.arange(64.0)[None]

    counts = count_pairs(x, x, bins=8, num_groups=2, shuffles=9)

    assert counts.shuffled.shape == (9, 1, 8, 8)
    assert bool((counts.shuffled.sum(dim=2) == 8).all())
    assert bool((counts.shuffled.sum(dim=3) == 8).all())
    assert len({tuple(table.flatten().tolist()) for table in counts.shuffled}) == 9
    together = int(counts.groups.sum(dim=0)[0].diagonal().sum())
    assert together == 64
    assert int(counts.shuffled[0, 0].diagonal().sum()) < together


def test_no_pairs_give_empty_counts():
    none = torch.empty(0, 40)

    counts = count_pairs(none, none, bins=4, num_groups=5, shuffles=2)

    assert counts.groups.shape == (5, 0, 4, 4)
    assert counts.shuffled.shape == (2, 0, 4, 4)
