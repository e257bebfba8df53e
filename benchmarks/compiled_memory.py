"""Memory that the losses hold under torch.compile, from what PyTorch's profiler saw allocated.

A dispatch mode does not see what Inductor's code allocates, and torch.compile refuses to run inside
one; for eager code both trackers agree. The kernels are those of the CPU, which allocate nothing
but what the operators return.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from loss_peers import ATTENTION, Dense, Problem, later, nad_loss, problem
from measure import Case, Machine, Row, single_row
from torch import Tensor

from mimic_fast import ops
from mimic_fast.kernels import reference

DENSE: tuple[Dense, ...] = ("mse", "cosine")


def compiled_memory_rows(shape: str, *, machine: Machine) -> list[Row]:
    """Memory of a whole compiled step, losses and trunk, and what it is more than the trunk's."""
    sizes = [int(size) for size in shape.split("x")]
    given = problem(sizes, dtype=torch.bfloat16, device="cpu", trunk=True)
    base = peak_allocated(_compiled(_bare, given))
    rows: list[Row] = []
    for dense in DENSE:
        for impl, loss in (("mimic_fast, compiled form", _our_loss), ("compiled NAD", nad_loss)):
            peak = peak_allocated(_compiled(partial(_with_later, loss, dense), given))
            case = Case(
                op="traffic",
                impl=impl,
                mode=f"mid layer, {dense}",
                shape=shape,
                dtype="bfloat16",
            )
            rows += memory_rows(case, peak, base, given, machine)
    return rows


def memory_rows(case: Case, peak: int, base: int, given: Problem, machine: Machine) -> list[Row]:
    """Most bytes held at once; and how many more than the ``base`` of the step without losses."""
    batch, places = reference.positions(given.student).shape[:2]
    size, extra = given.student.nbytes, peak - base
    return [
        single_row(case, "peak memory", "e", peak / size, machine=machine),
        single_row(case, "extra memory", "e", extra / size, machine=machine),
        single_row(case, "extra a position", "bytes", extra / (batch * places), machine=machine),
    ]


def peak_allocated(call: Callable[[], object]) -> int:
    """Bytes that were allocated at once during a call and had not been before."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    live = peak = 0
    events: list[Any] = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def _compiled(step: Callable[[Tensor, Tensor], Tensor], given: Problem) -> Callable[[], object]:
    """Forward and backward of a step, compiled by a first call."""
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False)

    def run() -> object:
        return torch.autograd.grad(compiled(given.student, given.teacher), given.student)

    run()
    return run


def _with_later(
    loss: Callable[..., Tensor], dense: Dense, student: Tensor, teacher: Tensor
) -> Tensor:
    return loss(student, teacher, dense=dense) + later(student)


def _bare(student: Tensor, teacher: Tensor) -> Tensor:
    return later(student)


def _our_loss(student: Tensor, teacher: Tensor, *, dense: Dense) -> Tensor:
    weights = torch.tensor([[ATTENTION], [1.0]])
    (losses,) = ops.layer_losses([student], [ops.Target(teacher=teacher)], weights, clone=dense)
    return losses.sum()
