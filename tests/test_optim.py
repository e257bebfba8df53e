import copy
import math
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimic_fast.config import OptimSettings
from mimic_fast.optim import (
    averaged_state,
    build_optimizer,
    gradient_norm,
    learning_rate,
    set_learning_rate,
    start_momentum,
    update_average,
)

NAMES = ["adamw", "adam", "sgd"]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)]
    return nn.Sequential(*layers).double()


def settings(name: str = "adamw", **changes: Any) -> OptimSettings:
    return OptimSettings.model_validate({"name": name, "lr": 0.01, "weight_decay": 0.1} | changes)


def set_gradients(model: nn.Module, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def step_by_hand(name: str, values: list[list[float]], steps: int) -> list[float]:
    """One scalar after ``steps`` steps over its gradients; lr .01, decay .1, momentum .9."""
    (value,), gradients = values
    first = second = 0.0
    for t, gradient in enumerate(gradients[:steps], start=1):
        if name == "adamw":
            value -= 0.01 * 0.1 * value
        else:
            gradient += 0.1 * value
        if name == "sgd":
            first = 0.9 * first + gradient
            value -= 0.01 * first
        else:
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            root = math.sqrt(second / (1 - 0.999**t))
            value -= 0.01 * first / (1 - 0.9**t) / (root + 1e-8)
    return [value]


@pytest.mark.parametrize("name", NAMES)
def test_optimizers_follow_their_formulas(name):
    parameter = nn.Parameter(torch.tensor([[1.5]], dtype=torch.float64))  # a matrix: decayed
    optimizer = build_optimizer(nn.ParameterList([parameter]), settings(name))
    gradients = [0.3, -0.2, 0.05, 0.7]

    for gradient in gradients:
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()

    expected = step_by_hand(name, [[1.5], gradients], 4)
    assert parameter.flatten().tolist() == pytest.approx(expected, rel=1e-9)


def decayed(module: nn.Module, name: str) -> set[str]:
    """Names of the parameters that shrink where every gradient is zero."""
    module = module.double()
    optimizer = build_optimizer(module, settings(name))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {key for key, value in module.named_parameters() if not (value == 1).all()}


def test_adamw_decays_matrices_and_kernels_and_spares_vectors():
    assert decayed(small_model(), "adamw") == {"0.weight", "4.weight"}


def test_adamw_spares_the_tokens_and_positions_of_a_vit():
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=0, reg_tokens=2
    )

    found = decayed(vit, "adamw")

    assert found == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    }
    assert {"cls_token", "reg_token", "pos_embed"} <= {name for name, _ in vit.named_parameters()}


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_adam_and_sgd_decay_everything_as_the_demo_does(name):
    model = small_model()

    assert decayed(model, name) == {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_are_left_out(name):
    model = small_model()
    model[0].requires_grad_(False)  # pyright: ignore[reportIndexIssue]

    optimizer = build_optimizer(model, settings(name))

    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("skipped", [(0,), (1,), (0, 1, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_leaves_no_trace(name, skipped, momentum):
    # How the training loop drops a step that is not finite: fused optimizers read found_inf.
    model, other = small_model(), small_model()
    optimizers = [build_optimizer(m, settings(name, momentum=momentum)) for m in (model, other)]
    start_momentum(optimizers[0])

    for step in range(5):
        set_gradients(model, seed=step)
        if step in skipped:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan)
        optimizers[0].found_inf = torch.tensor(float(step in skipped))  # pyright: ignore[reportAttributeAccessIssue]
        optimizers[0].step()
        if step not in skipped:
            set_gradients(other, seed=step)
            optimizers[1].step()

    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def rates(total: int, per_epoch: int, **changes: Any) -> list[float]:
    chosen = settings(lr=2.0, **changes)
    return [
        learning_rate(step, total_steps=total, steps_per_epoch=float(per_epoch), settings=chosen)
        for step in range(total)
    ]


def test_rate_climbs_in_equal_steps_to_the_peak_and_falls_as_a_cosine():
    found = rates(20, 4, warmup_epochs=1.0)

    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4:] == pytest.approx([1 + math.cos(math.pi * k / 16) for k in range(16)])
    assert found[12] == pytest.approx(1.0)  # halfway down
    assert 0 < found[-1] < 0.02


def test_constant_rate_stays_at_the_peak_after_the_warmup():
    assert rates(6, 2, warmup_epochs=1.0, schedule="constant") == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_no_warmup_starts_at_the_peak():
    assert rates(5, 5, warmup_epochs=0.0)[0] == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_every_rate_of_a_run_shorter_than_its_warmup_is_usable(total, schedule):
    found = rates(total, 10, warmup_epochs=3.0, schedule=schedule)

    assert all(0 < rate <= 2 for rate in found)
    assert found[-1] == 2.0


def test_fractions_of_an_epoch_warm_up_too():
    assert rates(20, 8, warmup_epochs=0.25)[:3] == pytest.approx([1.0, 2.0, 2.0])


def test_rate_is_set_in_every_group():
    optimizer = build_optimizer(small_model(), settings())

    set_learning_rate(optimizer, 0.125)

    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_average_follows_weights_and_statistics_and_copies_counters():
    model = small_model()
    average = averaged_state(model)
    expected = {name: value.clone() for name, value in average.items()}
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5).add_(step)
        model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).double())
        for name, value in model.state_dict().items():
            moves = value.is_floating_point()
            expected[name] = 0.9 * expected[name] + 0.1 * value if moves else value.clone()

        update_average(average, model, decay=0.9)

    assert average["1.num_batches_tracked"] == 3
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value, rtol=1e-12, atol=1e-12)


def test_average_is_a_copy_in_both_directions():
    model = small_model()
    kept = copy.deepcopy(model.state_dict())
    average = averaged_state(model)

    for value in average.values():
        value.zero_()

    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), name
        assert not average[name].requires_grad


def all_gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_gradients_are_clipped_to_the_limit_and_never_raised(factor):
    model = small_model()
    set_gradients(model, seed=0)
    before = all_gradients(model)
    limit = factor * before.norm().item()

    norm = gradient_norm(model.parameters(), clip=limit)

    torch.testing.assert_close(norm, before.norm())
    expected = before * min(1.0, factor)
    torch.testing.assert_close(all_gradients(model), expected, rtol=1e-6, atol=0.0)


def test_gradients_are_left_alone_without_a_limit():
    model = small_model()
    set_gradients(model, seed=0)
    before = all_gradients(model)

    norm = gradient_norm(model.parameters(), clip=0.0)

    torch.testing.assert_close(norm, before.norm())
    assert torch.equal(all_gradients(model), before)


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_norm_of_broken_gradients_is_not_finite(clip, value):
    model = small_model()
    set_gradients(model, seed=0)
    model[4].bias.grad[0] = value  # pyright: ignore

    assert not gradient_norm(model.parameters(), clip=clip).isfinite()
