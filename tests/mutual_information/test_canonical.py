import pytest
import torch
from torch.testing import assert_close

from mimic_fast.mutual_information.canonical import (
    canonical_pairs,
    coordinates,
    cross_fit_folds,
    whiten,
)


@pytest.mark.parametrize("images", [2, 7, 100, 101])
def test_folds_measure_every_image_once_on_a_rotation_fitted_without_it(images):
    first, second = cross_fit_folds(images, seed=1)

    for fold in (first, second):
        assert len(fold.measured) == images // 2
        assert not set(fold.fit.tolist()) & set(fold.measured.tolist())
        assert len(fold.fit) + len(fold.measured) == images
    assert not set(first.measured.tolist()) & set(second.measured.tolist())


def test_folds_depend_on_the_seed_alone():
    torch.manual_seed(0)
    before = cross_fit_folds(50, seed=4)[0].measured
    torch.manual_seed(1)

    assert torch.equal(before, cross_fit_folds(50, seed=4)[0].measured)
    assert not torch.equal(before, cross_fit_folds(50, seed=5)[0].measured)


def test_whitened_directions_are_uncorrelated_with_unit_variance():
    rows = torch.randn(200, 10) @ torch.randn(10, 10) + 5

    white = whiten(rows, components=6)(rows)

    assert white.dtype == torch.float64
    assert_close(white.T.cov(), torch.eye(6, dtype=torch.float64))


def test_whitening_keeps_the_directions_of_largest_variance():
    scales = torch.tensor([1.0, 30.0, 3.0, 10.0])
    rows = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * scales

    directions = whiten(rows, components=2).directions

    assert directions.abs().argmax(dim=0).tolist() == [1, 3]


def test_dead_constant_and_repeated_units_are_no_directions():
    alive = torch.randn(300, 3)
    dead = torch.zeros(300, 2)
    constant = torch.full((300, 1), 1000.0)
    rows = torch.cat([alive, dead, constant, alive[:, :1], alive.sum(dim=1, keepdim=True)], dim=1)

    assert whiten(rows, components=64).directions.shape == (8, 3)


def test_rounding_around_a_constant_is_no_direction():
    rows = 1000 + 1e-4 * torch.randn(300, 4).double()  # the last bits of a float32 of this size

    assert whiten(rows, components=64).directions.shape == (4, 0)
    assert whiten(torch.zeros(300, 4), components=64).directions.shape == (4, 0)


def test_at_most_one_direction_per_four_images_is_kept():
    assert whiten(torch.randn(40, 64), components=64).directions.shape == (64, 10)


def test_canonical_correlations_equal_those_of_orthonormal_bases():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    y = x[:, :3] @ torch.randn(3, 4, generator=generator, dtype=torch.float64)
    y = y + torch.randn(400, 4, generator=generator, dtype=torch.float64)

    of_x, of_y = canonical_pairs(
        x, y, layer_whitening=whiten(x, components=64), features_whitening=whiten(y, components=64)
    )

    # Bjorck and Golub: the cosines between the column spaces of the centered data.
    bases = [torch.linalg.qr(t - t.mean(dim=0)).Q for t in (x, y)]
    expected = torch.linalg.svdvals(bases[0].T @ bases[1])
    joint = torch.cat([of_x(x), of_y(y)], dim=1).T.corrcoef()
    assert_close(joint[:4, 4:], torch.diag(expected))


def test_images_with_equal_activations_have_equal_coordinates():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(257, 100, generator=generator)
    rows[200:] = rows[3]

    values = coordinates(rows, whiten(rows, components=20))

    assert values.dtype == torch.float32
    assert all(len(set(direction[200:].tolist())) == 1 for direction in values)
