import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimic_fast.kernels import cpu_build, cpu_loss, reference
from mimic_fast.kernels.engine import Engine, Terms, accumulator

# Narrower vectors than this processor may have; -O1 because building takes longer than testing.
BUILDS = {"avx2": ("-mno-avx512f", "-O1"), "sse2": ("-mno-avx", "-O1")}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Relative, of losses and of the gradient: the project's bar in float32. A bfloat16 gradient is
# rounded once, its losses are sums in float32 like the others.
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8}
TERMS = [
    *(Terms(clone=clone) for clone in ("none", "cosine", "mse")),
    Terms(power=1.0, clone="mse"),
    Terms(power=1.5, clone="cosine"),
    Terms(power=3.0),
    Terms(clone="cosine", attention=False),
    Terms(clone="mse", attention=False),
]


def unchanged(x: Tensor) -> Tensor:
    return x


# Activations by name: the shape of the random values, the view of them, and how many tokens do not
# count.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], int]] = {
    "features-3x37": ((3, 37), unchanged, 0),
    "every-second-feature": ((3, 40), lambda x: x[:, ::2], 0),
    "tokens-2x197x192": ((2, 197, 192), unchanged, 1),
    "tokens-3x8x37": ((3, 8, 37), unchanged, 5),
    "tokens-1x1x2048": ((1, 1, 2048), unchanged, 0),
    "tokens-of-one-channel": ((2, 6, 1), unchanged, 0),
    "batch-second": ((9, 3, 24), lambda x: x.transpose(0, 1), 1),
    "part-of-the-channels": ((2, 9, 50), lambda x: x[..., 3:43], 1),
    "channels-last-7x7": ((2, 7, 7, 24), lambda x: x.permute(0, 3, 1, 2), 0),
    "map-1x1": ((3, 70, 1, 1), unchanged, 0),
    "map-2x2": ((2, 300, 2, 2), unchanged, 0),
    "map-4x4": ((2, 512, 4, 4), unchanged, 0),
    "map-5x3": ((2, 70, 5, 3), unchanged, 0),
    "map-7x7": ((2, 2048, 7, 7), unchanged, 0),
    "map-8x8": ((2, 37, 8, 8), unchanged, 0),
    "map-14x14": ((1, 2048, 14, 14), unchanged, 0),
    "map-33x33": ((1, 6, 33, 33), unchanged, 0),
    "some-rows": ((2, 40, 9, 5), lambda x: x[:, :, 2:6], 0),
}
SMALL = ["features-3x37", "tokens-3x8x37", "map-5x3", "map-4x4", "some-rows"]


def label(value: object) -> str | None:
    if not isinstance(value, Terms):
        return None
    return f"{value.clone}-p{value.power:g}" if value.attention else f"{value.clone}-alone"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(name: str, dtype: torch.dtype, count: int = 4) -> tuple[list[Tensor], int]:
    """Different ones that lie in memory alike; how many tokens do not count."""
    shape, view, prefix = LAYOUTS[name]
    return [view(randn(*shape, seed=seed).to(dtype)) for seed in range(count)], prefix


