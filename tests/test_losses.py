import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mimic_fast.config import LossSettings
from mimic_fast.distributed import SINGLE
from mimic_fast.losses import contrastive_loss, total_loss, weighted_attention_loss
from mimic_fast.mutual_information.weights import layer_shares, layer_weights
from mimic_fast.recipe import load_settings

EXACT: dict[str, Any] = {
    "rtol": 1e-6,
    "atol": 1e-6,
}  # the project's bar for loss functions, in float64
GRIDS = [(8, 6), (4, 3), (1, 5)]
CHANNELS = [3, 7, 16]


def maps(*, seed: int, batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, *grid, generator=generator, dtype=torch.float64)
        for channels, grid in zip(CHANNELS, GRIDS, strict=True)
    ]


def demo_attention(student: Tensor, teacher: Tensor, *, power: float = 2) -> float:
    """The demo's term of one layer: mean squared difference of maps over batch and positions.

    Restated from the formula in github.com/wssun/MIMIC (36ef47c), in NumPy.
    """

    def attention(feature_map: Tensor) -> np.ndarray:
        powers = (np.abs(feature_map.detach().double().numpy()) ** power).sum(axis=1)
        norm = np.sqrt((powers**2).sum(axis=(1, 2), keepdims=True))
        return powers / (norm + 1e-6)

    return float(((attention(student) - attention(teacher)) ** 2).mean())


def simclr(first: Tensor, second: Tensor, temperature: float) -> float:
    """NT-Xent of two views by a double loop over all 2n projections."""
    rows = [row / math.hypot(*row) for row in np.concatenate([first.numpy(), second.numpy()])]
    n = len(rows) // 2
    total = 0.0
    for i, anchor in enumerate(rows):
        others = sum(math.exp(anchor @ row / temperature) for j, row in enumerate(rows) if j != i)
        total -= anchor @ rows[(i + n) % (2 * n)] / temperature - math.log(others)
    return total / (2 * n)


@pytest.mark.parametrize("form", ["sum", "mean"])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_strength_one_is_the_demo_at_any_map_size(form, power):
    student, teacher = maps(seed=0), maps(seed=1)
    weights = [1000.0, 4000.0, 11000.0]
    settings = LossSettings(attention_weight=1.0, attention_form=form, attention_power=power)

    found = weighted_attention_loss(student, teacher, weights, settings=settings)

    expected = sum(
        weight * demo_attention(s, t, power=power)
        for weight, s, t in zip(weights, student, teacher, strict=True)
    )
    torch.testing.assert_close(found.item(), expected, **EXACT)


def test_sum_form_is_the_weighted_distance_over_positions():
    student, teacher = maps(seed=0)[:1], maps(seed=1)[:1]
    settings = LossSettings(attention_weight=0.3, attention_form="sum")

    found = weighted_attention_loss(student, teacher, [2000.0], settings=settings)

    distance = demo_attention(student[0], teacher[0]) * 48  # the sum over 8 x 6 positions
    torch.testing.assert_close(found.item(), 2000 * 0.3 / 48 * distance, **EXACT)


def test_each_layer_counts_in_proportion_to_its_weight_and_the_strength():
    student, teacher = maps(seed=0), maps(seed=1)

    def loss(weights: list[float], strength: float) -> float:
        settings = LossSettings(attention_weight=strength)
        return weighted_attention_loss(student, teacher, weights, settings=settings).item()

    alone = [loss([float(layer == k) for layer in range(3)], 1.0) for k in range(3)]

    assert min(alone) > 0
    assert len({round(value, 9) for value in alone}) == 3
    expected = 10 * alone[0] + 200 * alone[1] + 3000 * alone[2]
    torch.testing.assert_close(loss([10.0, 200.0, 3000.0], 1.0), expected, **EXACT)
    torch.testing.assert_close(loss([10.0, 200.0, 3000.0], 0.25), expected / 4, **EXACT)


def test_layer_of_weight_zero_is_left_out_whatever_it_holds():
    student, teacher = maps(seed=0), maps(seed=1)
    student[1] = torch.full_like(student[1], torch.nan).requires_grad_()
    settings = LossSettings()

    loss = weighted_attention_loss(student, teacher, [1.0, 0.0, 1.0], settings=settings)

    assert loss.isfinite()
    assert not loss.requires_grad


def test_gradient_reaches_every_student_map_and_no_teacher_map():
    student = [m.requires_grad_() for m in maps(seed=0)]
    teacher = [m.requires_grad_() for m in maps(seed=1)]

    weighted_attention_loss(student, teacher, [1.0, 1.0, 1.0], settings=LossSettings()).backward()

    assert all(m.grad is not None and m.grad.abs().max() > 0 for m in student)
    assert all(m.grad is None for m in teacher)


def test_half_precision_maps_give_a_float32_loss_equal_to_the_oracle():
    student = [(300 * m).half() for m in maps(seed=0)]
    teacher = [(300 * m).half() for m in maps(seed=1)]

    loss = weighted_attention_loss(
        student, teacher, [1.0, 1.0, 1.0], settings=LossSettings(attention_weight=1.0)
    )

    assert loss.dtype == torch.float32
    expected = sum(demo_attention(s, t) for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-7)


