"""The Triton kernels of the distillation loss, in the interpreter, against the float64 oracle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mimic_fast.kernels import distill_blocks, distill_loss, distill_plan
from mimic_fast.kernels.layout import layout_of
from mimic_fast.kernels.reference import layer_losses, power_map
from mimic_fast.kernels.traffic import kernel_traffic

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXACT = 1e-5  # relative error of float32, in the 2-norm; measured: 1e-6 or less
CLONES = ("none", "mse", "cosine")
WIDTHS = [(197, 192), (49, 384), (197, 768), (49, 1024), (257, 1408), (1, 768)]
MAPS = [(1, 64), (4, 64), (16, 48), (49, 64), (49, 20), (196, 24), (225, 16), (784, 16), (289, 8)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer group: activations of all layers and what is computed of them."""

    students: Sequence[Tensor]
    teachers: Sequence[Tensor]
    weights: Tensor
    cotangent: Tensor  # [layer, 2, image]
    trunks: Sequence[Tensor]
    terms: dict[str, Any]

    @property
    def images(self) -> int:
        return self.cotangent.shape[2]


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def case(
    *shape: int,
    layers: int = 1,
    dtype: torch.dtype = torch.float32,
    images: int | None = None,
    scale: float = 1,
    clone: str = "none",
    attention: bool = True,
    power: float = 2.0,
    prefix: int = 0,
) -> Case:
    def activations(seed: int) -> list[Tensor]:
        return [(scale * drawn(*shape, seed=seed + n)).to(dtype) for n in range(layers)]

    return Case(
        students=activations(0),
        teachers=activations(100),
        weights=0.5 + drawn(2, layers, seed=200, dtype=torch.float32).abs(),
        cotangent=drawn(layers, 2, images or shape[0], seed=300, dtype=torch.float32),
        trunks=[drawn(*shape, seed=400 + n).to(dtype) for n in range(layers)],
        terms={"clone": clone, "attention": attention, "power": power, "prefix": prefix},
    )


