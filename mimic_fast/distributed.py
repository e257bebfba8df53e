"""Process start-up checks and the collectives a run needs; one process runs the same code."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from mimic_fast.config import OptimSettings, RunSettings
from mimic_fast.deepspeed_config import deepspeed_config, zero_stage
from mimic_fast.engine_rules import why_not
from mimic_fast.errors import UsageError
from mimic_fast.precision import check_precision
from mimic_fast.step_clock import StepClock

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """Where this process stands among all of the run."""

    rank: int
    world: int
    device: torch.device
    clock: StepClock | None = field(default=None, compare=False, repr=False)  # of its steps

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def communicating(self) -> AbstractContextManager[object]:
        """Surrounds what waits for other processes, so that a step's clock knows it as that."""
        return nullcontext() if self.clock is None else self.clock.section("communication")


# Set by `accelerate launch` from its own configuration; the value that changes nothing. DeepSpeed's
# is not here: Accelerate sets it by itself.
_ACCELERATES_OWN = {
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
    "ACCELERATE_DYNAMO_BACKEND": "no",
}

SINGLE = Processes(rank=0, world=1, device=torch.device("cpu"))


def device_of(run: RunSettings) -> torch.device:
    """Where one process computes: on the GPU if there is one, unless the settings say otherwise.

    Raises:
        UsageError: If a GPU was asked for and none is visible.
    """
    cuda = torch.cuda.is_available()
    if run.device == "cuda" and not cuda:
        raise UsageError("run.device is 'cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    return torch.device("cuda" if cuda and run.device != "cpu" else "cpu")


def start(
    run: RunSettings, optim: OptimSettings, *, expected_world: int
) -> "tuple[Accelerator, Processes]":
    """Starts Accelerate and proves that what was asked for is what runs.

    Args:
        run: Device, engine.
        optim: Precision.
        expected_world: Processes the launcher started (its WORLD_SIZE), read by the caller.

    Raises:
        UsageError: If the device or engine is not there, or Accelerate runs another number of
            processes, engine, device or precision than asked for (it can do so silently).
    """
    on_cpu = device_of(run).type == "cpu"
    _check_engine(run, optim)
    accelerator = _accelerator(run, optim, on_cpu=on_cpu, world=expected_world)
    kind, running = accelerator.distributed_type.value, accelerator.num_processes
    if running != expected_world:
        raise UsageError(
            f"the launcher started {expected_world} processes but Accelerate runs {running} "
            f"({kind}); use torchrun"
        )
    if kind not in _kinds(run.engine, expected_world):
        raise UsageError(
            f"engine {run.engine} was asked for but Accelerate runs {kind}; choose the engine in "
            "the recipe (run.engine), not in Accelerate's configuration"
        )
    if (accelerator.device.type == "cpu") != on_cpu:
        raise UsageError(
            f"run.device {run.device!r} was asked for but {accelerator.device} runs; "
            "unset ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE"
        )
    if accelerator.mixed_precision != "no":
        raise UsageError(
            f"Accelerate runs in {accelerator.mixed_precision!r} of its own; choose the precision "
            "in the recipe (optim.precision) and unset ACCELERATE_MIXED_PRECISION"
        )
    check_precision(optim.precision, accelerator.device)
    if optim.tf32 and on_cpu:
        warnings.warn("optim.tf32 is ignored: a CPU has no TF32", stacklevel=2)
    torch.backends.cuda.matmul.allow_tf32 = optim.tf32
    torch.backends.cudnn.allow_tf32 = optim.tf32
    return accelerator, Processes(
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
        clock=StepClock(accelerator.device),
    )


def _check_engine(run: RunSettings, optim: OptimSettings) -> None:
    """What can be said before any process group exists."""
    for name, harmless in _ACCELERATES_OWN.items():
        value = os.environ.get(name, harmless)
        if value.lower() not in {harmless, "0", ""}:
            raise UsageError(
                f"{name}={value} makes Accelerate do what the recipe decides: choose run.engine "
                f"and optim.compile there, and unset {name}"
            )
    hindrance = why_not(run.engine, run, optim)
    if hindrance is not None:
        raise UsageError(f"run.engine {run.engine!r} {hindrance[0]}; {hindrance[1]}")
    if run.engine != "ddp" and not dist.is_initialized() and "RANK" not in os.environ:
        raise UsageError(
            f"run.engine {run.engine!r} cuts the student over processes and needs a launcher, even "
            "for one: torchrun --nproc-per-node=N -m mimic_fast ..."
        )


def _accelerator(
    run: RunSettings, optim: OptimSettings, *, on_cpu: bool, world: int
) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.utils import (
        DeepSpeedPlugin,
        DistributedDataParallelKwargs,
        InitProcessGroupKwargs,
    )
    from accelerate.utils.dataclasses import KwargsHandler

    # Gradients lie in the buckets that are sent: no copies, and not twice in memory.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    handlers: list[KwargsHandler] = [ddp]
    if on_cpu and ("RANK" in os.environ or dist.is_initialized()):
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    plugin = None
    if zero_stage(run.engine):
        _prepare_deepspeed(on_cpu=on_cpu)
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(run, optim, world=world))
    # On a CPU Accelerate ignores DeepSpeed when told that it is one, and finds out by itself.
    told = on_cpu if plugin is None else None
    try:
        return Accelerator(
            cpu=bool(told),
            mixed_precision="no",
            kwargs_handlers=handlers,
            deepspeed_plugin=plugin,
            gradient_accumulation_steps=optim.accumulate,
        )
    except (ValueError, NotImplementedError) as error:  # it holds on to the first of its kind
        raise UsageError(
            f"run.engine {run.engine!r} on run.device {run.device!r} cannot run: {error}"
        ) from None