def test_student_grid_is_averaged_down_to_the_teachers():
    student = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    teacher = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    # Triangle filter of half-width 2 around the centres 1, 3, 5, 7 of a row of 8 pixels.
    triangle = np.maximum(0, 1 - np.abs(np.arange(8) + 0.5 - np.array([[1], [3], [5], [7]])) / 2)
    triangle /= triangle.sum(axis=1, keepdims=True)
    resized = torch.from_numpy(triangle @ student.numpy() @ triangle.T)

    found = weighted_attention_loss(
        [student], [teacher], [7.0], settings=LossSettings(attention_weight=1.0)
    )

    torch.testing.assert_close(found.item(), 7 * demo_attention(resized, teacher), **EXACT)


def test_student_grid_is_interpolated_up_to_the_teachers():
    rows = torch.tensor([[0.0, 1.0], [2.0, 4.0]], dtype=torch.float64)
    student = rows[None, None].requires_grad_()
    teacher = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    line = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])  # bilinear, edges held

    found = weighted_attention_loss(
        [student], [teacher], [1.0], settings=LossSettings(attention_weight=1.0)
    )
    found.backward()

    expected = demo_attention(torch.from_numpy(line @ rows.numpy() @ line.T)[None, None], teacher)
    torch.testing.assert_close(found.item(), expected, **EXACT)
    assert student.grad is not None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize(("left", "right", "weights"), [(2, 3, 3), (3, 2, 3), (3, 3, 2)])
def test_lists_of_different_length_are_refused(left, right, weights):
    with pytest.raises(ValueError, match=f"{left} student maps, {right} teacher maps"):
        weighted_attention_loss(
            maps(seed=0)[:left], maps(seed=1)[:right], [1.0] * weights, settings=LossSettings()
        )


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_contrastive_loss_equals_the_double_loop(batch, temperature):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, batch, 6, generator=generator, dtype=torch.float64)

    found = contrastive_loss(first, second, temperature=temperature, processes=SINGLE)

    torch.testing.assert_close(found.item(), simclr(first, second, temperature), **EXACT)


def test_contrastive_loss_knows_neither_length_nor_order_of_projections():
    first, second = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    order = torch.tensor([3, 0, 4, 1, 2])

    def loss(a: Tensor, b: Tensor) -> float:
        return contrastive_loss(a, b, temperature=0.5, processes=SINGLE).item()

    expected = loss(first, second)
    torch.testing.assert_close(loss(9 * first, second / 7), expected)
    torch.testing.assert_close(loss(first[order], second[order]), expected)
    torch.testing.assert_close(loss(second, first), expected)
    assert abs(loss(first, second[order]) - expected) > 1e-3  # but it knows who belongs to whom


def test_contrastive_loss_passes_gradcheck():
    first, second = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()

    assert torch.autograd.gradcheck(
        lambda a, b: contrastive_loss(a, b, temperature=0.5, processes=SINGLE),
        (first.clone().requires_grad_(), second.clone().requires_grad_()),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_projections_are_normalized_in_float32(dtype):
    first, second = torch.randn(2, 8, 128, generator=torch.Generator().manual_seed(0)).to(dtype)

    found = contrastive_loss(first, second, temperature=0.1, processes=SINGLE)

    assert found.dtype == torch.float32
    expected = simclr(first.double(), second.double(), 0.1)
    torch.testing.assert_close(found.item(), expected, rtol=1e-6, atol=1e-6)


def test_total_weighs_clone_and_contrastive_and_adds_attention_as_it_is():
    settings = LossSettings(clone=2.0, attention_weight=5.0, contrastive=3.0)

    losses = total_loss(
        clone=torch.tensor(0.5),
        attention=torch.tensor(7.0),
        contrastive=torch.tensor(0.25),
        settings=settings,
    )

    assert losses.total.item() == 2 * 0.5 + 7 + 3 * 0.25
    assert (losses.clone.item(), losses.attention.item(), losses.contrastive.item()) == (
        0.5,
        7.0,
        0.25,
    )


def test_official_preset_equals_the_demos_recipe_recomputed():
    settings = load_settings(preset="official")
    nats = [0.5, 1.5, 0.0, 2.0]
    student, teacher = [*maps(seed=0), maps(seed=2)[0]], [*maps(seed=1), maps(seed=3)[0]]
    first, second = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(4)).double()

    weights = layer_weights(layer_shares(nats), base=settings.mi.base, gain=settings.mi.gain)
    attention = weighted_attention_loss(student, teacher, weights, settings=settings.loss)
    contrastive = contrastive_loss(
        first, second, temperature=settings.loss.temperature, processes=SINGLE
    )
    clone = torch.tensor(-0.3, dtype=torch.float64)
    total = total_loss(
        clone=clone, attention=attention, contrastive=contrastive, settings=settings.loss
    ).total

    by_hand = [1000 + 10000 * 0.125, 1000 + 10000 * 0.375, 1000.0, 1000 + 10000 * 0.5]
    assert weights == pytest.approx(by_hand, rel=1e-12)
    expected_attention = sum(
        weight * demo_attention(s, t)
        for weight, s, t in zip(by_hand, student, teacher, strict=True)
    )
    expected_contrastive = simclr(first, second, 0.5)
    torch.testing.assert_close(attention.item(), expected_attention, **EXACT)
    torch.testing.assert_close(contrastive.item(), expected_contrastive, **EXACT)
    expected = -0.3 + expected_attention + expected_contrastive
    torch.testing.assert_close(total.item(), expected, **EXACT)
    assert settings.loss.attention_form == "mean"
    assert settings.loss.harden.probability == 0
