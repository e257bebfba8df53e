"""Counted bytes and live memory: kernels whose traffic is known, and the eager losses."""

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mimic_fast.kernels.traffic import AtenTraffic, KernelTraffic, LiveMemory, kernel_traffic

EIGHT = tl.constexpr(8)
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled in this process"
)


@triton.jit
def doubled(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, 2 * x, mask=offs < size)


@triton.jit
def twice(x):
    return x + x


@triton.jit
def summed(x_ptr, scale_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = twice(tl.load(x_ptr + offs)) * tl.load(scale_ptr)
    tl.atomic_add(out_ptr + offs % 2, x, mask=offs < 6)


@interpreted
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_masked_lanes_move_nothing(dtype, width):
    x, out = torch.randn(37, dtype=dtype), torch.empty(37)

    with kernel_traffic() as counted:
        doubled[(5,)](x, out, 37, BLOCK=EIGHT)

    torch.testing.assert_close(out, 2 * x.float())
    assert counted == {"doubled": KernelTraffic(launches=1, loaded=37 * width, stored=37 * 4)}
    assert counted["doubled"].total == 37 * (width + 4)


@interpreted
def test_kernels_are_counted_by_name_with_scalars_and_atomics():
    x, scale, out = torch.ones(8), torch.full((1,), 3.0), torch.zeros(2)

    with kernel_traffic() as counted:
        summed[(1,)](x, scale, out, BLOCK=EIGHT)
        summed[(1,)](x, scale, out, BLOCK=EIGHT)
        doubled[(1,)](x, torch.empty(8), 8, BLOCK=EIGHT)

    assert out.tolist() == [36.0, 36.0]
    assert counted["summed"] == KernelTraffic(
        launches=2, loaded=2 * 4 * (8 + 1 + 6), stored=2 * 4 * 6
    )
    assert counted["doubled"].launches == 1


@interpreted
def test_nothing_is_counted_outside_the_block():
    x, out = torch.ones(8), torch.empty(8)

    with kernel_traffic() as counted:
        pass
    doubled[(1,)](x, out, 8, BLOCK=EIGHT)

    assert counted == {}


@interpreted
def test_what_the_interpreter_does_is_no_traffic_of_operators():
    x, out = torch.ones(8), torch.empty(8)

    with AtenTraffic() as counted, LiveMemory() as memory, kernel_traffic() as kernels:
        doubled[(1,)](x, out, 8, BLOCK=EIGHT)

    assert counted.total == 0
    assert memory.peak == 0
    assert kernels["doubled"].total == 64


def test_process_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)

    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before"), kernel_traffic():
        pass


@pytest.mark.parametrize(
    ("operator", "read", "written"),
    [
        (lambda x, y: x + y, 200, 100),
        (lambda x, y: x * 2, 100, 100),
        (lambda x, y: x.sum(), 100, 4),
        (lambda x, y: x.add_(y), 200, 100),
        (lambda x, y: x.copy_(y), 100, 100),
        (lambda x, y: x.zero_(), 0, 100),
        (lambda x, y: torch.zeros_like(x), 0, 100),
        (lambda x, y: torch.add(x, y, out=torch.empty(25)), 200, 100),
        (lambda x, y: x + y[:1].expand(25), 104, 100),
        (lambda x, y: x.to(torch.bfloat16), 100, 50),
        (lambda x, y: x.view(5, 5).T[1:].detach(), 0, 0),
        (lambda x, y: torch.empty_like(x), 0, 0),
        (lambda x, y: torch.cat([x, y]), 200, 200),
        (lambda x, y: x.dot(y).item(), 204, 4),
        (lambda x, y: torch.ops.aten._foreach_add_.Scalar([x, y], 1), 200, 200),
        (lambda x, y: x.copy_(x), 0, 0),
        (lambda x, y: x.contiguous().reshape(5, 5), 0, 0),
    ],
)
def test_operator_moves_what_it_reads_and_writes(operator, read, written):
    x, y = torch.randn(25), torch.randn(25)

    with AtenTraffic() as counted:
        operator(x, y)

    assert (counted.read, counted.written) == (read, written)
    assert bool(counted.operators) == bool(read + written)


def nad(tokens: Tensor) -> Tensor:
    """Attention map as a researcher writes it, after the authors' demo."""
    power = tokens.abs().pow(2).sum(dim=2)
    return power / (power.norm(dim=1, keepdim=True) + 1e-6)


def at(tokens: Tensor) -> Tensor:
    """Attention map as in Zagoruyko and Komodakis' code."""
    return F.normalize(tokens.pow(2).mean(dim=2))


def eager_step(attention_map, clone: str, student: Tensor, teacher: Tensor, trunk: Tensor) -> None:
    """Forward and backward of a middle layer, into which ``trunk`` flows from the layers above."""
    with torch.no_grad():
        target = attention_map(teacher)
    loss = (attention_map(student) - target).square().mean()
    if clone == "mse":
        loss = loss + F.mse_loss(student, teacher)
    if clone == "cosine":
        loss = loss - F.cosine_similarity(student, teacher, dim=2).mean()
    torch.autograd.backward([loss, student.view_as(student)], [None, trunk])


# In units of one activation's bytes.
@pytest.mark.parametrize(
    ("attention_map", "clone", "moved", "peak"),
    [
        (nad, "none", 24, 4),
        (nad, "mse", 32, 5),
        (nad, "cosine", 60, 6),
        (at, "none", 17, 4),
        (at, "mse", 25, 5),
        (at, "cosine", 53, 5),
    ],
)
def test_eager_losses_move_and_hold_what_the_formulas_say(attention_map, clone, moved, peak):
    shape = (2, 17, 768)
    student = torch.randn(shape, requires_grad=True)
    teacher, trunk = torch.randn(shape), torch.randn(shape)

    with AtenTraffic() as counted, LiveMemory() as memory:
        eager_step(attention_map, clone, student, teacher, trunk)

    assert counted.total / student.nbytes == pytest.approx(moved, abs=0.1)
    assert memory.peak / student.nbytes == pytest.approx(peak, abs=0.02)
    assert memory.live == student.nbytes  # the gradient


def test_peak_of_live_memory_is_what_the_profiler_of_pytorch_sees():
    shape = (2, 17, 768)
    student = torch.randn(shape, requires_grad=True)
    tensors = (student, torch.randn(shape), torch.randn(shape))
    with LiveMemory() as memory:
        eager_step(nad, "cosine", *tensors)
    student.grad = None
    gc.collect()

    with torch.profiler.profile(profile_memory=True) as profiler:
        eager_step(nad, "cosine", *tensors)

    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = profiler.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert memory.peak == pytest.approx(peak, rel=0.01)


def test_memory_is_live_until_the_last_view_is_gone():
    with LiveMemory() as memory:
        x = torch.ones(100)
        view = x[10:]
        other = x + 1
        del x
        assert memory.live == 800
        del view
        assert memory.live == 400
        del other

    assert memory.live == 0
    assert memory.peak == 800


def test_memory_from_before_does_not_count():
    x = torch.ones(100)

    with LiveMemory() as memory:
        x.add_(1)
        x.view(10, 10).detach()

    assert memory.peak == 0
