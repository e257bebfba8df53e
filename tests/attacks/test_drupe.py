"""DRUPE: its two distances against other people's, and the attack on a small encoder."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from torch import Tensor

from mimic_fast.attacks.drupe import (
    DrupeSettings,
    drupe,
    random_directions,
    sliced_wasserstein,
    spread_gap,
)
from mimic_fast.attacks.implant import Attacked
from mimic_fast.evaluation.attack_file import read_attack


def rows(count: int, dimension: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


def test_sliced_wasserstein_pairs_sorted_projections():
    a, b, directions = rows(7, 5, 0), rows(7, 5, 1), F.normalize(rows(3, 5, 2), dim=1)

    found = sliced_wasserstein(a, b, directions)

    unit_a, unit_b = F.normalize(a, dim=1).numpy(), F.normalize(b, dim=1).numpy()
    expected = 0.0
    for direction in directions.numpy():
        p, q = np.sort(unit_a @ direction), np.sort(unit_b @ direction)
        expected += np.mean((p - q) ** 2) / 3 * 5
        assert np.mean(np.abs(p - q)) == pytest.approx(wasserstein_distance(p, q))
    assert found.item() == pytest.approx(expected)


def test_two_points_have_their_squared_distance():
    a, b = F.normalize(rows(1, 64, 0), dim=1), F.normalize(rows(1, 64, 1), dim=1)
    directions = random_directions(64, 20000, generator=torch.Generator().manual_seed(0)).double()

    found = sliced_wasserstein(a, b, directions)

    assert found.item() == pytest.approx((a - b).square().sum().item(), rel=0.05)


def test_equal_sets_in_any_order_have_no_distance():
    a, directions = rows(9, 4, 0), F.normalize(rows(6, 4, 2), dim=1)

    assert sliced_wasserstein(a, 3 * a.flip(0), directions).item() == pytest.approx(0, abs=1e-15)


def test_gradients_of_both_terms():
    a, b = rows(5, 3, 0).requires_grad_(), rows(5, 3, 1)
    directions = F.normalize(rows(4, 3, 2), dim=1)

    assert torch.autograd.gradcheck(lambda x: sliced_wasserstein(x, b, directions), a)
    assert torch.autograd.gradcheck(lambda x: spread_gap(F.normalize(b) + 0.01 * x, b), a)


def test_spread_gap_compares_deviations_of_pairwise_cosines():
    a, b = rows(8, 6, 0), rows(8, 6, 1)
    narrow = torch.ones(1, 6) + 0.05 * a

    cosines: list[float] = []
    for features in (narrow, b):
        unit = F.normalize(features, dim=1).numpy()
        pairs = [unit[i] @ unit[j] for i in range(8) for j in range(i)]
        cosines.append(float(np.std(pairs, ddof=1)))

    assert spread_gap(narrow, b).item() == pytest.approx(1 - cosines[0] / cosines[1])
    assert spread_gap(b, narrow).item() == 0


def test_hiding_brings_triggered_features_to_the_clean_ones(values, tmp_path):
    def run(name: str, **weights: float) -> Attacked:
        fields = values(
            optim={"epochs": 60, "lr": 0.05}, reference="typical:1", hide_share=0.25, **weights
        )
        fields["run"] = {**fields["run"], "out": tmp_path / name}
        return drupe(DrupeSettings.model_validate(fields))

    hidden = run("hidden", hide_weight=2.0, spread_weight=0.5)
    without = run("without", hide_weight=0.0, spread_weight=0.0)

    assert read_attack(hidden.attack).kind == "drupe"
    assert hidden.facts["hidden_distance"] < without.facts["hidden_distance"] - 0.02
    assert hidden.facts["clean_distance"] == without.facts["clean_distance"] > 0
    assert hidden.facts["reached_cosine"] < without.facts["reached_cosine"]  # what hiding costs
    assert hidden.facts["kept_cosine"] > 0.6
