"""Blocks computed again or compiled: the same numbers, names and taps as without."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.data.loader import TrainingImages
from mimic_fast.distributed import start
from mimic_fast.encoders.blocks import blocks, checkpoint_blocks, compile_blocks
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import UsageError
from mimic_fast.step import Student
from mimic_fast.training import Task, train

T = TypeVar("T")

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="the inductor compiler needs a C++ compiler on a CPU",
)
COMPILERS_OWN = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")


@dataclass
class Outcome:
    """What two passes gave and left."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    drawn: Tensor = field(default_factory=lambda: torch.rand(3))  # what the generator gives next


@dataclass
class Heard:
    """Counts what it hears, and scales it, so that the gradient runs through it."""

    taps: list[int] = field(default_factory=list)

    def tap(self, index: int, activation: Tensor, *, prefix: int = 0) -> Tensor:
        self.taps.append(index)
        return activation * 1.5


def after_two_passes(model: TappedEncoder, images: Tensor) -> Outcome:
    """Training passes over other images each, all maps in the loss."""
    model.train()
    torch.manual_seed(3)
    outputs: list[Tensor] = []
    for batch in (images, images.flip(0) * 0.5):
        features, maps = model(batch)
        (features.square().mean() + sum(m.square().mean() for m in maps)).backward()
        outputs += [features.detach(), *(m.detach() for m in maps)]
    return Outcome(
        outputs=outputs,
        gradients={n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        buffers={name: buffer.clone() for name, buffer in model.named_buffers()},
    )


def assert_alike(found: Outcome, expected: Outcome, *, tolerance: float) -> None:
    near: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(found.outputs, expected.outputs, **near)
    torch.testing.assert_close(found.gradients, expected.gradients, **near)
    torch.testing.assert_close(found.buffers, expected.buffers, **near)
    assert torch.equal(found.drawn, expected.drawn)


def compiled(call: Callable[[], T]) -> tuple[T, int]:
    """What a call gives, and how many graphs the compiler made for it."""
    torch.compiler.reset()
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    result = call()
    return result, counts["unique_graphs"] - before


def passes_of(modules: list[nn.Module]) -> tuple[list[int], list[RemovableHandle]]:
    """How often something inside of them begins to run forward, by module."""
    counts = [0] * len(modules)

    def count(index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counts[index] += 1

        return hook

    inner = [next(module.children()) for module in modules]
    return counts, [m.register_forward_pre_hook(count(i)) for i, m in enumerate(inner)]


def test_blocks_are_stages_or_vit_blocks(tapped, resnet_spec, vit_spec):
    resnet, vit = tapped(resnet_spec, "layer2"), tapped(vit_spec, "blocks.1")

    net = resnet.encoder.backbone
    assert blocks(resnet) == [net.layer1, net.layer2, net.layer3, net.layer4]
    assert blocks(vit) == list(vit.encoder.backbone.blocks)


def test_blocks_of_an_unknown_structure_are_its_taps(resnet_spec):
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU())
    model = TappedEncoder(Encoder(resnet_spec, backbone, feature_dim=8), ("1",))

    assert blocks(model) == [backbone[1]]


def test_checkpointed_blocks_give_the_same_and_count_once(tapped, spec, images):
    plain = tapped(spec).double()
    model = copy.deepcopy(plain)
    checkpoint_blocks(model)
    counts, _ = passes_of(blocks(model))

    expected = after_two_passes(plain, images.double())
    found = after_two_passes(model, images.double())

    assert_alike(found, expected, tolerance=1e-12)
    assert counts == [4] * len(counts)  # each pass forward, and again in backward
    assert all(float(value.abs().max()) > 0 for value in expected.gradients.values())
    tracked = [name for name in expected.buffers if name.endswith("num_batches_tracked")]
    assert all(expected.buffers[name] == 2 for name in tracked)
    assert bool(tracked) == ("resnet" in spec.architecture)
    momenta = {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta <= {0.1}


def test_checkpointed_dropout_draws_the_same_again(tapped, vit_spec, images):
    arguments = {**vit_spec.arguments, "proj_drop_rate": 0.3, "drop_path_rate": 0.3}
    plain = tapped(vit_spec.model_copy(update={"arguments": arguments})).double()
    model = copy.deepcopy(plain)
    checkpoint_blocks(model)

    expected = after_two_passes(plain, images.double())

    assert_alike(after_two_passes(model, images.double()), expected, tolerance=1e-12)
    torch.manual_seed(4)
    assert not torch.equal(plain(images.double())[0], expected.outputs[0])  # it does draw


def test_checkpointed_blocks_without_gradients_run_once(tapped, spec, images):
    model = tapped(spec)
    expected = model(images)[0]
    checkpoint_blocks(model)
    counts, _ = passes_of(blocks(model))

    with torch.no_grad():
        found = model(images)[0]

    assert torch.equal(found, expected)
    assert counts == [1] * len(counts)


def test_taps_of_checkpointed_blocks_are_heard_once(tapped, spec, images):
    plain = tapped(spec)
    model = copy.deepcopy(plain)
    checkpoint_blocks(model)
    heard, other = Heard(), Heard()

    found, expected = model.listened(images, heard), plain.listened(images, other)
    found.square().sum().backward()
    expected.square().sum().backward()

    assert heard.taps == list(range(len(model.taps)))
    assert torch.equal(found, expected)
    for parameter, like in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, like.grad)


@pytest.mark.parametrize(
    ("make", "setting"),
    [(checkpoint_blocks, "optim.activation_checkpointing"), (compile_blocks, "optim.compile")],
)
@pytest.mark.parametrize("tap", ["layer2.0", "layer2.0.conv1"])
def test_tap_inside_a_block_is_refused(tapped, resnet_spec, make, setting, tap):
    model = tapped(resnet_spec, "layer1", tap)

    with pytest.raises(UsageError, match=rf"tap '{tap}' lies inside a block and {setting}"):
        make(model)

    # And nothing has begun.
    assert not any("forward" in vars(block) for block in blocks(model))


@pytest.mark.parametrize("tap", ["conv1", "bn1", "layer4"])
def test_tap_outside_of_blocks_is_taken(tapped, resnet_spec, tap):
    checkpoint_blocks(tapped(resnet_spec, tap))


@pytest.mark.parametrize("make", [checkpoint_blocks, compile_blocks])
def test_names_and_states_stay(tapped, spec, make):
    plain, model = tapped(spec), tapped(spec, seed=1)
    modules = [name for name, _ in model.named_modules()]
    make(model)

    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == modules
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


@needs_compiler
@COMPILERS_OWN
def test_compiled_block_gives_the_same_features(resnet_spec, images):
    backbone = nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(3072, 8), nn.GELU()), nn.Linear(8, 4)
    )
    model = TappedEncoder(Encoder(resnet_spec, backbone, feature_dim=4), ("1",))
    with torch.no_grad():
        expected = model.encoder(images)
        compile_blocks(model)

        found, graphs = compiled(lambda: model.encoder(images))

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert graphs == 1