def computed(
    given: Case, *, powers: bool = False, trunk: bool = False, in_place: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Losses and gradients by the kernels; NaN where they wrote nothing."""
    maps = None
    if powers:
        maps = distill_loss.power_maps(
            given.teachers,
            prefix=given.terms["prefix"],
            power=given.terms["power"],
            images=given.images,
        )
    dense = given.terms["clone"] != "none"
    losses = torch.empty(given.cotangent.shape)
    coefficients = distill_loss.forward(
        given.students,
        given.teachers if dense or maps is None else None,
        maps,
        given.weights,
        losses,
        **given.terms,
    )
    gradients = []
    for n, student in enumerate(given.students):
        out = torch.empty_like(student)
        arriving = out.copy_(given.trunks[n]) if in_place else given.trunks[n]
        distill_loss.backward(
            student,
            given.teachers[n] if dense else None,
            coefficients[n],
            given.weights[:, n],
            given.cotangent[n],
            arriving if trunk or in_place else None,
            out,
            **given.terms,
        )
        gradients.append(out)
    return losses, gradients


def expected(
    given: Case, *, trunk: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor]]:
    """Losses and gradients by autograd through the oracle, of what counts."""
    losses, gradients = [], []
    for n, student in enumerate(given.students):
        own = student[: given.images].to(dtype).requires_grad_()
        loss = layer_losses(
            own,
            given.teachers[n][: given.images].to(dtype),
            None,
            given.weights[:, n].to(dtype if dtype == torch.float64 else torch.float32),
            **given.terms,
        )
        (gradient,) = torch.autograd.grad((loss * given.cotangent[n]).sum(), own)
        if trunk:
            gradient = gradient + given.trunks[n][: given.images].to(dtype)
        losses.append(loss.detach())
        gradients.append(gradient)
    return torch.stack(losses), gradients


def counted(given: Case, gradients: Sequence[Tensor]) -> list[Tensor]:
    prefix = given.terms["prefix"]
    own = [gradient[: given.images] for gradient in gradients]
    return [gradient[:, prefix:] for gradient in own] if prefix else own


def error(actual: Tensor, oracle: Tensor) -> float:
    """Relative, in the 2-norm; absolute where the oracle is zero."""
    scale = oracle.norm().item()
    return ((actual.double() - oracle).norm() / (scale or 1.0)).item()


def assert_exact(given: Case, *, trunk: bool = False, **how: bool) -> None:
    losses, gradients = computed(given, trunk=trunk, **how)
    oracle, oracle_gradients = expected(given, trunk=trunk or how.get("in_place", False))
    for row in range(2):
        assert error(losses[:, row], oracle[:, row]) <= EXACT
    for actual, wanted in zip(
        counted(given, gradients), counted(given, oracle_gradients), strict=True
    ):
        assert error(actual, wanted) <= EXACT


def ulps(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighboring numbers of a type at some values."""
    limits = torch.finfo(dtype)
    exponent = values.abs().clamp(min=limits.tiny).log2().floor()
    return limits.eps * exponent.exp2()


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize(("positions", "channels"), WIDTHS, ids=lambda n: str(n))
def test_tokens_match_float64(positions: int, channels: int, clone: str):
    images = 1 if channels > 700 else 2
    # A single position is all of its map: both maps are 1, and nothing is left to compare.
    attention = positions > 1
    if clone == "none" and not attention:
        pytest.skip("nothing to compute")

    assert_exact(case(images, positions + 1, channels, clone=clone, attention=attention, prefix=1))


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize(("positions", "channels"), MAPS, ids=lambda n: str(n))
def test_planes_match_float64(positions: int, channels: int, clone: str):
    side = round(positions**0.5)
    attention = positions > 1
    if clone == "none" and not attention:
        pytest.skip("nothing to compute")

    assert_exact(case(2, channels, side, side, clone=clone, attention=attention))


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0, 4.0])
@pytest.mark.parametrize("shape", [(2, 17, 40), (2, 24, 5, 5)], ids=["tokens", "planes"])
def test_powers_match_float64(shape: tuple[int, ...], power: float):
    given = case(*shape, power=power, clone="cosine")
    for activation in (*given.students, *given.teachers):
        activation[0, 3] = 0  # of a token or a channel: |0|^(p-1) is 0

    assert_exact(given)


@pytest.mark.parametrize("clone", CLONES[1:])
@pytest.mark.parametrize("shape", [(3, 96), (2, 5, 96), (2, 24, 3, 3)])
def test_clone_loss_alone_matches_float64(shape: tuple[int, ...], clone: str):
    given = case(*shape, clone=clone, attention=False)
    losses, _ = computed(given)

    assert_exact(given)
    assert (losses[:, 0] == 0).all()


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("shape", [(2, 9, 48), (2, 24, 3, 5)], ids=["tokens", "planes"])
def test_given_power_maps_match_float64(shape: tuple[int, ...], clone: str):
    assert_exact(case(*shape, layers=2, clone=clone), powers=True)


@pytest.mark.parametrize("shape", [(3, 21, 48), (2, 24, 7, 7), (2, 16, 28, 28)])
@pytest.mark.parametrize("power", [2.0, 3.0])
def test_power_maps_match_float64(shape: tuple[int, ...], power: float):
    features = [drawn(*shape, seed=n, dtype=torch.float32) for n in range(3)]
    prefix = int(len(shape) == 3)

    maps = distill_loss.power_maps(features, prefix=prefix, power=power, images=2)

    oracle = [power_map(x[:2].double(), power=power, prefix=prefix) for x in features]
    assert error(maps, torch.stack(oracle)) <= EXACT


def test_rows_beyond_one_block_match_float64(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distill_plan, "MOST_ROW", 16)
    distill_plan.plan_forward.cache_clear()

    assert_exact(case(2, 53, 32, clone="mse"))
    assert_exact(case(2, 16, 5, 7))

    distill_plan.plan_forward.cache_clear()


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("shape", [(2, 9, 48), (2, 24, 3, 3)], ids=["tokens", "planes"])
@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in_place"])
def test_trunk_is_added(shape: tuple[int, ...], clone: str, in_place: bool):
    assert_exact(case(*shape, clone=clone), trunk=not in_place, in_place=in_place)