def _prepare_deepspeed(*, on_cpu: bool) -> None:
    """What it reads from the environment when it is imported."""
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It builds its CPU communication with ninja, which lies beside this Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its own use of older names of torch is nothing a user could change.
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)


def _kinds(engine: str, world: int) -> set[str]:
    """Accelerate's names for what may run; its FSDP is not used, see ``engines/fsdp2.py``."""
    if zero_stage(engine):
        return {"DEEPSPEED"}
    kinds = {"MULTI_CPU", "MULTI_GPU"}
    # torchrun makes a process group even of one process.
    return kinds | {"NO"} if world == 1 else kinds


def restarted(processes: Processes) -> bool:
    """Whether torchrun has started this run again after a process was lost; collective.

    Agents of different nodes count differently, so one of them is enough.
    """
    return any_process(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0, processes)


def all_gather_rows(tensor: Tensor, processes: Processes) -> Tensor:
    """Concatenates every process's rows in rank order; first dimensions may differ. No gradient."""
    if processes.world == 1:
        return tensor
    counts: list[int] = [0] * processes.world
    dist.all_gather_object(counts, tensor.shape[0])
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be cut over the processes, gathered; collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def broadcast_tensors(tensors: Sequence[Tensor], processes: Processes) -> list[Tensor]:
    """Process 0's tensors on every process; the others may pass an empty sequence."""
    if processes.world == 1:
        return list(tensors)
    shapes: list[Any] = [[(tuple(t.shape), t.dtype) for t in tensors]]
    dist.broadcast_object_list(shapes, src=0)
    result = []
    for index, (shape, dtype) in enumerate(shapes[0]):
        if processes.is_main:
            value = tensors[index].to(processes.device).contiguous()
        else:
            value = torch.empty(shape, dtype=dtype, device=processes.device)
        dist.broadcast(value, src=0)
        result.append(value)
    return result


def sum_counts(counts: Tensor, processes: Processes) -> Tensor:
    """Integer counts added over processes: exact, whatever the order."""
    if counts.is_floating_point():
        raise TypeError(f"counts must be integers, got {counts.dtype}")
    if processes.world > 1:
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts


def broadcast_json(value: Any, processes: Processes) -> Any:
    """Process 0's plain value on every process."""
    if processes.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_process(flag: bool, processes: Processes) -> bool:
    """Whether ``flag`` holds on at least one process: a decision all of them share."""
    if processes.world == 1:
        return flag
    value = torch.tensor(int(flag), device=processes.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def wait_for_all(processes: Processes) -> None:
    """Holds every process until all have come here."""
    if processes.world > 1:
        dist.barrier()


class _SumWithGradient(torch.autograd.Function):
    """All-reduced sum; the gradient of a sum used everywhere is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return _summed(tensor, processes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.processes), None


class _GatherWithGradient(torch.autograd.Function):
    """Concatenation over processes whose backward adds what every process did with these rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, processes: Processes) -> Tensor:
        first = processes.rank * tensor.shape[0]
        ctx.rows, ctx.processes = slice(first, first + tensor.shape[0]), processes
        parts = [torch.empty_like(tensor) for _ in range(processes.world)]
        with processes.communicating():
            dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.processes)[ctx.rows], None


def _summed(tensor: Tensor, processes: Processes) -> Tensor:
    total = tensor.clone()
    with processes.communicating():
        dist.all_reduce(total)
    return total


def gather_with_gradient(
    tensor: Float[Tensor, "row *rest"], processes: Processes
) -> Float[Tensor, "all_rows *rest"]:
    """Rows of all processes in rank order, differentiable; every process brings as many rows.

    Under DDP, which averages gradients over processes, the mean over processes of a loss computed
    from the gathered rows has exactly the gradient of that mean.
    """
    if processes.world == 1:
        return tensor
    return _GatherWithGradient.apply(tensor, processes)  # pyright: ignore[reportReturnType]


def sum_with_gradient(tensor: Tensor, processes: Processes) -> Tensor:
    """Sum over processes, differentiable."""
    if processes.world == 1:
        return tensor
    return _SumWithGradient.apply(tensor, processes)  # pyright: ignore[reportReturnType]


class StopSignal:
    """Remembers SIGINT, SIGTERM and SIGUSR1; calling it tells whether one came.

    A second SIGINT is not caught, so that an impatient user can still leave at once.
    """

    def __init__(self) -> None:
        self._caught: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "signals are only caught in the main thread; this run cannot", stacklevel=2
            )
            return self
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self._caught is not None

    @property
    def name(self) -> str:
        """The signal's name, or an empty string."""
        return self._caught.name if self._caught else ""

    def _catch(self, number: int, _: FrameType | None) -> None:
        if self._caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught = signal.Signals(number)
