import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mimic_fast.kernels.reference import (
    MISSING,
    attention_loss,
    attention_map,
    clone_loss,
    cross_histogram,
    cross_information,
    edge_codes,
    joint_histogram,
    layer_losses,
    matched_information,
    nt_xent,
    power_map,
)

EPSILON = 1e-6
EXACT: dict[str, Any] = {
    "rtol": 1e-6,
    "atol": 1e-6,
}  # the project's bar for loss functions, in float64
HALVES = [torch.float16, torch.bfloat16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def unit_rows(rows: int, width: int, *, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(randn(rows, width, seed=seed), dim=1)


# Oracles: plain Python over numbers, one line per formula.


def map_by_hand(image: list, power: float) -> list[float]:
    """A / (||A||_2 + 1e-6) of one image ``[channel][row][column]``."""
    height, width = len(image[0]), len(image[0][0])
    powers = [
        sum(abs(channel[y][x]) ** power for channel in image)
        for y in range(height)
        for x in range(width)
    ]
    norm = math.sqrt(sum(value * value for value in powers))
    return [value / (norm + EPSILON) for value in powers]


def attention_by_hand(student: Tensor, teacher: Tensor, power: float) -> float:
    distances = [
        sum((a - b) ** 2 for a, b in zip(map_by_hand(s, power), map_by_hand(t, power), strict=True))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    return sum(distances) / len(distances)


def clone_by_hand(student: Tensor, teacher: Tensor) -> float:
    cosines = [
        sum(a * b for a, b in zip(s, t, strict=True)) / (math.hypot(*s) * math.hypot(*t))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    return -sum(cosines) / len(cosines)


def nt_xent_by_hand(
    anchors: Tensor, candidates: Tensor, positives: list[int], selves: list[int], temperature: float
) -> float:
    """Eq. 1 of SimCLR as a double loop."""
    total = 0.0
    for row, (positive, own) in enumerate(zip(positives, selves, strict=True)):
        similarity = [
            sum(a * c for a, c in zip(anchors[row].tolist(), other, strict=True)) / temperature
            for other in candidates.tolist()
        ]
        others = sum(math.exp(s) for index, s in enumerate(similarity) if index != own)
        total -= math.log(math.exp(similarity[positive]) / others)
    return total / len(positives)


SHAPES = [(1, 1, 1, 1), (2, 3, 4, 4), (3, 7, 5, 3), (2, 37, 1, 7)]


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_attention_map_equals_the_formula(shape, power):
    feature_map = randn(*shape)

    found = attention_map(feature_map, power=power)

    expected = torch.tensor([map_by_hand(image, power) for image in feature_map.tolist()])
    torch.testing.assert_close(found, expected.double(), **EXACT)


def test_attention_map_does_not_change_with_the_scale_of_each_image():
    feature_map = randn(3, 8, 4, 4)
    scale = torch.tensor([1.0, 10.0, 1000.0], dtype=torch.float64)[:, None, None, None]

    # Exact but for the epsilon beside the norm: 1e-6 of a norm above 30.
    torch.testing.assert_close(
        attention_map(feature_map * scale), attention_map(feature_map), rtol=1e-7, atol=1e-7
    )


def test_attention_map_reads_any_memory_layout():
    feature_map = randn(2, 6, 4, 5)
    layouts = [
        feature_map.to(memory_format=torch.channels_last),
        torch.cat([feature_map, feature_map], dim=2)[:, :, :4],
        feature_map.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    ]

    for layout in layouts:
        torch.testing.assert_close(attention_map(layout), attention_map(feature_map))


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_attention_loss_equals_the_formula(shape, power):
    student, teacher = randn(*shape), randn(shape[0], shape[1] + 2, *shape[2:], seed=1)

    found = attention_loss(student, teacher, power=power)

    expected = attention_by_hand(student, teacher, power)
    torch.testing.assert_close(found, torch.tensor(expected).double(), **EXACT)


def test_attention_loss_lies_between_agreement_and_disjoint_maps():
    student, teacher = torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2)
    student[:, :, 0, 0] = 5.0
    teacher[:, :, 1, 1] = 7.0

    torch.testing.assert_close(attention_loss(student, teacher), torch.tensor(2.0))
    torch.testing.assert_close(attention_loss(student, 3 * student), torch.tensor(0.0))


def test_attention_loss_of_dead_maps_has_a_finite_gradient():
    student = torch.zeros(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)

    loss = attention_loss(student, randn(2, 4, 3, 3))
    loss.backward()

    torch.testing.assert_close(loss.detach(), torch.tensor(1.0).double())
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 37)], ids=lambda s: "x".join(map(str, s)))
def test_clone_loss_equals_the_formula(shape):
    student, teacher = randn(*shape), randn(*shape, seed=1)

    found = clone_loss(student, teacher)

    torch.testing.assert_close(
        found, torch.tensor(clone_by_hand(student, teacher)).double(), **EXACT
    )