@pytest.mark.parametrize("clone", CLONES)
def test_only_what_counts_is_touched(clone: str):
    given = case(3, 12, 40, clone=clone, prefix=2, images=2)

    losses, (gradient,) = computed(given, in_place=True)

    assert_exact(given, in_place=True)
    assert losses.shape == (1, 2, 2)
    assert torch.equal(gradient[2], given.trunks[0][2])
    assert torch.equal(gradient[:, :2], given.trunks[0][:, :2])


def sliced_tokens(tokens: Tensor) -> Tensor:
    """Positions two rows apart, images with a gap between them."""
    images, positions, channels = tokens.shape
    wide = torch.zeros(images + 1, 2 * positions, channels + 8, dtype=tokens.dtype)
    view = wide[1:, ::2, :channels]
    return view.copy_(tokens)


def transposed_tokens(tokens: Tensor) -> Tensor:
    """Channels apart, positions together: a map's NCHW memory seen as tokens."""
    return tokens.transpose(1, 2).contiguous().transpose(1, 2)


def channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def sliced_planes(maps: Tensor) -> Tensor:
    """Rows of an image cut off: channels no longer follow each other."""
    images, channels, height, width = maps.shape
    wide = torch.zeros(images, channels + 3, height + 1, width, dtype=maps.dtype)
    return wide[:, 3:, :height].copy_(maps)


LAYOUTS = {
    "sliced_tokens": ((2, 9, 40), sliced_tokens, "tokens"),
    "transposed_tokens": ((2, 9, 40), transposed_tokens, "planes"),
    "channels_last": ((2, 40, 3, 5), channels_last, "tokens"),
    "sliced_planes": ((2, 40, 3, 5), sliced_planes, "planes"),
}


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_are_taken_as_they_come(name: str, clone: str):
    shape, arranged, kind = LAYOUTS[name]
    given = case(*shape, clone=clone, prefix=2 if len(shape) == 3 else 0)
    student = arranged(given.students[0])
    layout = layout_of(student, prefix=given.terms["prefix"])
    assert layout is not None
    assert layout.kind == kind
    out = arranged(torch.full_like(given.trunks[0], float("nan")))
    losses = torch.empty(given.cotangent.shape)

    terms, weights = given.terms, given.weights
    coefficients = distill_loss.forward(
        [student], [arranged(given.teachers[0])], None, weights, losses, **terms
    )
    distill_loss.backward(
        student,
        arranged(given.teachers[0]),
        coefficients[0],
        weights[:, 0],
        given.cotangent[0],
        None,
        out,
        **terms,
    )

    oracle, oracle_gradients = expected(given)
    assert error(losses[:, 0], oracle[:, 0]) <= EXACT
    assert error(losses[:, 1], oracle[:, 1]) <= EXACT
    assert error(counted(given, [out])[0], counted(given, oracle_gradients)[0]) <= EXACT


