"""Whole steps on a GPU: the trunk, CUDA graphs, torch.compile, launches, waiting, memory."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mimic_fast import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device: run make test-gpu on one"
    ),
]

DEVICE = torch.device("cuda")
SHAPES = [(4, 197, 768), (4, 512, 7, 7)]
LAYERS = 4
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
# In a process of its own: the type checks of the test run cannot be traced.
COMPILED = """
import sys
import torch
from mimic_fast import ops

torch.manual_seed(0)
device = torch.device(sys.argv[1])
images, teacher = torch.randn(2, 4, 197, 384, device=device)
first, second = (torch.randn(2, 384, 384, device=device) / 20)
first, second = first.requires_grad_(), second.requires_grad_()
weights = torch.ones(2, 1, device=device)
for clone in ("none", "mse", "cosine"):
    def network(images, teacher):
        tokens = (images @ first).tanh()
        target = ops.Target(teacher=teacher)
        (losses,) = ops.layer_losses([tokens], [target], weights, clone=clone, prefix=1)
        return losses.sum() + (tokens @ second).square().mean()

    torch._dynamo.reset()
    expected = network(images, teacher)
    wanted = torch.autograd.grad(expected, (first, second))
    found = torch.compile(network, fullgraph=True)(images, teacher)
    gradients = torch.autograd.grad(found, (first, second))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)
    print(clone)
"""


@pytest.fixture(autouse=True)
def triton_path():
    with ops.force("triton"):
        yield


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@dataclass
class Layers:
    """Layers of one shape: attention losses, and with ``dense`` a cosine clone loss in the last."""

    students: list[Tensor]
    teachers: list[Tensor]
    weights: Tensor
    dense: bool

    def step(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Losses, and gradients to which a later layer adds."""
        mapped = self.teachers[:-1] if self.dense else self.teachers
        targets = [ops.Target(power=power) for power in ops.power_maps(mapped)]
        terms = [ops.Terms()] * len(mapped)
        if self.dense:
            targets.append(ops.Target(teacher=self.teachers[-1]))
            terms.append(ops.Terms(clone="cosine"))
        taps = ops.tapped_losses(
            self.weights,
            targets,
            terms,
            images=self.students[0].shape[0],
            like=self.students[0],
        )
        trunks = [taps.tap(n, s.view_as(s)) for n, s in enumerate(self.students)]
        losses = torch.stack(list(taps.losses()))
        later = torch.stack([trunk[:1].float().sum() for trunk in trunks]).sum()
        return losses.detach(), torch.autograd.grad(losses.sum() + later, self.students)

    def doubled(self) -> "Layers":
        """The same in float64."""
        return Layers(
            [student.detach().double().requires_grad_() for student in self.students],
            [teacher.double() for teacher in self.teachers],
            self.weights.double(),
            self.dense,
        )


def layers_of(
    shape: tuple[int, ...], dtype: torch.dtype, *, count: int = LAYERS, dense: bool = True
) -> Layers:
    noise = [randn(*shape, seed=100 + n, dtype=torch.float32) for n in range(count)]
    students = [randn(*shape, seed=n, dtype=dtype) for n in range(count)]
    teachers = [(s.float() + n).to(dtype) for s, n in zip(students, noise, strict=True)]
    # so large that no gradient falls below float16's normal numbers
    weights = torch.full((2, count), 1e6 / shape[0], device=DEVICE)
    return Layers([student.requires_grad_() for student in students], teachers, weights, dense)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.isfinite().all()
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_in_the_trunk_equal_those_of_the_reference(shape, dtype):
    case = layers_of(shape, dtype)

    losses, gradients = case.step()

    with ops.force("reference"):
        expected, wanted = case.doubled().step()
    assert_close(losses, expected, 1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert_close(gradient, want, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_is_replayed_by_a_cuda_graph(shape):
    case, other = (layers_of(shape, torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        for student in other.students:
            student.mul_(-0.5).add_(1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            case.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses, gradients = case.step()

    with torch.no_grad():
        for student, new in zip(case.students, other.students, strict=True):
            student.copy_(new)
    graph.replay()

    expected, wanted = other.step()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradients, wanted)


def test_compiled_network_has_the_losses_and_gradients_of_the_eager_one():
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, DEVICE.type], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["none", "mse", "cosine"]


def test_layers_take_two_launches_more_than_there_are_and_never_wait_for_the_device():
    case = layers_of(SHAPES[0], torch.bfloat16, dense=False)
    case.step()
    torch.cuda.synchronize()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()

    names = [event.name for event in profiler.events() or ()]
    assert sum(name.startswith(("tokens_", "planes_")) for name in names) == LAYERS + 2


def test_extra_memory_in_the_trunk_is_sixteen_bytes_a_token():
    case = layers_of((32, 197, 768), torch.bfloat16, count=1)

    def bare() -> None:
        trunk = case.students[0].view_as(case.students[0])
        torch.autograd.grad(trunk[:1].float().sum(), case.students)

    rounded = 16 * 512  # the allocator gives out blocks of 512 bytes
    assert peak(case.step) - peak(bare) <= 16 * 32 * 197 + rounded


def peak(call: Callable[[], object]) -> int:
    """Bytes that a call has allocated at most."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