def test_clone_loss_is_the_negative_cosine_whatever_the_lengths():
    features = randn(4, 6)

    torch.testing.assert_close(clone_loss(features, 9 * features).item(), -1.0)
    torch.testing.assert_close(clone_loss(features, -0.1 * features).item(), 1.0)


def test_clone_loss_of_dead_features_has_a_finite_gradient():
    student = torch.zeros(2, 5, requires_grad=True)

    loss = clone_loss(student, torch.ones(2, 5))
    loss.backward()

    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_equals_the_double_loop(temperature):
    projections = unit_rows(8, 5)
    selves = torch.arange(8)
    positives = (selves + 4) % 8

    found = nt_xent(projections, projections, positives, selves, temperature=temperature)

    expected = nt_xent_by_hand(
        projections, projections, positives.tolist(), selves.tolist(), temperature
    )
    torch.testing.assert_close(found, torch.tensor(expected).double(), **EXACT)


def test_nt_xent_of_one_process_among_many_equals_the_double_loop():
    candidates = unit_rows(12, 7)
    selves = torch.arange(4, 8)
    positives = torch.tensor([6, 7, 4, 5])

    found = nt_xent(candidates[4:8], candidates, positives, selves, temperature=0.5)

    expected = nt_xent_by_hand(
        candidates[4:8], candidates, positives.tolist(), selves.tolist(), 0.5
    )
    torch.testing.assert_close(found, torch.tensor(expected).double(), **EXACT)


def test_nt_xent_of_the_smallest_batch_is_zero():
    # Two views of one image: the other view is the only candidate left.
    projections = unit_rows(2, 3)

    loss = nt_xent(
        projections, projections, torch.tensor([1, 0]), torch.tensor([0, 1]), temperature=0.5
    )

    assert loss.item() == 0


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_attention_loss_passes_gradcheck(power):
    student = randn(2, 3, 2, 3).requires_grad_()
    teacher = randn(2, 4, 2, 3, seed=1)

    assert torch.autograd.gradcheck(lambda s: attention_loss(s, teacher, power=power), student)


def test_clone_loss_passes_gradcheck():
    teacher = randn(3, 4, seed=1)

    assert torch.autograd.gradcheck(lambda s: clone_loss(s, teacher), randn(3, 4).requires_grad_())


def test_nt_xent_passes_gradcheck_in_anchors_and_candidates():
    candidates = unit_rows(6, 4).requires_grad_()
    anchors = unit_rows(4, 4, seed=1).requires_grad_()
    selves, positives = torch.arange(1, 5), torch.tensor([3, 4, 1, 2])

    assert torch.autograd.gradcheck(
        lambda a, c: nt_xent(a, c, positives, selves, temperature=0.5), (anchors, candidates)
    )