@pytest.mark.parametrize("clone", CLONES)
def test_layers_and_teachers_may_differ_in_strides(clone: str):
    given = case(1, 5, 40, layers=3, clone=clone)
    students = [given.students[0], sliced_tokens(given.students[1]), given.students[2]]
    teachers = [*given.teachers[:2], sliced_tokens(given.teachers[2])]

    plain, _ = computed(given)
    losses = torch.empty(given.cotangent.shape)
    distill_loss.forward(students, teachers, None, given.weights, losses, **given.terms)
    maps = distill_loss.power_maps(teachers, prefix=0, power=2.0)

    assert torch.equal(losses, plain)
    assert torch.equal(maps, distill_loss.power_maps(given.teachers, prefix=0, power=2.0))


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("shape", [(1, 17, 192), (1, 64, 5, 5)], ids=["tokens", "planes"])
@pytest.mark.parametrize(
    ("dtype", "trunk"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)],
    ids=["bf16-last", "bf16-middle", "fp16-middle"],
)
def test_half_precision_is_as_good_as_eager(
    shape: tuple[int, ...], dtype: torch.dtype, clone: str, trunk: bool
):
    given = case(*shape, dtype=dtype, clone=clone)

    losses, (gradient,) = computed(given, trunk=trunk)

    oracle, (oracle_gradient,) = expected(given, trunk=trunk)
    _, (eager,) = expected(given, trunk=trunk, dtype=dtype)
    # Sums are float32 whatever the inputs are.
    assert error(losses, oracle) <= EXACT
    allowed = (eager.double() - oracle_gradient).abs() + 2 * ulps(oracle_gradient, dtype)
    # Terms of opposite sign may cancel below what float32 resolves.
    allowed += 1e-6 * oracle_gradient.abs().max()
    assert ((gradient.double() - oracle_gradient).abs() <= allowed).all()


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("shape", [(1, 5, 1024), (1, 512, 2, 2)], ids=["tokens", "planes"])
def test_large_halves_stay_finite(shape: tuple[int, ...], clone: str):
    given = case(*shape, dtype=torch.float16, scale=300, clone=clone)

    losses, (gradient,) = computed(given)

    oracle, _ = expected(given)
    assert error(losses, oracle) <= EXACT
    assert gradient.isfinite().all()


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("shape", [(3, 9, 40), (3, 40, 3, 3)], ids=["tokens", "planes"])
def test_zero_maps_are_finite_and_match_float64(shape: tuple[int, ...], clone: str, power: float):
    given = case(*shape, clone=clone, power=power)
    _, (usual,) = expected(given)
    given.students[0][0] = 0
    given.teachers[0][1] = 0
    given.students[0][2] = given.teachers[0][2] = 0

    losses, (gradient,) = computed(given)

    oracle, (oracle_gradient,) = expected(given)
    for row in range(2):
        assert error(losses[:, row], oracle[:, row]) <= EXACT
    # Against a zero map only the norm's 1e-6 is left of the attention loss's gradient.
    assert (gradient - oracle_gradient).norm() <= EXACT * max(usual.norm(), oracle_gradient.norm())


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("shape", [(2, 9, 40), (2, 40, 3, 3)], ids=["tokens", "planes"])
def test_small_maps_have_the_epsilon_of_the_oracle(shape: tuple[int, ...], clone: str):
    given = case(*shape, clone=clone, scale=1e-4)  # norms of 1e-6, as the epsilon

    assert_exact(given)


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("shape", [(2, 9, 48), (2, 24, 5, 5)], ids=["tokens", "planes"])
def test_identical_student_and_teacher_have_no_loss(shape: tuple[int, ...], clone: str):
    given = case(*shape, clone=clone)
    apart, (pulled,) = computed(given)
    given.teachers[0].copy_(given.students[0])

    losses, (gradient,) = computed(given)

    assert (losses[:, 0] <= 1e-12 * apart[:, 0]).all()
    if clone == "cosine":
        torch.testing.assert_close(losses[0, 1], -given.weights[1].expand(2), rtol=1e-6, atol=0)
    else:
        assert (losses[:, 1] == 0).all()
    # What is left of a cosine's gradient are two terms of its own size that cancel.
    assert gradient.norm() <= 1e-5 * pulled.norm()


def test_expanded_cotangent_and_strided_weights_are_read_as_they_are():
    given = case(3, 9, 40, layers=2, clone="mse")
    losses = torch.empty(given.cotangent.shape)
    wide = torch.full((2, 8), float("nan"))
    wide[:, 2:6:2] = given.weights
    weights = wide[:, 2:6:2]

    coefficients = distill_loss.forward(
        given.students, given.teachers, None, weights, losses, **given.terms
    )
    out = torch.empty_like(given.students[1])
    cotangent = torch.tensor(0.7).expand(2, 3)
    distill_loss.backward(
        given.students[1],
        given.teachers[1],
        coefficients[1],
        weights[:, 1],
        cotangent,
        None,
        out,
        **given.terms,
    )

    given.cotangent.fill_(0.7)
    oracle, gradients = expected(given)
    assert error(losses, oracle) <= EXACT
    assert error(out, gradients[1]) <= EXACT


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("shape", [(2, 5, 40), (2, 16, 3, 3)], ids=["tokens", "planes"])
def test_a_step_launches_two_kernels_and_one_a_layer(
    shape: tuple[int, ...], layers: int, monkeypatch: pytest.MonkeyPatch
):
    launched: list[str] = []
    launch = distill_loss._launch

    def counting(plan: Any, *arguments: Any) -> None:
        launched.append(plan.kernel.fn.__name__.split("_")[1])
        launch(plan, *arguments)

    monkeypatch.setattr(distill_loss, "_launch", counting)
    given = case(*shape, layers=layers)

    assert_exact(given, powers=True)

    assert launched == ["power", "fwd", *["bwd"] * layers]


