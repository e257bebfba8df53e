import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimic_fast.kernels import cpu_build, cpu_loss, reference

# Narrower vectors than this processor may have; -O1 because building takes longer than testing.
BUILDS = {"avx2": ("-mno-avx512f", "-O1"), "sse2": ("-mno-avx", "-O1")}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Relative, of losses and of the gradient: the project's bar in float32. A bfloat16 gradient is
# rounded once, its losses are sums in float32 like the others.
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8}


@dataclass(frozen=True, kw_only=True)
class Terms:
    power: float = 2.0
    clone: Literal["none", "cosine", "mse"] = "none"
    attention: bool = True

    def __str__(self) -> str:
        return f"{self.clone}-p{self.power:g}" if self.attention else f"{self.clone}-alone"


TERMS = [
    *(Terms(clone=clone) for clone in ("none", "cosine", "mse")),
    Terms(power=1.0, clone="mse"),
    Terms(power=1.5, clone="cosine"),
    Terms(power=3.0),
    Terms(clone="cosine", attention=False),
    Terms(clone="mse", attention=False),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Activations by name: how random values lie in memory, and how many tokens do not count.
LAYOUTS: dict[str, tuple[Callable[[int, torch.dtype], Tensor], int]] = {
    "features-3x37": (lambda seed, dtype: randn(3, 37, seed=seed).to(dtype), 0),
    "every-second-feature": (lambda seed, dtype: randn(3, 40, seed=seed).to(dtype)[:, ::2], 0),
    "tokens-2x197x192": (lambda seed, dtype: randn(2, 197, 192, seed=seed).to(dtype), 1),
    "tokens-3x8x37": (lambda seed, dtype: randn(3, 8, 37, seed=seed).to(dtype), 5),
    "tokens-1x1x2048": (lambda seed, dtype: randn(1, 1, 2048, seed=seed).to(dtype), 0),
    "tokens-of-one-channel": (lambda seed, dtype: randn(2, 6, 1, seed=seed).to(dtype), 0),
    "batch-second": (lambda seed, dtype: randn(9, 3, 24, seed=seed).to(dtype).transpose(0, 1), 1),
    "part-of-the-channels": (
        lambda seed, dtype: randn(2, 9, 50, seed=seed).to(dtype)[..., 3:43],
        1,
    ),
    "channels-last-7x7": (
        lambda seed, dtype: randn(2, 24, 7, 7, seed=seed).to(
            dtype, memory_format=torch.channels_last
        ),
        0,
    ),
    "map-1x1": (lambda seed, dtype: randn(3, 70, 1, 1, seed=seed).to(dtype), 0),
    "map-2x2": (lambda seed, dtype: randn(2, 300, 2, 2, seed=seed).to(dtype), 0),
    "map-4x4": (lambda seed, dtype: randn(2, 512, 4, 4, seed=seed).to(dtype), 0),
    "map-5x3": (lambda seed, dtype: randn(2, 70, 5, 3, seed=seed).to(dtype), 0),
    "map-7x7": (lambda seed, dtype: randn(2, 2048, 7, 7, seed=seed).to(dtype), 0),
    "map-8x8": (lambda seed, dtype: randn(2, 37, 8, 8, seed=seed).to(dtype), 0),
    "map-14x14": (lambda seed, dtype: randn(2, 300, 14, 14, seed=seed).to(dtype), 0),
    "map-33x33": (lambda seed, dtype: randn(1, 6, 33, 33, seed=seed).to(dtype), 0),
    "some-rows": (lambda seed, dtype: randn(2, 40, 9, 5, seed=seed).to(dtype)[:, :, 2:6], 0),
}
SMALL = ["features-3x37", "tokens-3x8x37", "map-5x3", "map-4x4", "some-rows"]


def assert_close(found: Tensor, expected: Tensor, relative: float) -> None:
    """Relative to the largest entry; what is tiny beside a map's length of 1 may be rounding."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    floor = 1e-20 if found.dtype == torch.float64 else 1e-12
    assert found.shape == expected.shape
    torch.testing.assert_close(
        found.double(), expected, rtol=relative, atol=max(relative * scale, floor)
    )


def oracle(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    grad_losses: Tensor,
    terms: Terms,
    *,
    prefix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Losses and the student's gradient in float64."""
    own = student.detach().double().requires_grad_()
    losses = reference.layer_losses(
        own,
        teacher.double(),
        None,
        weights.double(),
        power=terms.power,
        clone=terms.clone,
        attention=terms.attention,
        prefix=prefix,
    )
    (gradient,) = torch.autograd.grad((losses * grad_losses.double()).sum(), own)
    return losses.detach(), gradient


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def arguments(terms: Terms, prefix: int, library: ctypes.CDLL) -> dict:
    return {**vars(terms), "prefix": prefix, "library": library}


def two_passes(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    grad_losses: Tensor,
    trunk: Tensor | None,
    out: Tensor,
    terms: Terms,
    *,
    prefix: int = 0,
    library: ctypes.CDLL,
) -> Tensor:
    """Losses; the gradient goes to ``out``."""
    losses = torch.empty(1, 2, grad_losses.shape[1], dtype=weights.dtype)
    options = arguments(terms, prefix, library)
    (coefficients,) = cpu_loss.forward(
        [student], [teacher], None, weights[:, None], losses, **options
    )
    cpu_loss.backward(student, teacher, coefficients, weights, grad_losses, trunk, out, **options)
    return losses[0]


def built(folder: Path, *flags: str) -> ctypes.CDLL:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_build, "FLAGS", (*cpu_build.FLAGS, *flags))
        try:
            return cpu_build.load_library("cpu_loss", folder)
        except cpu_build.NoCompilerError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return built(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module", params=BUILDS)
def narrow_library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    if " avx2 " not in Path("/proc/cpuinfo").read_text(encoding="ascii"):
        pytest.skip("needs a processor with AVX2")
    return built(tmp_path_factory.mktemp("built"), *BUILDS[request.param])


def check_layout(name: str, terms: Terms, dtype: torch.dtype, library: ctypes.CDLL) -> None:
    make, prefix = LAYOUTS[name]
    student, teacher, trunk, out = (make(seed, dtype) for seed in range(4))
    wide = sum_dtype(dtype)
    weights, grad_losses = torch.tensor([0.7, 1.3], dtype=wide), randn(2, student.shape[0]).to(wide)
    losses, gradient = oracle(student, teacher, weights, grad_losses, terms, prefix=prefix)
    before = out.clone()

    found = two_passes(
        student, teacher, weights, grad_losses, trunk, out, terms, prefix=prefix, library=library
    )

    expected = gradient + trunk.double()
    if prefix:
        expected[:, :prefix] = before.double()[:, :prefix]
    assert found.dtype == wide
    assert_close(found, losses, LOSS_TOLERANCE[dtype])
    assert_close(out, expected, GRADIENT_TOLERANCE[dtype])

    one_pass, one_pass_losses = make(3, dtype), torch.empty_like(found)
    options = arguments(terms, prefix, library)
    cpu_loss.forward_with_gradient(
        student, teacher, None, weights, one_pass_losses, one_pass, **options
    )

    gradient = oracle(student, teacher, weights, torch.ones_like(found), terms, prefix=prefix)[1]
    if prefix:
        gradient[:, :prefix] = before.double()[:, :prefix]
    assert torch.equal(one_pass_losses, found)
    assert_close(one_pass, gradient, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.usefixtures("poisoned_memory")
def test_losses_and_gradient_equal_the_oracle(name, terms, dtype, library):
    check_layout(name, terms, dtype, library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("poisoned_memory")
def test_narrower_vectors_equal_the_oracle(name, dtype, narrow_library):
    for terms in TERMS:
        check_layout(name, terms, dtype, narrow_library)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 150)),
        st.tuples(*[st.integers(1, 3), st.integers(1, 150), st.integers(1, 9), st.integers(1, 9)]),
    ),
    terms=st.sampled_from(TERMS),
    last=st.booleans(),
)
def test_any_shape_equals_the_oracle(shape, terms, last, library):
    student, teacher = randn(*shape).double(), randn(*shape, seed=1).double()
    if last and len(shape) == 4:
        student, teacher = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
    weights, grad_losses = torch.tensor([2.0, 0.5]).double(), randn(2, shape[0]).double()
    out = torch.full_like(student, math.nan)

    found = two_passes(student, teacher, weights, grad_losses, None, out, terms, library=library)

    losses, gradient = oracle(student, teacher, weights, grad_losses, terms)
    assert_close(found, losses, LOSS_TOLERANCE[torch.float64])
    # Where a map has one position the attention loss is flat but for its epsilon: 1e-6 of 1.
    torch.testing.assert_close(out, gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.usefixtures("poisoned_memory")
def test_power_maps_equal_the_oracle(name, power, dtype, library):
    make, prefix = LAYOUTS[name]
    maps = [make(seed, dtype) for seed in range(2)]

    found = cpu_loss.power_maps(maps, prefix=prefix, power=power, images=1, library=library)

    expected = [reference.power_map(x[:1].double(), power=power, prefix=prefix) for x in maps]
    assert found.dtype == sum_dtype(dtype)
    assert_close(found, torch.stack(expected), 1e-6 if dtype != torch.float64 else 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [1.01, 1.5, 2.5, 3.0, 7.0])
def test_powers_are_right_from_the_smallest_to_the_largest_number(power, dtype, library):
    limits = torch.finfo(dtype)
    exponents = torch.linspace(math.log2(limits.tiny) - 20, math.log2(limits.max) - 1e-3, 4001)
    values = torch.cat([exponents.double().exp2().to(dtype), torch.tensor([0, math.inf])]).to(dtype)

    found = cpu_loss.power_maps([values[None, :, None]], prefix=0, power=power, library=library)

    expected = values.double().pow(power).to(dtype)
    # The rounding of power * log2(x) counts as often as that number is large.
    tolerance = 4 * limits.eps * power * exponents.abs().max().item()
    torch.testing.assert_close(found[0, 0], expected, rtol=tolerance, atol=limits.tiny)


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_given_power_maps_replace_the_teacher_of_the_attention_loss(name, terms, library):
    make, prefix = LAYOUTS[name]
    student, teacher, out, expected = (make(seed, torch.float32) for seed in (0, 1, 2, 2))
    options = arguments(terms, prefix, library)
    powers = cpu_loss.power_maps([teacher], prefix=prefix, power=terms.power, library=library)[0]
    weights, losses = torch.tensor([0.7, 1.3]), torch.empty(2, 2, student.shape[0])
    kept = teacher if terms.clone != "none" else None

    cpu_loss.forward_with_gradient(student, teacher, None, weights, losses[0], expected, **options)
    cpu_loss.forward_with_gradient(student, kept, powers, weights, losses[1], out, **options)

    assert torch.equal(losses[0], losses[1])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_only_what_counts_is_read_and_written(name, dtype, library):
    make, prefix = LAYOUTS[name]
    student, teacher, trunk, out = (make(seed, dtype) for seed in range(4))
    images = student.shape[0] - 1
    expected = out.clone()
    terms, ones = Terms(clone="mse"), torch.ones(2, images, dtype=sum_dtype(dtype))
    gradient = oracle(student[:images], teacher[:images], ones[:, 0], ones, terms, prefix=prefix)[1]
    positions = slice(prefix, None) if prefix else slice(None)
    expected[:images, positions] = (gradient + trunk[:images].double())[:, positions].to(dtype)
    for x in (student, teacher, trunk):
        x[images:] = math.nan
        if prefix:
            x[:, :prefix] = math.nan

    found = two_passes(
        student, teacher, ones[:, 0], ones, trunk, out, terms, prefix=prefix, library=library
    )

    assert found.isfinite().all()
    assert_close(out, expected.double(), GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_the_gradient_may_overwrite_the_trunks(name, terms, library):
    make, prefix = LAYOUTS[name]
    student, teacher, trunk, out = (make(seed, torch.bfloat16) for seed in range(4))
    weights, grad_losses = torch.tensor([0.7, 1.3]), randn(2, student.shape[0])
    given = (student, teacher, weights, grad_losses)
    out.copy_(trunk)

    two_passes(*given, trunk, out, terms, prefix=prefix, library=library)
    two_passes(*given, trunk, trunk, terms, prefix=prefix, library=library)

    assert torch.equal(trunk, out)


def test_layers_have_their_own_weights_whatever_their_strides(library):
    students, teachers = ([randn(3, 5, 20, seed=seed + k) for k in (0, 9)] for seed in (1, 2))
    students[1] = students[1].transpose(0, 1).contiguous().transpose(0, 1)
    weights, losses = randn(2, 2).T, torch.empty(2, 2, 3)
    grad_losses = torch.tensor([[2.0], [3.0]]).expand(2, 3)
    terms = Terms(clone="cosine")
    options = arguments(terms, 1, library)

    coefficients = cpu_loss.forward(students, teachers, None, weights, losses, **options)

    for layer, student in enumerate(students):
        own, out = weights[:, layer], torch.zeros_like(student)
        given = (student, teachers[layer])
        cpu_loss.backward(*given, coefficients[layer], own, grad_losses, None, out, **options)
        expected, gradient = oracle(*given, own, grad_losses, terms, prefix=1)
        assert_close(losses[layer], expected, 1e-5)
        assert_close(out, gradient, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_student_like_its_teacher_has_no_loss(name, dtype, library):
    make, prefix = LAYOUTS[name]
    student, teacher, out = make(0, dtype), make(0, dtype), make(0, dtype).zero_()
    ones = torch.ones(2, student.shape[0], dtype=sum_dtype(dtype))
    given = (student, teacher, ones[:, 0], ones, None, out)

    losses = two_passes(*given, Terms(clone="mse"), prefix=prefix, library=library)

    assert losses[0].max() < 1e-30
    assert losses[1].max() == 0
    assert out.abs().max() < 1e-14

    losses = two_passes(*given, Terms(clone="cosine"), prefix=prefix, library=library)

    assert_close(losses[1], -torch.ones_like(losses[1]).double(), 1e-6)
    assert out.abs().max() < 1e-6


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
def test_dead_maps_have_the_oracles_finite_gradient(dead, name, terms, library):
    make, prefix = LAYOUTS[name]
    student, teacher, out = (make(seed, torch.float32) for seed in range(3))
    for role, activation in (("student", student), ("teacher", teacher)):
        if dead in (role, "both"):
            activation.zero_()
    ones = torch.ones(2, student.shape[0])

    given = (student, teacher, ones[:, 0], ones)
    found = two_passes(*given, None, out, terms, prefix=prefix, library=library)

    losses, gradient = oracle(*given, terms, prefix=prefix)
    gradient[:, :prefix] = out.double()[:, :prefix]
    assert gradient.isfinite().all()
    assert_close(found, losses, 1e-5)
    assert_close(out, gradient, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [TERMS[2], TERMS[3], TERMS[4]], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad, terms, dtype, library):
    student, teacher = randn(2, 4, 40).to(dtype), randn(2, 4, 40, seed=1).to(dtype)
    student[1, 2, 3] = bad
    ones, out = torch.ones(2, 2, dtype=sum_dtype(dtype)), torch.zeros_like(student)

    losses = two_passes(student, teacher, ones[:, 0], ones, None, out, terms, library=library)

    assert losses[:, 0].isfinite().all()
    assert not losses[0, 1].isfinite()
    assert out[0].isfinite().all()
    assert not out[1, 2, 3].isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 40, 208), (64, 33, 333), (64, 300, 7, 7), (72, 520, 4, 4)])
