"""All that bench_mi.py times finds the same information, and who does not is found out."""

import mmap
from functools import partial

import numpy as np
import pytest
import torch

import benchmarks.mi_peers as peers
from benchmarks.memory import peak_growth
from benchmarks.mi_rows import Candidates, check, compiled_product, numpy_peers, ours, ours_binned
from mimic_fast import ops
from mimic_fast.kernels import reference


@pytest.fixture(scope="module", params=["cross", "matched"])
def work(request) -> peers.Workload:
    return peers.workload(request.param, layers=2, directions=3, images=160)


def test_workload_has_pairs_that_share_something_and_no_value_twice(work):
    assert work.pairs == (18 if work.name == "cross" else 6)
    assert (len(work.x), len(work.y)) == (6, 3 if work.name == "cross" else 6)
    assert np.corrcoef(work.x[0], work.y[0])[0, 1] > 0.7
    for row in (*work.x, *work.y):
        assert len(np.unique(row)) == 160
    assert str(work.pairs // len(work.x)) in work.shape


def test_numpy_bins_by_rank_as_the_reference_does(work):
    codes = peers.numpy_codes(work.x)

    expected = reference.equal_mass_codes(torch.from_numpy(work.x), bins=peers.BINS)
    assert np.array_equal(codes, expected.numpy())


def test_peers_and_ours_find_the_information_of_the_reference(work):
    x, y = (torch.from_numpy(peers.numpy_codes(values)) for values in (work.x, work.y))
    of = reference.cross_information if work.name == "cross" else reference.matched_information
    expected = of(x, y, bins=peers.BINS)[0].flatten().numpy()
    candidates: Candidates = {
        name: partial(peer, x.numpy().astype(dtype), y.numpy().astype(dtype), work.name)
        for name, (peer, dtype) in numpy_peers(work.name).items()
    }
    candidates["cpp"] = lambda: ours("cpp", work.name, x, y)
    candidates["binned"] = lambda: ours_binned(
        "cpp", work.name, torch.from_numpy(work.x), torch.from_numpy(work.y)
    )

    check(candidates, expected, device="cpu")

    assert expected.max() > 0.5
    with pytest.raises(AssertionError, match="wrong: off by"):
        check({"wrong": lambda: expected + 2e-6}, expected, device="cpu")


def test_one_hot_product_finds_the_information_of_the_reference():
    work = peers.workload("cross", layers=1, directions=3, images=160)
    x, y = (torch.from_numpy(peers.numpy_codes(values)) for values in (work.x, work.y))
    counts = torch.arange(161, dtype=torch.float64)

    found = peers.one_hot_product(x, y, torch.special.xlogy(counts, counts))

    expected = ops.cross_information(x, y, bins=peers.BINS)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert callable(compiled_product(160, "cpu"))


def test_growth_of_memory_is_what_a_call_touches():
    size = 32 << 20

    def touch() -> None:
        # New pages from the system: an allocator may have kept some that earlier tests freed.
        np.frombuffer(mmap.mmap(-1, size), np.uint8).fill(1)

    grown = peak_growth(touch)

    if grown is None:
        pytest.skip("memory is read from /proc")
    assert 0.99 * size <= grown < 1.25 * size  # pages that were freed meanwhile count against it
    assert (peak_growth(lambda: None) or 0) < size / 8
