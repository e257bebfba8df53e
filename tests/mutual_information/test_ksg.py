"""Neighbor counts against plain loops, a k-d tree and scikit-learn; the estimate against theory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import KDTree
from scipy.special import digamma
from sklearn.feature_selection import mutual_info_regression

from mimic_fast.mutual_information import ksg
from mimic_fast.mutual_information.ksg import ksg_terms, neighbor_counts


def drawn(images: int, *dims: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, d, generator=generator, dtype=torch.float64) for d in dims]


def naive_counts(x, y, k):
    def distance(a, b):
        return max(abs(p - q) for p, q in zip(a, b, strict=True))

    counts = [[], []]
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        joint = sorted(max(distance(x[i], x[j]), distance(y[i], y[j])) for j in others)
        for side, rows in enumerate((x, y)):
            nearer = [j for j in others if distance(rows[i], rows[j]) < joint[k - 1]]
            counts[side].append(len(nearer))
    return counts


@pytest.mark.parametrize(
    ("images", "dims", "k"), [(4, (1, 1), 3), (31, (2, 5), 3), (40, (3, 1), 1)]
)
def test_counts_are_those_of_plain_loops(images, dims, k):
    x, y = drawn(images, *dims)

    assert neighbor_counts(x, y, neighbors=k).tolist() == naive_counts(x.tolist(), y.tolist(), k)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=4, max_size=14))
def test_ties_are_counted_as_plain_loops_count_them(values):
    x, y = torch.tensor(values, dtype=torch.float64).T[:, :, None].unbind()

    assert neighbor_counts(x, y, neighbors=3).tolist() == naive_counts(x.tolist(), y.tolist(), 3)


def test_parts_do_not_change_the_counts(monkeypatch):
    x, y = drawn(50, 2, 2)
    whole = neighbor_counts(x, y, neighbors=3)

    monkeypatch.setattr(ksg, "_DISTANCES", 7 * 50)

    assert torch.equal(neighbor_counts(x, y, neighbors=3), whole)


def test_estimate_is_that_of_a_k_d_tree():
    x, y = (t.numpy() for t in drawn(300, 3, 2, seed=1))
    y[:, 0] += x[:, 1]
    both = np.hstack([x, y])
    reach = KDTree(both).query(both, k=4, p=np.inf)[0][:, 3]
    inside = np.nextafter(reach, 0)
    sizes = [
        KDTree(side).query_ball_point(side, inside, p=np.inf, return_length=True) for side in (x, y)
    ]  # the image itself included
    expected = digamma(3) + digamma(300) - np.mean(digamma(sizes[0]) + digamma(sizes[1]))

    found = float(ksg_terms(torch.from_numpy(x), torch.from_numpy(y)).mean())

    assert found == pytest.approx(expected, abs=1e-12)


def test_estimate_is_scikit_learns():
    x, y = drawn(400, 1, 1, seed=2)
    y = y + 2 * x
    x, y = ((t - t.mean()) / t.std(correction=0) for t in (x, y))

    expected = mutual_info_regression(x.numpy(), y[:, 0].numpy(), n_neighbors=3, random_state=0)

    assert float(ksg_terms(x, y).mean()) == pytest.approx(expected[0], abs=1e-6)


@pytest.mark.parametrize("r", [0.0, 0.6, 0.9])
def test_gaussian_in_one_dimension_has_its_closed_form(r):
    found = []
    for seed in range(10):
        x, noise = drawn(500, 1, 1, seed=seed)
        found.append(float(ksg_terms(x, r * x + math.sqrt(1 - r * r) * noise).mean()))

    error = float(torch.tensor(found).std()) / math.sqrt(10)
    truth = -0.5 * math.log(1 - r * r)
    assert abs(sum(found) / 10 - truth) < 3 * error + 0.02


def test_equal_sides_read_as_the_number_of_images_allows():
    (x,) = drawn(200, 2)

    found = float(ksg_terms(x, x.clone()).mean())

    assert found == pytest.approx(digamma(200) - digamma(3))


def test_symmetric_and_blind_to_the_order_of_images():
    x, y = drawn(100, 2, 3)
    order = torch.randperm(100)

    terms = ksg_terms(x, y)

    assert torch.allclose(ksg_terms(y, x), terms, atol=1e-12)
    assert torch.equal(ksg_terms(x[order], y[order]), terms[order])


@pytest.mark.parametrize(("images", "neighbors"), [(3, 3), (5, 0)])
def test_too_few_images_for_the_neighbors_are_refused(images, neighbors):
    x, y = drawn(images, 1, 1)

    with pytest.raises(ValueError, match=rf"{neighbors} neighbors of {images} images"):
        neighbor_counts(x, y, neighbors=neighbors)
