"""What bench_traffic.py counts on one shape: bytes moved, launches, memory held."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from compiled_memory import memory_rows
from loss_peers import (
    ATTENTION,
    Dense,
    Problem,
    at_loss,
    at_map,
    check,
    gradient_of,
    later,
    nad_loss,
    nad_map,
    ours,
    plain,
    problem,
)
from measure import Case, Machine, Row, single_row
from torch import Tensor

from mimic_fast import ops
from mimic_fast.kernels.traffic import AtenTraffic, LiveMemory, kernel_traffic

OURS = "mimic_fast triton"
LAYERS = 4
# What must be moved at least, in units of e: S and T read in the forward pass; S, T and the trunk's
# gradient read and the sum written in the backward pass. Attention needs no T, its map is there.
IDEAL = {
    "mid layer, mse": 6,
    "mid layer, cosine": 6,
    "mid layer, attention only": 4,
    "last layer, mse": 5,
    "last layer, cosine": 5,
    "map of the teacher": 1,
}
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """What one call moved and held.

    Args:
        moved: Bytes read and written, by our kernels and PyTorch's operators.
        kernels: Launches of ours.
        operators: Operators of PyTorch's that move something.
        peak: Bytes that were live at once and had not been before.
    """

    moved: int
    kernels: int
    operators: int
    peak: int


def traffic_rows(shape: str, *, machine: Machine) -> list[Row]:
    """Rows of every mode on one shape, bfloat16, and of a step of several layers.

    Raises:
        AssertionError: If a candidate does not compute what all are to compute.
    """
    sizes = [int(size) for size in shape.split("x")]
    rows: list[Row] = []
    for mode, (given, without, candidates) in modes(sizes).items():
        base = counted(without)
        size = given.student.nbytes
        for impl, candidate in candidates.items():
            found = counted(candidate)
            case = Case(op="traffic", impl=impl, mode=mode, shape=shape, dtype="bfloat16")
            moved = (found.moved - base.moved) / size
            launches = found.kernels + found.operators - base.operators
            rows += [
                single_row(case, "moved", "e", moved, machine=machine),
                single_row(case, "moved over ideal", "x", moved / IDEAL[mode], machine=machine),
                single_row(case, "launches", "", launches, machine=machine),
                *memory_rows(case, found.peak, base.peak, given, machine),
            ]
    return rows


def modes(sizes: list[int]) -> dict[str, tuple[Problem, Call, Mapping[str, Call]]]:
    """By mode: activations, the step without losses, and implementations, which were checked."""
    middle = problem(sizes, dtype=torch.bfloat16, device="cpu", trunk=True)
    last = problem(sizes, dtype=torch.bfloat16, device="cpu", trunk=False)
    with ops.force("triton"):
        (power,) = ops.power_maps([middle.teacher])
    maps = {"eager NAD": nad_map, "eager AT": at_map}
    alone = {
        name: plain(partial(_attention_only, make, make(middle.teacher)), middle, dense="mse")
        for name, make in maps.items()
    }
    target = ops.Target(power=power)
    teachers = [middle.teacher]
    bare, nothing = partial(_bare, middle), _nothing
    return {
        "mid layer, mse": (middle, bare, _dense(middle, "mse")),
        "mid layer, cosine": (middle, bare, _dense(middle, "cosine")),
        "mid layer, attention only": (
            middle,
            bare,
            {OURS: ours("triton", middle, dense="none", target=target), **alone},
        ),
        "last layer, mse": (last, nothing, _dense(last, "mse")),
        "last layer, cosine": (last, nothing, _dense(last, "cosine")),
        "map of the teacher": (
            last,
            nothing,
            {OURS: partial(_forced, ops.power_maps, teachers)}
            | {name: partial(make, middle.teacher) for name, make in maps.items()},
        ),
    }


def counted(call: Call) -> Counted:
    """Counts one call."""
    with (
        _cycles_collected_at_once(),
        kernel_traffic() as kernels,
        AtenTraffic() as operators,
        LiveMemory() as memory,
    ):
        call()
    return Counted(
        moved=operators.total + sum(kernel.total for kernel in kernels.values()),
        kernels=sum(kernel.launches for kernel in kernels.values()),
        operators=operators.operators,
        peak=memory.peak,
    )


def launch_rows(shape: str, *, machine: Machine) -> list[Row]:
    """Launches of a step with several layers of one shape, the teacher's side included."""
    sizes = [int(size) for size in shape.split("x")]
    layers = [
        problem(sizes, dtype=torch.bfloat16, device="cpu", trunk=True, seed=seed)
        for seed in range(LAYERS)
    ]
    base = counted(lambda: [_bare(layer) for layer in layers])
    mode = f"attention of {LAYERS} layers"
    rows = []
    for impl, step in (("eager NAD", _eager_step), (OURS, _our_step)):
        found = counted(partial(step, layers))
        case = Case(op="launches", impl=impl, mode=mode, shape=shape, dtype="bfloat16")
        rows += [
            single_row(case, "kernels of ours", "", found.kernels, machine=machine),
            single_row(
                case, "operators of PyTorch", "", found.operators - base.operators, machine=machine
            ),
        ]
    return rows


@contextmanager
def _cycles_collected_at_once() -> Iterator[None]:
    """Triton's interpreter leaves the tensors it was given in reference cycles, as no GPU would."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.collect()  # few objects are left to look through: full collections are quick, and made
    gc.set_threshold(1, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _dense(given: Problem, dense: Dense) -> dict[str, Call]:
    candidates = {
        OURS: ours("triton", given, dense=dense),
        "eager NAD": plain(nad_loss, given, dense=dense),
        "eager AT": plain(at_loss, given, dense=dense),
    }
    check(candidates, given, dense=dense)
    return {**candidates}


def _our_step(layers: list[Problem]) -> None:
    """Teacher's maps, all forward passes, all backward passes; attention only."""
    students = [layer.student for layer in layers]
    with ops.force("triton"):
        maps = ops.power_maps([layer.teacher for layer in layers])
        taps = ops.tapped_losses(
            torch.ones(2, len(layers)),
            [ops.Target(power=power) for power in maps],
            [ops.Terms()] * len(layers),
            images=students[0].shape[0],
            like=students[0],
        )
        trunks = [taps.tap(n, s.view_as(s)) for n, s in enumerate(students)]
        losses = torch.stack([loss.sum() for loss in taps.losses()]).sum()
        torch.autograd.grad(
            losses + torch.stack([later(trunk) for trunk in trunks]).sum(), students
        )


def _eager_step(layers: list[Problem]) -> None:
    for layer in layers:
        target = nad_map(layer.teacher)
        trunk = layer.student.view_as(layer.student)
        gradient_of(layer, trunk, _attention_only(nad_map, target, trunk, trunk, dense="mse"))


def _attention_only(
    make: Callable[[Tensor], Tensor], target: Tensor, student: Tensor, _: Tensor, *, dense: Dense
) -> Tensor:
    return ATTENTION * F.mse_loss(make(student), target)


def _forced(call: Callable[..., object], *arguments: object) -> object:
    with ops.force("triton"):
        return call(*arguments)


def _bare(given: Problem) -> None:
    """The same step without losses."""
    trunk = given.student.view_as(given.student)
    gradient_of(given, trunk, trunk.new_zeros(()))


def _nothing() -> None:
    pass