@pytest.mark.parametrize(
    ("clone", "powers", "ideal"), [("mse", False, 6), ("cosine", False, 6), ("none", True, 4)]
)
@pytest.mark.parametrize(("channels", "excess"), [(192, 1.02), (768, 1.005)])
def test_activations_are_read_once_in_each_pass(
    clone: str, powers: bool, ideal: int, channels: int, excess: float
):
    given = case(1, 50, channels, dtype=torch.bfloat16, clone=clone, prefix=1)

    with kernel_traffic() as counted_bytes:
        computed(given, powers=powers, in_place=True)

    moved = sum(kernel.total for name, kernel in counted_bytes.items() if "power" not in name)
    assert moved <= excess * ideal * 49 * channels * 2


def test_positions_that_lie_apart_are_refused():
    apart = drawn(2, 8, 6, 6, seed=0, dtype=torch.float32)[:, :, ::2, ::2]

    with pytest.raises(ValueError, match="contiguous"):
        distill_loss.power_maps([apart], prefix=0, power=2.0)


def test_teachers_in_another_memory_format_are_refused():
    given = case(2, 8, 3, 3, clone="mse")
    losses = torch.empty(given.cotangent.shape)

    with pytest.raises(ValueError, match="students are planes, teachers tokens"):
        distill_loss.forward(
            given.students,
            [channels_last(given.teachers[0])],
            None,
            given.weights,
            losses,
            **given.terms,
        )


def test_gradients_laid_out_unlike_the_student_are_refused():
    given = case(2, 9, 40)
    losses = torch.empty(given.cotangent.shape)
    coefficients = distill_loss.forward(
        given.students, given.teachers, None, given.weights, losses, **given.terms
    )

    with pytest.raises(ValueError, match="strides of the student"):
        distill_loss.backward(
            given.students[0],
            None,
            coefficients[0],
            given.weights[:, 0],
            given.cotangent[0],
            None,
            sliced_tokens(given.trunks[0]),
            **given.terms,
        )


def test_cases_for_the_compiler_state_every_argument_once():
    cases = distill_loss.aot_cases()

    assert len({each.name for each in cases}) == len(cases) > 500
    for each in cases:
        names = set(each.kernel.arg_names)
        runtime = {name for name, kind in each.signature.items() if kind != "constexpr"}
        assert runtime | set(each.constants) == names == set(each.signature)
        assert not runtime & set(each.constants)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_in_registers_and_move_whole_vectors(itemsize: int):
    vector = 16 // itemsize
    for channels in (192, 384, 768, 1024, 1280, 1408, 1536):
        for positions in (1, 49, 196, 197, 257, 1369):
            tokens = distill_blocks.token_blocks(
                positions, channels, itemsize, most_warps=8, lanes=64
            )
            assert tokens.block_n * tokens.block_c == tokens.num_warps * 64 * vector
    for positions in (4, 9, 16, 25, 36, 49, 64, 100, 144, 196, 256, 784, 1024, 3136):
        planes = distill_blocks.plane_blocks(
            positions, 256, itemsize, dense=True, most_warps=8, lanes=64
        )
        slots = planes.row * planes.block_p
        assert planes.row * positions * itemsize % 16 == 0
        assert slots * planes.block_r <= max(planes.num_warps * 64 * vector, 2048)
        assert planes.row == 1 or planes.block_p >= positions