def weights_for(student: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the two losses, and a cotangent of them."""
    dtype = accumulator(student)
    return torch.tensor([0.7, 1.3], dtype=dtype), randn(2, student.shape[0], seed=9).to(dtype)


def assert_close(found: Tensor, expected: Tensor, relative: float) -> None:
    """Relative to the largest entry; what is tiny beside a map's length of 1 may be rounding."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    floor = 1e-20 if found.dtype == torch.float64 else 1e-12
    torch.testing.assert_close(
        found.double(), expected, rtol=relative, atol=max(relative * scale, floor)
    )


def oracle(
    student: Tensor, teacher: Tensor, weights: Tensor, cotangent: Tensor, terms: Terms
) -> tuple[Tensor, Tensor]:
    """Losses and the student's gradient in float64."""
    own = student.detach().double().requires_grad_()
    losses = reference.layer_losses(
        own, teacher.double(), None, weights.double(), **terms.arguments()
    )
    (gradient,) = torch.autograd.grad((losses * cotangent.double()).sum(), own)
    return losses.detach(), gradient


def two_passes(
    engine: Engine,
    given: tuple[Tensor, Tensor, Tensor, Tensor],  # as the oracle's
    trunk: Tensor | None,
    out: Tensor,
    terms: Terms,
) -> Tensor:
    """Losses; the gradient goes to ``out``."""
    student, teacher, weights, cotangent = given
    losses = torch.empty(1, *cotangent.shape, dtype=weights.dtype)
    options = terms.arguments()
    (kept,) = engine.forward([student], [teacher], None, weights[:, None], losses, **options)
    engine.backward(student, teacher, kept, weights, cotangent, trunk, out, **options)
    return losses[0]


def built(folder: Path, *flags: str) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_build, "FLAGS", (*cpu_build.FLAGS, *flags))
        try:
            library = cpu_build.load_library("cpu_loss", folder)
        except cpu_build.NoCompilerError as error:
            pytest.skip(str(error))
    return Engine(
        name="cpp",
        power_maps=partial(cpu_loss.power_maps, library=library),
        forward=partial(cpu_loss.forward, library=library),
        backward=partial(cpu_loss.backward, library=library),
        forward_with_gradient=partial(cpu_loss.forward_with_gradient, library=library),
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return built(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module", params=BUILDS)
def narrow_engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    if " avx2 " not in Path("/proc/cpuinfo").read_text(encoding="ascii"):
        pytest.skip("needs a processor with AVX2")
    return built(tmp_path_factory.mktemp("built"), *BUILDS[request.param])


def check(name: str, terms: Terms, dtype: torch.dtype, engine: Engine) -> None:
    (student, teacher, trunk, out, one_pass), prefix = activations(name, dtype, 5)
    terms = replace(terms, prefix=prefix)
    given = (student, teacher, *weights_for(student))
    losses, gradient = oracle(*given, terms)
    expected = gradient + trunk.double()
    expected[:, :prefix] = out[:, :prefix].double()

    found = two_passes(engine, given, trunk, out, terms)

    assert found.dtype == accumulator(student)
    assert_close(found, losses, LOSS_TOLERANCE[dtype])
    assert_close(out, expected, GRADIENT_TOLERANCE[dtype])

    expected = oracle(*given[:3], torch.ones_like(found), terms)[1]
    expected[:, :prefix] = one_pass[:, :prefix].double()
    again = torch.empty_like(found)
    assert engine.forward_with_gradient is not None
    engine.forward_with_gradient(
        student, teacher, None, given[2], again, one_pass, **terms.arguments()
    )

    assert torch.equal(again, found)
    assert_close(one_pass, expected, GRADIENT_TOLERANCE[dtype])


# The cosine of one channel is 1 or -1: there is no gradient but for rounding.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "terms"),
    [
        (name, terms)
        for name in LAYOUTS
        for terms in TERMS
        if name != "tokens-of-one-channel" or terms.clone != "cosine"
    ],
    ids=label,
)
@pytest.mark.usefixtures("poisoned_memory")
def test_losses_and_gradient_equal_the_oracle(name, terms, dtype, engine):
    check(name, terms, dtype, engine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("poisoned_memory")
def test_narrower_vectors_equal_the_oracle(name, dtype, narrow_engine):
    for terms in TERMS:
        check(name, terms, dtype, narrow_engine)


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 150)),
        st.tuples(*[st.integers(1, 3), st.integers(1, 150), st.integers(1, 9), st.integers(1, 9)]),
    ),
    terms=st.sampled_from(TERMS),
    channels_last=st.booleans(),
)
def test_any_shape_equals_the_oracle(shape, terms, channels_last, engine):
    student, teacher = (randn(*shape, seed=seed).double() for seed in (0, 1))
    if channels_last and len(shape) == 4:
        student = student.to(memory_format=torch.channels_last)
        teacher = teacher.to(memory_format=torch.channels_last)
    given = (student, teacher, *weights_for(student))
    out = torch.full_like(student, math.nan)

    found = two_passes(engine, given, None, out, terms)

    losses, gradient = oracle(*given, terms)
    assert_close(found, losses, LOSS_TOLERANCE[torch.float64])
    # A map of one position, or a cosine of one channel, has a gradient of rounding errors.
    torch.testing.assert_close(out, gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.usefixtures("poisoned_memory")
def test_power_maps_equal_the_oracle(name, power, dtype, engine):
    maps, prefix = activations(name, dtype, 2)

    found = engine.power_maps(maps, prefix=prefix, power=power, images=1)

    expected = [reference.power_map(x[:1].double(), power=power, prefix=prefix) for x in maps]
    assert found.dtype == accumulator(maps[0])
    assert_close(found, torch.stack(expected), 1e-6 if dtype != torch.float64 else 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [1.01, 1.5, 2.5, 3.0, 7.0])
def test_powers_are_right_from_the_smallest_to_the_largest_number(power, dtype, engine):
    limits = torch.finfo(dtype)
    exponents = torch.linspace(math.log2(limits.tiny) - 20, math.log2(limits.max) - 1e-3, 4001)
    values = torch.cat([exponents.double().exp2().to(dtype), torch.tensor([0, math.inf])]).to(dtype)

    found = engine.power_maps([values[None, :, None]], prefix=0, power=power)

    expected = values.double().pow(power).to(dtype)
    # The rounding of power * log2(x) counts as often as that number is large.
    tolerance = 4 * limits.eps * power * float(exponents.abs().max())
    torch.testing.assert_close(found[0, 0], expected, rtol=tolerance, atol=limits.tiny)


@pytest.mark.parametrize("terms", TERMS, ids=label)
@pytest.mark.parametrize("name", SMALL)
def test_given_power_maps_replace_the_teacher_of_the_attention_loss(name, terms, engine):
    (student, teacher, out, expected), prefix = activations(name, torch.float32)
    expected.copy_(out)
    options = replace(terms, prefix=prefix).arguments()
    powers = engine.power_maps([teacher], prefix=prefix, power=terms.power)[0]
    weights, losses = torch.tensor([0.7, 1.3]), torch.empty(2, 2, student.shape[0])
    kept = teacher if terms.clone != "none" else None

    engine.forward_with_gradient(student, teacher, None, weights, losses[0], expected, **options)
    engine.forward_with_gradient(student, kept, powers, weights, losses[1], out, **options)

    assert torch.equal(losses[0], losses[1])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_only_what_counts_is_read_and_written(name, dtype, engine):
    (student, teacher, trunk, out), prefix = activations(name, dtype)
    images, terms = student.shape[0] - 1, Terms(clone="mse", prefix=prefix)
    given = (student[:images], teacher[:images], *weights_for(student[:images]))
    expected = out.clone().double()
    gradient = oracle(*given, terms)[1] + trunk[:images].double()
    expected[:images, prefix:] = gradient[:, prefix:]
    for x in (student, teacher, trunk):
        x[images:] = math.nan
        x[:, :prefix] = math.nan

    # The teacher may have seen just the images that count.
    found = two_passes(engine, (student, *given[1:]), trunk, out, terms)

    assert found.isfinite().all()
    assert_close(out, expected, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("terms", TERMS, ids=label)
@pytest.mark.parametrize("name", SMALL)
def test_the_gradient_may_overwrite_the_trunks(name, terms, engine):
    (student, teacher, trunk, out), prefix = activations(name, torch.bfloat16)
    given, terms = (student, teacher, *weights_for(student)), replace(terms, prefix=prefix)
    out.copy_(trunk)

    two_passes(engine, given, trunk, out, terms)
    two_passes(engine, given, trunk, trunk, terms)

    assert torch.equal(trunk, out)


def test_layers_have_their_own_weights_whatever_their_strides(engine):
    students, teachers = ([randn(3, 5, 20, seed=seed + k) for k in (0, 9)] for seed in (1, 2))
    students[1] = students[1].transpose(0, 1).contiguous().transpose(0, 1)
    weights, losses = randn(2, 2).T, torch.empty(2, 2, 3)
    cotangent, terms = torch.tensor([[2.0], [3.0]]).expand(2, 3), Terms(clone="cosine", prefix=1)
    options = terms.arguments()

    kept = engine.forward(students, teachers, None, weights, losses, **options)

    for layer, pair in enumerate(zip(students, teachers, strict=True)):
        own, out = weights[:, layer], torch.zeros_like(pair[0])
        engine.backward(*pair, kept[layer], own, cotangent, None, out, **options)
        expected, gradient = oracle(*pair, own, cotangent, terms)
        assert_close(losses[layer], expected, 1e-5)
        assert_close(out, gradient, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_student_like_its_teacher_has_no_loss(name, dtype, engine):
    (student, out), prefix = activations(name, dtype, 2)
    ones = torch.ones(2, student.shape[0], dtype=accumulator(student))
    given = (student, student, ones[:, 0], ones)
    out.zero_()

    losses = two_passes(engine, given, None, out, Terms(clone="mse", prefix=prefix))

    assert losses[0].max() < 1e-30
    assert losses[1].max() == 0
    assert out.abs().max() < 1e-14

    losses = two_passes(engine, given, None, out, Terms(clone="cosine", prefix=prefix))

    assert_close(losses[1], -torch.ones_like(losses[1]).double(), 1e-6)
    assert out.abs().max() < 1e-6


@pytest.mark.parametrize("terms", TERMS, ids=label)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
def test_dead_maps_have_the_oracles_finite_gradient(dead, name, terms, engine):
    (student, teacher, out), prefix = activations(name, torch.float32, 3)
    for role, activation in (("student", student), ("teacher", teacher)):
        if dead in (role, "both"):
            activation.zero_()
    given, terms = (student, teacher, *weights_for(student)), replace(terms, prefix=prefix)

    found = two_passes(engine, given, None, out, terms)

    losses, gradient = oracle(*given, terms)
    assert gradient.isfinite().all()
    assert_close(found, losses, 1e-5)
    assert_close(out[:, prefix:], gradient[:, prefix:], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS[2:5], ids=label)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad, terms, dtype, engine):
    student, teacher = randn(2, 4, 40).to(dtype), randn(2, 4, 40, seed=1).to(dtype)
    student[1, 2, 3] = bad
    out = torch.zeros_like(student)

    losses = two_passes(engine, (student, teacher, *weights_for(student)), None, out, terms)

    assert losses[:, 0].isfinite().all()
    assert not losses[0, 1].isfinite()
    assert out[0].isfinite().all()
    assert not out[1, 2, 3].isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(130, 40, 208), (100, 33, 333), (72, 300, 7, 7), (128, 520, 4, 4)]
)
def test_large_gradients_that_bypass_the_cache_equal_small_ones(shape, dtype, engine):
    student, teacher = randn(*shape).to(dtype), randn(*shape, seed=1).to(dtype)
    assert student.numel() * dtype.itemsize > 2 << 20
    large, small = torch.zeros_like(student), torch.zeros_like(student)
    losses = torch.empty(2, 2, shape[0], dtype=accumulator(student))
    weights, options = weights_for(student)[0], Terms(clone="mse").arguments()

    engine.forward_with_gradient(student, teacher, None, weights, losses[0], large, **options)
    for n in range(0, shape[0], 8):
        part = slice(n, n + 8)
        given = (student[part], teacher[part], None, weights, losses[1][:, part], small[part])
        engine.forward_with_gradient(*given, **options)

    assert torch.equal(losses[0], losses[1])
    assert torch.equal(large, small)


def test_results_do_not_depend_on_the_number_of_threads(engine):
    student, teacher = randn(7, 130, 7, 7), randn(7, 130, 7, 7, seed=1)
    given, results = (student, teacher, *weights_for(student)), []

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            out = torch.zeros_like(student)
            results.append((two_passes(engine, given, None, out, Terms(clone="cosine")), out))
        finally:
            torch.set_num_threads(1)

    for losses, out in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(out, results[0][1])


def test_no_images_are_no_work(engine):
    student, out = randn(3, 5, 8), torch.full((3, 5, 8), 7.0)
    given = (student, student, torch.ones(2), torch.empty(2, 0))

    losses = two_passes(engine, given, None, out, Terms(clone="cosine"))

    assert losses.shape == (2, 0)
    assert (out == 7).all()
