import math

import pytest
import torch
from torch.testing import assert_close

from mimic_fast.mutual_information.dv import Critic, dv_value, train_critic
from mimic_fast.mutual_information.infonce import all_pairs, info_nce, infonce_bound

CPU = torch.device("cpu")


def train(maps, features, *, epochs, batch=64, seed=0):
    return train_critic(
        maps,
        features,
        epochs=epochs,
        batch=batch,
        seed=seed,
        device=CPU,
        poll=lambda: None,
        bound=infonce_bound,
    )


def test_bound_is_the_mean_log_share_of_the_true_pair_in_the_batch():
    scores = torch.randn(5, 5, dtype=torch.float64)

    expected = sum(
        math.log(5 * math.exp(row[i]) / sum(map(math.exp, row)))
        for i, row in enumerate(scores.tolist())
    )
    assert float(info_nce(scores)) == pytest.approx(expected / 5, abs=1e-12)


def test_no_scores_exceed_the_logarithm_of_the_batch():
    assert float(info_nce(1000 * torch.eye(8))) == pytest.approx(math.log(8))
    assert float(info_nce(torch.zeros(8, 8))) == pytest.approx(0, abs=1e-6)


def test_every_pair_is_scored_as_the_critic_scores_it():
    critic = Critic(7, generator=torch.Generator().manual_seed(0)).double()
    maps, features = torch.randn(6, 4).double(), torch.randn(6, 3).double()

    found = all_pairs(critic, maps, features)

    for i in range(6):
        for j in range(6):
            assert_close(found[i, j], critic(torch.cat([maps[i], features[j]]))[0])
    own = torch.autograd.grad(found.sum(), list(critic.parameters()))
    pairs = torch.cat([maps.repeat_interleave(6, dim=0), features.repeat(6, 1)], dim=1)
    expected = torch.autograd.grad(critic(pairs).sum(), list(critic.parameters()))
    for gradient, other in zip(own, expected, strict=True):
        assert_close(gradient, other)


def test_dependent_data_show_nats_and_independent_data_next_to_none():
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(128, generator=generator)
    features = torch.stack([angle.cos(), angle.sin()], dim=1)
    noise = 0.2 * torch.randn(128, 2, generator=generator)

    dependent = dv_value(train(features + noise, features, epochs=10, batch=16)).value
    independent = dv_value(train(noise, features, epochs=3, batch=16)).value

    # the angle is known to about 0.2 rad: 2.0 nats
    assert 1.0 < dependent < 2.2
    assert independent < 0.2


def test_result_depends_on_the_seed_alone():
    maps, features = torch.randn(2, 16, 3)
    torch.manual_seed(1)
    before = torch.get_rng_state()

    first = train(maps, features, epochs=2, batch=8)

    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(train(maps, features, epochs=2, batch=8), first)
    assert not torch.equal(train(maps, features, epochs=2, batch=8, seed=1), first)
