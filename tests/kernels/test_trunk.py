"""The losses in the trunk, and as a plain function, against autograd on the oracle."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimic_fast import ops
from mimic_fast.kernels.distill import distill_losses
from mimic_fast.kernels.engine import Target, Terms, runs, stacked
from mimic_fast.kernels.ownership import probed, sole_holder
from mimic_fast.kernels.reference import layer_losses, power_map
from mimic_fast.kernels.trunk import LayerLosses
from mimic_fast.ops_choice import engine

ENGINES: list[ops.Path] = ["cpp", "triton"]
# float32 against float32 in another order of sums
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Blocks(nn.Module):
    """Residual blocks over tokens; tells a listener of every block's output."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, tokens: Tensor, listener=None, prefix: int = 1) -> Tensor:
        for index, block in enumerate(self.blocks):
            tokens = tokens + block(tokens).tanh()
            if listener is not None:
                tokens = listener.tap(index, tokens, prefix=prefix)
        return tokens


def run(listener, *, images: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Losses of the taps, and gradients of input and parameters with a trunk loss beside them."""
    model = Blocks()
    tokens = randn(images, 5, 8).requires_grad_()
    out = model(tokens, listener)
    losses = listener.losses()
    scale = torch.tensor([1.5, 0.5])[:, None]
    (out.square().sum() + sum((loss * scale).sum() for loss in losses)).backward()
    gradients = [tokens.grad, *(p.grad for p in model.parameters())]
    return losses, [g for g in gradients if g is not None]


def make(kind: ops.Path, targets, terms, weights, *, images: int = 3, live=frozenset()):
    settings = {"weights": weights, "targets": targets, "terms": terms, "images": images}
    if kind == "reference":
        return ops.LiveLosses(**settings)
    return LayerLosses(engine=engine(kind), live=live, **settings)


def case(clone: ops.Clone, *, attention: bool, images: int = 3):
    teachers = [randn(images, 5, 8, seed=n + 1) for n in range(3)]
    maps = [power_map(teacher, prefix=1) for teacher in teachers]
    targets: list[Target | None] = [
        Target(power=power) if clone == "none" else Target(teacher=teacher)
        for power, teacher in zip(maps, teachers, strict=True)
    ]
    terms = [Terms(clone=clone, attention=attention)] * 3
    weights = torch.tensor([[0.5, 2.0, 1.0], [1.0, 0.25, 3.0]])
    return targets, terms, weights


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize(
    ("clone", "attention"), [("none", True), ("mse", True), ("cosine", True), ("mse", False)]
)
def test_trunk_losses_and_gradients_equal_autograd_of_the_oracle(kind, clone, attention):
    setting = case(clone, attention=attention)

    losses, gradients = run(make(kind, *setting))

    expected, expected_gradients = run(make("reference", *setting))
    for found, wanted in zip([*losses, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("kind", ENGINES)
def test_only_the_first_images_have_losses(kind):
    targets, terms, weights = case("mse", attention=True, images=2)

    losses, gradients = run(make(kind, targets, terms, weights, images=2), images=5)

    expected, wanted = run(make("reference", targets, terms, weights, images=2), images=5)
    for found, value in zip([*losses, *gradients], [*expected, *wanted], strict=True):
        torch.testing.assert_close(found, value, **TOLERANCE)


@pytest.mark.parametrize("kind", ENGINES)
def test_layers_without_target_are_left_alone(kind):
    targets, terms, weights = case("none", attention=True)
    targets[1] = None

    losses, gradients = run(make(kind, targets, terms, weights))

    expected, wanted = run(make("reference", targets, terms, weights))
    assert len(losses) == 2
    for found, value in zip([*losses, *gradients], [*expected, *wanted], strict=True):
        torch.testing.assert_close(found, value, **TOLERANCE)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_of_a_network_that_branches(kind, memory_format):
    """A tap feeds two branches, one of them in another memory format than the gradient's."""
    torch.manual_seed(0)
    convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
    convs.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    images = randn(2, 4, 6, 6).to(memory_format=memory_format)
    teacher = randn(2, 4, 6, 6, seed=1).to(memory_format=memory_format)
    weights = torch.tensor([[1.0], [2.0]])

    def gradients(kind: ops.Path) -> list[Tensor]:
        listener = make(kind, [Target(teacher=teacher)], [Terms(clone="mse")], weights, images=2)
        convs.zero_grad()
        tapped = listener.tap(0, convs[0](images))
        out = convs[1](tapped) + tapped + convs[2](tapped.contiguous())
        (out.square().sum() + listener.losses()[0].sum()).backward()
        return [p.grad.clone() for p in convs.parameters() if p.grad is not None]

    for found, wanted in zip(gradients(kind), gradients("reference"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_gradient_that_others_hold_is_not_written_to(kind):
    weights = torch.tensor([[1.0], [0.0]])
    target = Target(power=randn(2, 4).square())
    kept: list[Tensor] = []

    def gradients(kind: ops.Path) -> tuple[Tensor, Tensor]:
        listener = make(kind, [target], [Terms()], weights, images=2)
        start = randn(2, 4, 8).requires_grad_()
        other = randn(2, 4, 8, seed=1).requires_grad_()
        before = other * 2  # made before the tap: its gradient is still to be used by then
        total = listener.tap(0, start * 1) + before
        total.register_hook(lambda gradient: kept.append(gradient))
        (total.square().sum() + listener.losses()[0].sum()).backward()
        assert start.grad is not None
        assert other.grad is not None
        return start.grad, other.grad

    found, wanted = gradients(kind), gradients("reference")
    for own, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, value, **TOLERANCE)
    torch.testing.assert_close(kept[0], kept[1])


def test_a_gradient_of_our_own_is_told_from_one_that_others_hold():
    early = torch.ones(2, requires_grad=True) * 3  # still waits for its gradient at the tap's turn
    kept = []

    def watched(trunk: Tensor) -> Tensor:
        trunk.register_hook(kept.append)
        return trunk * 2

    assert probed(lambda trunk: trunk * 5 + trunk) == sole_holder()
    assert probed(lambda trunk: trunk + early) != sole_holder()
    assert probed(watched) != sole_holder()
    assert probed(lambda trunk: trunk.sum()) != sole_holder()  # one number, expanded


@pytest.mark.parametrize("kind", ENGINES)
def test_an_activation_that_is_changed_after_the_tap(kind):
    weights = torch.tensor([[1.0], [0.0]])
    target = Target(power=randn(2, 4).square())

    def gradient(kind: ops.Path, **settings) -> Tensor:
        listener = make(kind, [target], [Terms()], weights, images=2, **settings)
        start = randn(2, 4, 8).requires_grad_()
        out = torch.relu_(listener.tap(0, start * 1))
        (out.sum() + listener.losses()[0].sum()).backward()
        assert start.grad is not None
        return start.grad

    torch.testing.assert_close(
        gradient(kind, live=frozenset({0})), gradient("reference"), **TOLERANCE
    )
    with pytest.raises(RuntimeError, match=r"in.?place"):
        gradient(kind)


def test_activations_are_let_go_with_the_graph():
    targets, terms, weights = case("mse", attention=True)
    listener = make("cpp", targets, terms, weights)
    model = Blocks()
    seen = []
    keep = listener.tap

    class Spy:
        def tap(self, index, activation, *, prefix=0):
            seen.append(weakref.ref(activation.untyped_storage()))
            return keep(index, activation, prefix=prefix)

    out = model(randn(3, 5, 8).requires_grad_(), Spy())
    losses = listener.losses()
    (out.sum() + torch.stack(losses).sum()).backward()
    del out
    gc.collect()

    assert [loss.isfinite().all().item() for loss in losses] == [True] * 3
    assert [storage() for storage in seen] == [None] * 3


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("scale", ["one", "many"])
@pytest.mark.parametrize("clone", ["none", "cosine", "mse"])
def test_plain_function_equals_autograd_of_the_oracle(kind, clone, scale):
    students = [randn(2, 5, 6, seed=n).requires_grad_() for n in range(2)]
    teachers = [randn(2, 5, 6, seed=n + 5) for n in range(2)]
    weights = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    terms = Terms(clone=clone, prefix=1)
    factor = torch.ones(2, 2, 2) if scale == "one" else randn(2, 2, 2, seed=9)

    targets = [Target(teacher=teacher) for teacher in teachers]
    found = torch.stack(distill_losses(engine(kind), students, targets, weights, [terms] * 2))
    gradients = torch.autograd.grad((found * factor).sum(), students, retain_graph=True)
    again = torch.autograd.grad((found * factor).sum(), students)

    expected = torch.stack(
        [
            layer_losses(s, t, None, weights[:, n], **terms.arguments())
            for n, (s, t) in enumerate(zip(students, teachers, strict=True))
        ]
    )
    wanted = torch.autograd.grad((expected * factor).sum(), students)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    for own, second, value in zip(gradients, again, wanted, strict=True):
        torch.testing.assert_close(own, value, **TOLERANCE)
        torch.testing.assert_close(second, value, **TOLERANCE)


def test_runs_end_where_shape_terms_or_numbers_change():
    from mimic_fast.kernels.engine import Layer

    def layer(width: int, *, power: float = 2.0) -> Layer:
        activation = randn(2, 3, width)
        return Layer(
            terms=Terms(power=power), target=Target(teacher=activation), activation=activation
        )

    layers = [layer(4), layer(4), layer(5), layer(5, power=1.0), layer(5, power=1.0)]

    assert runs(layers) == [(0, 2), (2, 3), (3, 5)]
    assert runs(layers[:2], [0, 2]) == [(0, 1), (1, 2)]


def test_stacked_rows_of_one_tensor_are_not_copied():
    rows = randn(3, 2, 4)

    assert stacked(list(rows)).data_ptr() == rows.data_ptr()
    assert torch.equal(stacked([rows[2], rows[0]]), rows[[2, 0]])
    assert torch.equal(stacked(list(rows)), rows)
