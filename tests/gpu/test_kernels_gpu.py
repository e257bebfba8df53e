"""Every Triton kernel compiled and run on a GPU, in all dtypes and production shapes.

The interpreter, which runs the same kernels elsewhere in the tests, proves logic alone. Run these
with ``make test-gpu``.
"""

import pytest
import torch
from torch import Tensor

from mimic_fast import ops
from mimic_fast.kernels import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device: run make test-gpu on one"
    ),
]

DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [(4, 197, c) for c in (192, 384, 768, 1024, 1280, 1408, 1536)] + [(3, 257, 1024)]
MAPS = [
    *((4, 64, 112, 112), (4, 256, 56, 56), (4, 512, 28, 28), (4, 1024, 14, 14), (4, 2048, 7, 7)),
    *((4, 64, 32, 32), (4, 128, 16, 16), (4, 256, 8, 8), (4, 512, 4, 4), (4, 512, 1, 1)),
    *((3, 72, 28, 28), (3, 40, 7, 7)),
]
# Rounding of the gradient to its type, of values that are exact to float32 before; relative norm.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def triton_path():
    with ops.force("triton"):
        yield


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def pair(shape: tuple[int, ...], dtype: torch.dtype, *, last: bool = False, seed: int = 0):
    """Student, which wants a gradient, and teacher; ``last``: channels last in memory."""
    student = randn(*shape, seed=seed, dtype=dtype)
    teacher = (student.float() + randn(*shape, seed=seed + 100)).to(dtype)
    if last:
        student = student.contiguous(memory_format=torch.channels_last)
        teacher = teacher.contiguous(memory_format=torch.channels_last)
    return student.requires_grad_(), teacher


def weights_of(student: Tensor, prefix: int = 0) -> Tensor:
    """Attention and clone loss with gradients of like size, about 1: float16 keeps its digits."""
    _, places, channels = reference.positions(student, prefix=prefix).shape
    return torch.tensor([[1000.0 * channels], [1.0 * places * channels]], device=DEVICE)


def oracle(student: Tensor, teacher: Tensor, cotangent: Tensor, **settings):
    """Losses and gradient in float64."""
    wide = student.detach().double().requires_grad_()
    weights = weights_of(student, settings.get("prefix", 0))[:, 0].double()
    losses = reference.layer_losses(wide, teacher.double(), None, weights, **settings)
    (gradient,) = torch.autograd.grad(losses, wide, cotangent.double())
    return losses.detach(), gradient


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.isfinite().all()
    # one position has a constant map: what is left of its loss is rounding, at most this
    error = (found.double() - expected).norm()
    assert error <= tolerance * expected.norm() + 1e-7


def check_losses(shape: tuple[int, ...], dtype: torch.dtype, *, last: bool = False, **settings):
    student, teacher = pair(shape, dtype, last=last)
    prefix = settings.get("prefix", 0)
    cotangent = randn(2, shape[0], seed=7).abs() + 0.5

    (losses,) = ops.layer_losses(
        [student], [ops.Target(teacher=teacher)], weights_of(student, prefix), **settings
    )
    (gradient,) = torch.autograd.grad(losses, student, cotangent)

    expected, wanted = oracle(student, teacher, cotangent, **settings)
    for row in range(2):
        assert_close(losses[row], expected[row], 1e-5)
    assert gradient.stride() == student.stride()
    assert_close(gradient, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clone", ["none", "mse", "cosine"])
@pytest.mark.parametrize("shape", TOKENS, ids=str)
def test_losses_of_tokens_equal_the_oracle(shape, clone, dtype):
    check_losses(shape, dtype, clone=clone)
    check_losses(shape, dtype, clone=clone, prefix=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clone", ["none", "mse", "cosine"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_losses_of_maps_equal_the_oracle(shape, last, clone, dtype):
    check_losses(shape, dtype, last=last, clone=clone)


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0, 4.0])
@pytest.mark.parametrize("shape", [(4, 197, 768), (4, 512, 7, 7)], ids=str)
def test_other_powers_equal_the_oracle(shape, power):
    check_losses(shape, torch.float32, clone="mse", power=power)


@pytest.mark.parametrize("clone", ["mse", "cosine"])
def test_clone_loss_alone_equals_the_oracle(clone):
    check_losses((4, 197, 768), torch.float32, clone=clone, attention=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [TOKENS[2], MAPS[4]], ids=str)
