"""Steps of the training loop on several processes, timed in pairs with and without all-reduces.

Every step is the product's own, from the next batch to the flushed log, driven as ``train`` drives
it. Without synchronization it runs inside DistributedDataParallel's ``no_sync``: all else is the
same, the small collectives of every step (stop flag, log) included, so that a pair differs by what
the gradients' way costs and nothing else.
"""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from e2e_setup import Setup
from measure import Timing, interleaved
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mimic_fast import training
from mimic_fast.batchnorm import synchronize_batchnorm
from mimic_fast.data.loader import Batch, Loader, TrainingImages
from mimic_fast.data.prefetch import Prefetched
from mimic_fast.distributed import Processes, all_gather_rows

if TYPE_CHECKING:
    from accelerate import Accelerator

SYNCHRONIZED, LOCAL, ALONE = "synchronized BatchNorm", "local BatchNorm", "one process alone"
# Weights of processes drift apart where gradients stay at home: too slowly to change any work.
_RATE = 1e-6
_SMALL = 1 << 22  # bytes that one round of a small all-reduce sends in all
_MOST_CALLS = 100


@dataclass(kw_only=True, slots=True)
class Arm:
    """A training run that is advanced step by step.

    Args:
        loop: The product's.
        loader: Its images.
        batches: Of this process.
        step: The next one.
    """

    loop: training._Loop
    loader: Loader
    batches: Prefetched[Batch]
    step: int = 0

    @property
    def module(self) -> DistributedDataParallel:
        """What the engine made of the student."""
        module = self.loop.engine.module
        assert isinstance(module, DistributedDataParallel)
        return module


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """What the rounds took; all of them by round.

    Args:
        world: Processes.
        synchronized: By arm: slowest process's seconds, CPU seconds as a mean over processes.
        local: The same without synchronization.
        backward: By arm: seconds of the backward pass without synchronization.
        alone: One process, the others waiting.
        buckets: By arm: bytes of the buckets in the order in which they are sent.
    """

    world: int
    synchronized: dict[str, Timing] = field(default_factory=dict)
    local: dict[str, Timing] = field(default_factory=dict)
    backward: dict[str, tuple[float, ...]] = field(default_factory=dict)
    alone: Timing
    buckets: dict[str, tuple[float, ...]] = field(default_factory=dict)


def timed_pairs(
    setup: Setup,
    accelerator: "Accelerator",
    processes: Processes,
    *,
    pairs: int,
    warmup: int,
    report: Callable[[str], None],
) -> Pairs:
    """Times ``pairs`` pairs of both arms and as many steps of one process alone.

    Every round has a pair of each arm and a step alone, in random order; in a pair, too, chance
    decides what comes first.

    Args:
        setup: Encoders and images; its batch is that of one process.
        accelerator: Of the run.
        processes: All of them call.
        pairs: Timed ones.
        warmup: Rounds before them.
        report: Told one line a round.
    """
    whole = replace(setup, batch_size=setup.batch_size * processes.world)
    arms = {
        SYNCHRONIZED: _arm(whole, accelerator, processes, synchronized=True),
        LOCAL: _arm(whole, accelerator, processes, synchronized=False),
    }
    single = Processes(rank=0, world=1, device=processes.device)
    alone = _arm(setup, accelerator, single, synchronized=False)
    chance = np.random.default_rng(setup.seed)  # the same in every process
    table = torch.full((pairs, 2 * len(arms) + 1, 3), torch.nan, dtype=torch.float64)
    gc.collect()
    gc.freeze()  # each timed step begins with a collection: not of what was there before
    try:
        for number in range(-warmup, pairs):
            found = _round(arms, alone, chance, processes)
            if number >= 0:
                table[number] = found
            report(_line(found, f"pair {number + 1}/{pairs}"))
    finally:
        gc.unfreeze()
        for arm in (*arms.values(), alone):
            arm.batches.close()
    return _pairs(_of_all(table, processes), arms, world=processes.world)


