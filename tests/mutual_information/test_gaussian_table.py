import math

import pytest
import torch
from torch.testing import assert_close

from mimic_fast.mutual_information.gaussian_table import (
    gaussian_information,
    gaussian_table,
    normal_scores,
)


def population_loss(r: float, bins: int) -> float:
    """g(r) less the information of the exact cell probabilities: no sampling, by quadrature."""
    edges = torch.special.ndtri(torch.linspace(0, 1, bins + 1, dtype=torch.float64))
    points = 400 * bins
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    x = torch.special.ndtri(u)
    below = torch.special.ndtr((edges[None, :] - r * x[:, None]) / math.sqrt(1 - r * r))
    cells = below.diff(dim=1).view(bins, -1, bins).mean(dim=1) / bins
    return float(-0.5 * math.log(1 - r * r) - torch.special.xlogy(cells, cells * bins * bins).sum())


@pytest.mark.parametrize("r", [0.1, 0.3, 0.6, 0.9, 0.98])
def test_loss_of_many_images_is_that_of_the_cell_probabilities(r):
    table = gaussian_table(8, 20_000)

    # 0.003: Monte Carlo error, and what the bias at 20,000 images differs from chance
    assert float(table.loss(torch.tensor(r).double())) == pytest.approx(
        population_loss(r, 8), abs=3e-3
    )


def test_nothing_is_lost_of_independent_variables_and_more_of_stronger_ones():
    loss = gaussian_table(16, 1000).loss(torch.linspace(0, 0.99, 34).double())

    assert float(loss[0]) == 0
    assert bool((loss[10:].diff() > 0).all())  # from r = .3 on, where it exceeds the noise
    assert float(loss[:10].abs().max()) < 2e-3


def test_table_is_cached_and_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = gaussian_table.__wrapped__(4, 1000)

    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(first.coefficients, gaussian_table.__wrapped__(4, 1000).coefficients)
    assert gaussian_table(4, 1000) is gaussian_table(4, 1000)


def test_gaussian_information_is_the_closed_form():
    r = torch.tensor([0.0, 0.3, 0.6, 0.9]).double()

    expected = torch.tensor([0.0, 0.0471553, 0.2231436, 0.8303656]).double()
    assert_close(gaussian_information(r), expected, atol=2e-7, rtol=0)


def test_normal_scores_depend_on_ranks_alone_and_give_ties_their_middle():
    values = torch.tensor([[3.0, 1.0, 1.0, 100.0]])

    scores = normal_scores(values)

    expected = torch.special.ndtri(torch.tensor([[0.625, 0.25, 0.25, 0.875]]).double())
    assert_close(scores, expected)
    assert_close(normal_scores(values.exp().double()), expected)