def test_no_gradient_reaches_the_teacher():
    student_map, teacher_map = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    student, teacher = randn(2, 5), randn(2, 5, seed=1)
    leaves = [t.requires_grad_() for t in (student_map, teacher_map, student, teacher)]

    (attention_loss(student_map, teacher_map) + clone_loss(student, teacher)).backward()

    assert [leaf.grad is None for leaf in leaves] == [False, True, False, True]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_maps_of_deviation_300_are_computed_in_float32(dtype):
    # 1024 squares of 300 sum to 9e7, far beyond float16's 65504.
    student = (300 * randn(2, 1024, 3, 3)).to(dtype).requires_grad_()
    teacher = (300 * randn(2, 1024, 3, 3, seed=1)).to(dtype)

    found = attention_map(student)
    loss = attention_loss(student, teacher)
    loss.backward()

    assert found.dtype == loss.dtype == torch.float32
    exact = attention_map(student.detach().double())
    torch.testing.assert_close(found.detach().double(), exact, rtol=1e-5, atol=1e-7)
    exact = attention_loss(student.detach().double(), teacher.double())
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-4, atol=1e-7)
    assert student.grad is not None
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_features_of_deviation_300_are_computed_in_float32(dtype):
    student = (300 * randn(4, 2048)).to(dtype)
    teacher = (300 * randn(4, 2048, seed=1)).to(dtype)

    loss = clone_loss(student, teacher)

    assert loss.dtype == torch.float32
    exact = clone_loss(student.double(), teacher.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_projections_are_compared_in_float32(dtype):
    projections = unit_rows(8, 16).to(dtype)
    selves = torch.arange(8)
    positives = (selves + 4) % 8

    loss = nt_xent(projections, projections, positives, selves, temperature=0.1)

    assert loss.dtype == torch.float32
    wide = projections.double()
    exact = nt_xent(wide, wide, positives, selves, temperature=0.1)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


def test_autocast_does_not_lower_the_precision_of_any_loss():
    maps = randn(2, 16, 4, 4, dtype=torch.float32), randn(2, 16, 4, 4, seed=1, dtype=torch.float32)
    features = randn(4, 32, dtype=torch.float32), randn(4, 32, seed=1, dtype=torch.float32)
    projections = unit_rows(8, 16).float()
    selves = torch.arange(8)

    def losses() -> list[Tensor]:
        contrastive = nt_xent(projections, projections, (selves + 4) % 8, selves, temperature=0.1)
        return [attention_loss(*maps), clone_loss(*features), contrastive]

    plain = losses()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses()

    for name, found, expected in zip(("attention", "clone", "nt_xent"), mixed, plain, strict=True):
        assert found.dtype == torch.float32, name
        assert torch.equal(found, expected), name


def test_joint_histogram_counts_every_image_once():
    generator = torch.Generator().manual_seed(0)
    bins, pairs, images, num_groups = 5, 3, 200, 4
    x, y = torch.randint(bins, (2, pairs, images), generator=generator).to(torch.uint8)
    groups = torch.randint(num_groups - 1, (images,), generator=generator)  # the last stays empty
    expected = torch.zeros(num_groups, pairs, bins, bins, dtype=torch.int32)
    for pair in range(pairs):
        for group, i, j in zip(groups.tolist(), x[pair].tolist(), y[pair].tolist(), strict=True):
            expected[group, pair, i, j] += 1

    counts = joint_histogram(x, y, groups, bins=bins, num_groups=num_groups)[0]

    assert counts.dtype == torch.int32
    assert torch.equal(counts, expected)


def test_joint_histogram_leaves_out_what_has_no_bin():
    x = torch.tensor([[0, 1, 255, 1]], dtype=torch.uint8)
    y = torch.tensor([[1, 255, 0, 1]], dtype=torch.uint8)

    counts = joint_histogram(x, y, bins=2)[0, 0, 0]

    assert counts.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("roll", [0, 1, 5, -2])
def test_joint_histogram_pairs_an_image_with_the_rolled_one(roll):
    x, y = torch.randint(0, 3, (2, 1, 7), generator=torch.Generator().manual_seed(1)).byte()
    expected = torch.zeros(3, 3, dtype=torch.int32)
    for image in range(2, 6):
        expected[int(x[0, image]), int(y[0, (image - roll) % 7])] += 1

    counts = joint_histogram(x, y, bins=3, rolls=(roll,), images=(2, 6))

    assert torch.equal(counts[0, 0, 0], expected)


def test_cross_histogram_has_every_pair_of_directions():
    x, y = torch.randint(0, 4, (2, 3, 20), generator=torch.Generator().manual_seed(2)).byte()

    counts = cross_histogram(x, y[:2], bins=4, rolls=(0, 3))

    for i in range(3):
        for j in range(2):
            pair = joint_histogram(x[i : i + 1], y[j : j + 1], bins=4, rolls=(0, 3))
            assert torch.equal(counts[:, i, j], pair[:, 0, 0])


def test_edge_codes_are_those_of_numpy():
    values = torch.tensor([[0.0, 0.5, 1.0, 2.0, 3.0, -0.1, 3.1, float("nan")]])
    edges = torch.tensor([[0.0, 1.0, 2.0, 3.0]])

    codes = edge_codes(values, edges)[0]

    assert codes.tolist() == [0, 0, 1, 2, 2, MISSING, MISSING, MISSING]
    counts = torch.bincount(codes[codes < 3], minlength=3)
    inside = np.histogram(values[0][:-1].numpy(), edges[0].numpy())[0]
    assert counts.tolist() == inside.tolist()


def test_information_of_counts_is_that_of_the_definition():
    x, y = torch.randint(0, 3, (2, 1, 50), generator=torch.Generator().manual_seed(3)).byte()
    joint = np.histogram2d(x[0].numpy(), y[0].numpy(), bins=3, range=[[0, 3], [0, 3]])[0] / 50
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    expected = (joint[joint > 0] * np.log((joint / outer)[joint > 0])).sum()

    assert float(matched_information(x, y, bins=3)) == pytest.approx(expected, abs=1e-12)
    assert float(cross_information(x, y, bins=3)) == pytest.approx(expected, abs=1e-12)
    assert float(matched_information(x, y + 3, bins=3)) == 0  # no image counts


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("clone", ["none", "cosine", "mse"])
@pytest.mark.parametrize("shape", [(3, 7, 5), (3, 5, 2, 3)], ids=["tokens", "map"])
def test_layer_losses_are_the_losses_of_each_image(shape, clone, power):
    student, teacher = randn(*shape), randn(*shape)
    prefix = 2 if len(shape) == 3 else 0
    weights = torch.tensor([0.7, 1.3], dtype=torch.float64)

    found = layer_losses(student, teacher, None, weights, power=power, clone=clone, prefix=prefix)

    for image in range(3):
        own, other = student[image : image + 1], teacher[image : image + 1]
        attention = attention_loss(own, other, power=power, prefix=prefix)
        torch.testing.assert_close(found[0, image], 0.7 * attention)
        expected = torch.zeros((), dtype=torch.float64)
        if clone != "none":
            expected = 1.3 * clone_loss(own, other, kind=clone, prefix=prefix)
        torch.testing.assert_close(found[1, image], expected)


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("clone", ["none", "cosine", "mse"])
def test_layer_losses_pass_gradcheck(clone, power):
    student, teacher = randn(2, 4, 3).requires_grad_(), randn(2, 4, 3)
    weights = torch.tensor([0.7, 1.3], dtype=torch.float64)

    def losses(own):
        return layer_losses(own, teacher, None, weights, power=power, clone=clone, prefix=1)

    assert torch.autograd.gradcheck(losses, student)


def test_layer_losses_need_no_teacher_where_its_power_map_is_given():
    student, teacher = randn(2, 4, 3), randn(2, 4, 3)
    weights = torch.tensor([0.7, 1.3], dtype=torch.float64)

    given = layer_losses(student, None, power_map(teacher), weights)

    torch.testing.assert_close(given, layer_losses(student, teacher, None, weights))


def test_clone_loss_of_tokens_is_the_mean_over_positions():
    student, teacher = randn(2, 5, 3), randn(2, 5, 3)
    pairs = [(student[:, n], teacher[:, n]) for n in range(1, 5)]

    for kind in ("cosine", "mse"):
        each = torch.stack([clone_loss(own, other, kind=kind) for own, other in pairs])
        found = clone_loss(student, teacher, kind=kind, prefix=1)
        torch.testing.assert_close(found, each.mean())