def timed_all_reduces(
    sizes: Sequence[int], processes: Processes, *, rounds: int
) -> dict[int, Timing]:
    """Seconds of an all-reduce of float32 by its bytes, nothing else running."""
    buffers = {str(size): torch.zeros(size // 4) for size in sizes}
    timings = interleaved(
        {name: lambda buffer=buffer: dist.all_reduce(buffer) for name, buffer in buffers.items()},
        rounds=rounds,
        warmup=1,
        calls={str(size): max(1, min(_MOST_CALLS, _SMALL // size)) for size in sizes},
        clock=_together,
    )
    columns = [[t.wall, t.cpu, [0.0] * rounds] for t in timings.values()]
    table = torch.tensor(columns, dtype=torch.float64).permute(2, 0, 1)
    found = _of_all(table.contiguous(), processes)
    return {size: _timing(found[:, index]) for index, size in enumerate(sizes)}


def _arm(
    setup: Setup, accelerator: "Accelerator", processes: Processes, *, synchronized: bool
) -> Arm:
    settings = setup.settings("hardened")
    settings = settings.model_copy(
        update={"optim": settings.optim.model_copy(update={"lr": _RATE})}
    )
    student = setup.student(settings)
    if synchronized:
        synchronize_batchnorm(student, processes)
    task = training.Task(
        student=student,
        teacher=setup.teacher_taps(),
        layer_weights=setup.layer_weights,
        images=TrainingImages(squares=setup.pool),
    )
    loop = training._Loop(task, settings, accelerator, processes)
    loader = Loader(task.images, settings=settings, image_size=loop.image_size, processes=processes)
    return Arm(loop=loop, loader=loader, batches=loader.batches(0, loop.total_steps))


def _round(
    arms: dict[str, Arm], alone: Arm, chance: np.random.Generator, processes: Processes
) -> Tensor:
    """Wall, CPU, backward seconds ``[arm with, arm without, ..., alone]``; NaN: not here."""
    found = torch.full((2 * len(arms) + 1, 3), torch.nan, dtype=torch.float64)
    members = list(arms.values())
    for place in chance.permutation(len(arms) + 1).tolist():
        if place == len(arms):
            _all_ready()
            if processes.is_main:
                found[-1] = _step(alone, synchronized=False)
            continue  # the others wait where the next step begins
        for without in chance.permutation(2).tolist():
            _all_ready()
            found[2 * place + without] = _step(members[place], synchronized=not without)
    _all_ready()
    return found


def _all_ready() -> None:
    """Processes begin a step together, none with another step's garbage."""
    gc.collect()
    dist.barrier()


def _step(arm: Arm, *, synchronized: bool) -> Tensor:
    """One step as ``training._run_steps`` has it: seconds on the clock, of CPU, of backward."""
    loop = arm.loop
    wall, cpu = time.perf_counter(), time.process_time()
    with nullcontext() if synchronized else arm.module.no_sync():
        loop.clock.begin()
        with loop.clock.section("data"):
            batch = next(arm.batches)
        loop.step(arm.step, batch, stop=False)
        loop.clock.step_done()
        loop.flush(arm.loader, last=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    arm.step += 1
    backward = loop.log.rows[-1]["time"]["backward"] if loop.log.rows else torch.nan
    return torch.tensor([wall, cpu, backward], dtype=torch.float64)


def _together(candidate: Callable[[], object], calls: int) -> tuple[float, float]:
    """A clock that all processes start at once."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        candidate()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def _of_all(table: Tensor, processes: Processes) -> Tensor:
    """Largest wall time and mean of the others over the processes that have one."""
    tables = all_gather_rows(table[None], processes)
    slowest = tables[..., 0].nan_to_num(-torch.inf).amax(0)
    return torch.cat([slowest[..., None], tables[..., 1:].nanmean(0)], dim=-1)


def _pairs(table: Tensor, arms: dict[str, Arm], *, world: int) -> Pairs:
    found = Pairs(world=world, alone=_timing(table[:, -1]))
    for index, (name, arm) in enumerate(arms.items()):
        found.synchronized[name] = _timing(table[:, 2 * index])
        found.local[name] = _timing(table[:, 2 * index + 1])
        found.backward[name] = tuple(table[:, 2 * index + 1, 2].tolist())
        found.buckets[name] = _buckets(arm.module)
    return found


def _timing(table: Tensor) -> Timing:
    return Timing(wall=tuple(table[:, 0].tolist()), cpu=tuple(table[:, 1].tolist()))


def _buckets(module: DistributedDataParallel) -> tuple[float, ...]:
    """As DistributedDataParallel cut them after its first backward pass."""
    sizes = str(module._get_ddp_logging_data()["rebuilt_bucket_sizes"])
    return tuple(float(size) for size in sizes.split(","))


def _line(found: Tensor, what: str) -> str:
    seconds = ", ".join(f"{value:.3f}" for value in found[:, 0].tolist())
    return f"{what}: {seconds} s (with and without, each arm; alone)"