def test_large_gradients_that_bypass_the_cache_equal_small_ones(shape, dtype, library):
    student, teacher = randn(*shape).to(dtype), randn(*shape, seed=1).to(dtype)
    assert student.numel() * dtype.itemsize > 2 << 20
    large, small = torch.zeros_like(student), torch.zeros_like(student)
    losses = torch.empty(2, 2, shape[0], dtype=sum_dtype(dtype))
    weights = torch.tensor([0.7, 1.3], dtype=losses.dtype)
    options = arguments(Terms(clone="mse"), 0, library)

    cpu_loss.forward_with_gradient(student, teacher, None, weights, losses[0], large, **options)
    for n in range(0, shape[0], 8):
        part = slice(n, n + 8)
        given = (student[part], teacher[part], None, weights, losses[1][:, part], small[part])
        cpu_loss.forward_with_gradient(*given, **options)

    assert torch.equal(losses[0], losses[1])
    assert torch.equal(large, small)


def test_results_do_not_depend_on_the_number_of_threads(library):
    student, teacher = randn(7, 130, 7, 7), randn(7, 130, 7, 7, seed=1)
    weights, grad_losses, terms = torch.tensor([0.7, 1.3]), randn(2, 7), Terms(clone="cosine")
    results = []

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            out = torch.zeros_like(student)
            given = (student, teacher, weights, grad_losses, None, out, terms)
            results.append((two_passes(*given, library=library), out))
        finally:
            torch.set_num_threads(1)

    for losses, out in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(out, results[0][1])


def test_no_images_are_no_work(library):
    student, out = randn(3, 5, 8), torch.full((3, 5, 8), 7.0)
    nothing = torch.empty(2, 0)

    given = (student, student, torch.ones(2), nothing, None, out, Terms(clone="cosine"))
    losses = two_passes(*given, library=library)

    assert losses.shape == (2, 0)
    assert (out == 7).all()
