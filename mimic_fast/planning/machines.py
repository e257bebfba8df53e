"""Where a recipe is to run: GPUs, their memory, and what is known of their speed."""

from dataclasses import dataclass

from mimic_fast.config import OptimSettings
from mimic_fast.errors import UsageError
from mimic_fast.planning.gpus import find_gpu
from mimic_fast.planning.sizes import parse_bytes
from mimic_fast.planning.timing import NODE, Speed


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """Where a recipe is to run.

    Args:
        gpus: Processes, one a GPU.
        memory: Of each, bytes.
        speed: None: no time is predicted.
    """

    gpus: int
    memory: int
    speed: Speed | None = None


def machines_of(
    optim: OptimSettings,
    *,
    gpus: int,
    memory: str | None,
    gpu: str | None,
    peak_tflops: float | None,
    bandwidth: float | None,
) -> Machines:
    """What was given, over what the table says of the GPU.

    Args:
        optim: The precision decides which throughput counts.
        gpus: Processes, one a GPU; up to eight share a node.
        memory: Of each, with its unit.
        gpu: Name in the table.
        peak_tflops: TFLOP/s.
        bandwidth: GB/s in one direction.

    Raises:
        UsageError: If the memory is not known, or a value is not valid.
    """
    known = None if gpu is None else find_gpu(gpu)
    if memory is None and known is None:
        raise UsageError("how much memory? Give --memory, as in 80GB, or --gpu, as in H100")
    if known is not None:
        peak_tflops = peak_tflops or known.tflops(optim.precision, tf32=optim.tf32)
        bandwidth = bandwidth or (known.link if gpus <= NODE else known.network)
    speed = None if peak_tflops is None else Speed(tflops=peak_tflops, bandwidth=bandwidth)
    size = parse_bytes(memory) if memory is not None else 0
    return Machines(gpus=gpus, memory=size or (known.memory if known else 0), speed=speed)