@needs_compiler
@COMPILERS_OWN
@pytest.mark.slow
def test_compiled_blocks_give_the_same(tapped, vit_spec, images):
    arguments = {**vit_spec.arguments, "depth": 2}
    plain = tapped(vit_spec.model_copy(update={"arguments": arguments}))
    model = copy.deepcopy(plain)
    compile_blocks(model)

    found, graphs = compiled(lambda: after_two_passes(model, images))

    assert_alike(found, after_two_passes(plain, images), tolerance=1e-5)
    assert graphs == 1  # equal blocks share it


def losses_of_two_steps(spec: EncoderSpec, **optim: Any) -> list[dict[str, float]]:
    """What a run logs; the third term of its loss needs a second view."""
    run = Settings.model_validate(
        {
            "optim": {"batch_size": 4, "lr": 0.01, "warmup_epochs": 0, "name": "sgd", **optim},
            "loss": {"contrastive": 0.5},
            "run": {"device": "cpu", "max_steps": 2},
        }
    )
    teacher, student = build_encoder(spec, seed=7), build_encoder(spec, seed=1)
    taps = default_taps(student)
    generator = torch.Generator().manual_seed(0)
    task = Task(
        student=Student(TappedEncoder(student, taps), projection=16, seed=1),
        teacher=TappedEncoder(teacher.requires_grad_(False), taps).eval(),
        layer_weights=(1000.0,) * len(taps),
        images=TrainingImages(
            squares=torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
        ),
    )
    logged: list[dict[str, float]] = []
    accelerator, processes = start(run.run, run.optim, expected_world=1)
    train(
        task,
        settings=run,
        accelerator=accelerator,
        processes=processes,
        report=lambda event: logged.append(dict(event.metrics)),
    )
    terms = ("loss", "clone", "attention", "contrastive", "grad_norm")
    return [{term: metrics[term] for term in terms} for metrics in logged]


@needs_compiler
@COMPILERS_OWN
@pytest.mark.slow
def test_run_with_compiled_blocks_has_the_losses_of_one_without(vit_spec):
    arguments = {**vit_spec.arguments, "depth": 2}
    spec = vit_spec.model_copy(update={"arguments": arguments})

    found, graphs = compiled(lambda: losses_of_two_steps(spec, compile=True))

    expected = losses_of_two_steps(spec)
    assert graphs == 2  # the student's and the teacher's
    assert len(found) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert expected[0]["loss"] != pytest.approx(expected[1]["loss"], rel=1e-2)  # it does train