def test_power_maps_of_several_layers_equal_the_oracle(shape, dtype):
    layers = [randn(*shape, seed=seed, dtype=dtype) for seed in range(5)]

    found = ops.power_maps(layers)

    for power, layer in zip(found, layers, strict=True):
        expected = reference.power_map(layer.double())
        torch.testing.assert_close(power.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("clone", ["mse", "cosine"])
@pytest.mark.parametrize("shape", [(4, 197, 768), (4, 512, 7, 7)], ids=str)
def test_large_half_precision_inputs_stay_finite(shape, clone):
    student, teacher = (300 * randn(*shape, seed=seed) for seed in range(2))
    student = student.to(torch.float16).requires_grad_()
    target = ops.Target(teacher=teacher.to(torch.float16))

    (losses,) = ops.layer_losses([student], [target], weights_of(student), clone=clone)
    (gradient,) = torch.autograd.grad(losses.sum(), student)

    assert losses.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("clone", ["none", "mse", "cosine"])
def test_zero_maps_and_equal_networks_have_finite_gradients(clone):
    student, _ = pair((4, 197, 384), torch.float32)
    for activation in (student, torch.zeros_like(student, requires_grad=True)):
        target = ops.Target(teacher=activation.detach().clone())
        (losses,) = ops.layer_losses([activation], [target], weights_of(student), clone=clone)
        (gradient,) = torch.autograd.grad(losses.sum(), activation)

        assert gradient.isfinite().all()
        assert losses[0].abs().max() <= 1e-10


def codes(
    directions: int, images: int, bins: int, *, seed: int = 0, missing: bool = False
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(bins, (directions, images), generator=generator).to(torch.uint8)
    drawn[0] = 0  # a constant direction
    if missing:
        drawn[:, ::7] = ops.MISSING
    return drawn.to(DEVICE)


@pytest.mark.parametrize("missing", [False, True], ids=["all", "missing"])
@pytest.mark.parametrize("images", [2048, 1999, 77])
@pytest.mark.parametrize("bins", [2, 4, 8, 16, 32, 64])
def test_counts_are_those_of_bincount(bins, images, missing):
    x = codes(37, images, bins, missing=missing)
    y = codes(37, images, bins, seed=1)
    rolls = (0, 5, images - 1)

    matched = ops.joint_histogram(x, y, bins=bins, rolls=rolls)
    crossed = ops.cross_histogram(x, y[:21], bins=bins, rolls=rolls)

    assert torch.equal(matched, reference.joint_histogram(x, y, bins=bins, rolls=rolls))
    assert torch.equal(crossed, reference.cross_histogram(x, y[:21], bins=bins, rolls=rolls))


def test_counts_by_group_are_those_of_bincount():
    x, y = codes(9, 2000, 12), codes(9, 2000, 12, seed=1)
    groups = torch.arange(2000, device=DEVICE) % 5
    settings = {"bins": 12, "num_groups": 5, "images": (100, 1900)}

    found = ops.joint_histogram(x, y, groups, **settings)

    assert torch.equal(found, reference.joint_histogram(x, y, groups, **settings))


@pytest.mark.parametrize("bins", [4, 8, 16, 32, 64])
def test_information_is_that_of_the_counts(bins):
    x = codes(256, 2048, bins)
    y = (x // 2 + codes(256, 2048, bins, seed=1) // 2).to(torch.uint8)
    rolls = (0, 511)

    matched = ops.matched_information(x, y, bins=bins, rolls=rolls)
    crossed = ops.cross_information(x, y[:64], bins=bins, rolls=rolls)

    expected = reference.matched_information(x, y, bins=bins, rolls=rolls)
    torch.testing.assert_close(matched.double(), expected, rtol=1e-5, atol=1e-5)
    expected = reference.cross_information(x, y[:64], bins=bins, rolls=rolls)
    torch.testing.assert_close(crossed.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bins", [2, 16, 200])
def test_edge_codes_are_those_of_the_reference(bins, dtype):
    values = randn(33, 1999, dtype=dtype)
    values[:, ::11] = float("nan")
    values[:, 1] = float("inf")
    edges = torch.linspace(-2, 2, bins + 1, device=DEVICE).to(dtype).expand(33, -1).contiguous()
    values[:, 2] = edges[:, -1]  # falls into the last bin

    assert torch.equal(ops.edge_codes(values, edges), reference.edge_codes(values, edges))
