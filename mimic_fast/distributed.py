"""Process start-up checks and the collectives a run needs; one process runs the same code."""

import signal
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mimic_fast.config import OptimSettings, RunSettings
from mimic_fast.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """Where this process stands among all of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


SINGLE = Processes(rank=0, world=1, device=torch.device("cpu"))


def start(
    run: RunSettings, optim: OptimSettings, *, expected_world: int
) -> "tuple[Accelerator, Processes]":
    """Starts Accelerate and proves that what was asked for is what runs.

    Args:
        run: Device.
        optim: Precision.
        expected_world: Processes the launcher started (its WORLD_SIZE), read by the caller.

    Raises:
        UsageError: If the device is not there, or Accelerate runs another number of processes,
            device or precision than asked for (it can do so silently).
    """
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import InitProcessGroupKwargs
    from accelerate.utils.dataclasses import KwargsHandler

    cuda = torch.cuda.is_available()
    if run.device == "cuda" and not cuda:
        raise UsageError("run.device is 'cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    on_cpu = run.device == "cpu" or not cuda
    precision = "bf16" if optim.precision == "bf16" else "no"
    launched = dist.is_torchelastic_launched()
    handlers: list[KwargsHandler] = []
    if on_cpu and launched:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    try:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=handlers)
    except ValueError as error:  # it holds on to the first precision and device of a Python process
        raise UsageError(
            f"optim.precision {optim.precision!r} or run.device {run.device!r} cannot run: {error}"
        ) from None
    # torchrun makes a process group even of one process.
    kinds = {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if expected_world == 1:
        kinds.add(DistributedType.NO)
    if accelerator.num_processes != expected_world or accelerator.distributed_type not in kinds:
        raise UsageError(
            f"the launcher started {expected_world} processes but Accelerate runs "
            f"{accelerator.num_processes} ({accelerator.distributed_type.value}); use torchrun"
        )
    if (accelerator.device.type == "cpu") != on_cpu:
        raise UsageError(
            f"run.device {run.device!r} was asked for but {accelerator.device} runs; "
            "unset ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE"
        )
    if accelerator.mixed_precision != precision:
        raise UsageError(
            f"precision {precision!r} was asked for but {accelerator.mixed_precision!r} runs; "
            "unset ACCELERATE_MIXED_PRECISION"
        )
    if optim.tf32 and on_cpu:
        warnings.warn("optim.tf32 is ignored: a CPU has no TF32", stacklevel=2)
    torch.backends.cuda.matmul.allow_tf32 = optim.tf32
    torch.backends.cudnn.allow_tf32 = optim.tf32
    return accelerator, Processes(
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
    )


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
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class _GatherWithGradient(torch.autograd.Function):
    """Concatenation over processes whose backward adds what every process did with these rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rank: int, world: int) -> Tensor:
        ctx.rows = slice(rank * tensor.shape[0], (rank + 1) * tensor.shape[0])
        parts = [torch.empty_like(tensor) for _ in range(world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total[ctx.rows], None, None


def gather_with_gradient(
    tensor: Float[Tensor, "row *rest"], processes: Processes
) -> Float[Tensor, "all_rows *rest"]:
    """Rows of all processes in rank order, differentiable; every process brings as many rows.

    Under DDP, which averages gradients over processes, the mean over processes of a loss computed
    from the gathered rows has exactly the gradient of that mean.
    """
    if processes.world == 1:
        return tensor
    return _GatherWithGradient.apply(tensor, processes.rank, processes.world)  # pyright: ignore[reportReturnType]


def sum_with_gradient(tensor: Tensor, processes: Processes) -> Tensor:
    """Sum over processes, differentiable."""
    if processes.world == 1:
        return tensor
    return _SumWithGradient.apply(tensor)  # pyright: ignore[reportReturnType]


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
