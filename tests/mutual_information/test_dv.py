import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mimic_fast.mutual_information.dv import Critic, donsker_varadhan, dv_value, train_critic

CPU = torch.device("cpu")


def go_on() -> None:
    pass


def train(maps, features, *, epochs=30, seed=0):
    return train_critic(maps, features, epochs=epochs, batch=128, seed=seed, device=CPU, poll=go_on)


def test_bound_is_mean_less_log_mean_exp():
    joint, shuffled = torch.randn(2, 50, dtype=torch.float64)

    expected = joint.mean() - shuffled.exp().mean().log()
    assert_close(donsker_varadhan(joint, shuffled), expected)


def test_bound_does_not_overflow_where_exp_does():
    shuffled = torch.tensor([1000.0, 1000.0])  # exp(1000) is infinite in float32

    assert float(donsker_varadhan(torch.tensor([1001.0, 1001.0]), shuffled)) == 1


def test_critic_has_the_demos_layers_and_torchs_own_initialization():
    critic = Critic(70, generator=torch.Generator().manual_seed(0))

    assert [tuple(p.shape) for p in critic.parameters()] == [
        (512, 70), (512,), (512, 512), (512,), (1, 512), (1,),
    ]  # fmt: skip
    assert [type(part) for part in critic] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    reference = nn.Linear(70, 512).weight.detach()
    drawn = next(critic.parameters()).detach()
    assert float(drawn.abs().max()) == pytest.approx(1 / math.sqrt(70), rel=1e-2)
    assert float(drawn.std()) == pytest.approx(float(reference.std()), rel=0.05)


def test_dependent_data_show_nats_and_independent_data_next_to_none():
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(512, generator=generator)
    features = torch.stack([angle.cos(), angle.sin()], dim=1)
    noise = 0.2 * torch.randn(512, 2, generator=generator)

    dependent = dv_value(train(features + noise, features)).value
    independent = dv_value(train(noise, features, epochs=10)).value

    # the angle is known to about 0.2 rad: log(2 pi) - log(0.2 sqrt(2 pi e)) = 2.0 nats
    assert 1.0 < dependent < 2.2
    assert independent < 0.3


def test_features_count_by_direction_alone():
    maps, features = torch.randn(2, 130, 3)

    assert torch.equal(train(maps, features, epochs=2), train(maps, 8 * features, epochs=2))


def test_result_depends_on_the_seed_alone():
    maps, features = torch.randn(2, 130, 3)
    torch.manual_seed(1)
    before = torch.get_rng_state()

    first = train(maps, features, epochs=3)

    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(train(maps, features, epochs=3), first)
    assert not torch.equal(train(maps, features, epochs=3, seed=1), first)


def test_the_last_ten_epochs_are_kept_and_polled():
    calls = []
    maps, features = torch.randn(2, 20, 3)

    values = train_critic(
        maps, features, epochs=12, batch=8, seed=0, device=CPU, poll=lambda: calls.append(1)
    )

    assert values.shape == (10,)
    assert values.dtype == torch.float64
    assert len(calls) == 12
    assert bool((values >= 0).all())


def test_a_last_batch_of_one_image_is_left_out():
    maps, features = torch.randn(2, 9, 3)

    values = train_critic(maps, features, epochs=1, batch=8, seed=0, device=CPU, poll=go_on)

    assert bool(values.isfinite().all())


def test_what_is_not_finite_is_not_hidden_by_the_clamp():
    maps, features = torch.randn(2, 20, 3)
    maps[0, 0] = math.nan

    assert math.isnan(dv_value(train(maps, features, epochs=1)).value)


def test_interval_is_the_spread_of_the_last_epochs():
    found = dv_value(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

    assert found.value == 2
    assert found.high - found.value == pytest.approx(4.3027, abs=1e-3)  # t of 2 degrees, sd 1
    assert found.value - found.low == pytest.approx(4.3027, abs=1e-3)
    assert dv_value(torch.tensor([1.5], dtype=torch.float64)).low == 1.5
