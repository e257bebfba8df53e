"""Published figures of GPUs: what bounds a forecast of time, never what a run will reach.

Dense throughput: vendors print twice as much for matrices with structured zeros. ``link`` is what
one GPU sends to its neighbors in the node in one direction (vendors print both directions added),
``network`` what reaches it from other nodes in the vendor's own servers.
"""

import difflib
from dataclasses import dataclass

from mimic_fast.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU.

    Args:
        name: As ``--gpu`` takes it.
        memory: Bytes, as the vendor names them (GB).
        bf16: Dense bfloat16 or float16 products with float32 sums, TFLOP/s.
        tf32: Dense TF32 products, TFLOP/s.
        fp32: Float32 without tensor cores, TFLOP/s.
        link: To the other GPUs of its node, GB/s in one direction.
        network: To other nodes, GB/s in one direction.
    """

    name: str
    memory: int
    bf16: float
    tf32: float
    fp32: float
    link: float
    network: float

    def tflops(self, precision: str, *, tf32: bool) -> float | None:
        """What ``optim.precision`` can reach at most; None where no figure is kept (fp64)."""
        if precision in ("bf16", "fp16"):
            return self.bf16
        if precision == "fp64":
            return None
        return self.tf32 if tf32 else self.fp32


def _gpu(name: str, memory: int, *figures: float) -> Gpu:
    bf16, tf32, fp32, link, network = figures
    return Gpu(
        name=name,
        memory=memory * 10**9,
        bf16=bf16,
        tf32=tf32,
        fp32=fp32,
        link=link,
        network=network,
    )


GPUS = (
    # NVIDIA A100 data sheet (SXM): 312 bf16, 156 TF32, 19.5 FP32; NVLink 3 600 GB/s both ways;
    # DGX A100: a 200 Gb/s adapter a GPU.
    _gpu("A100-40GB", 40, 312.0, 156.0, 19.5, 300.0, 25.0),
    _gpu("A100", 80, 312.0, 156.0, 19.5, 300.0, 25.0),
    # NVIDIA H100 data sheet (SXM): 1,979 bf16 and 989 TF32 with sparsity, 67 FP32; NVLink 4
    # 900 GB/s both ways; DGX H100: a 400 Gb/s adapter a GPU.
    _gpu("H100", 80, 989.0, 494.0, 67.0, 450.0, 50.0),
    # The same sheet, PCIe: 1,513 and 756 with sparsity, 51 FP32; PCIe 5 x16 128 GB/s both ways.
    _gpu("H100-PCIe", 80, 756.0, 378.0, 51.0, 64.0, 25.0),
    # NVIDIA H200 data sheet (SXM): as H100, 141 GB.
    _gpu("H200", 141, 989.0, 494.0, 67.0, 450.0, 50.0),
    # NVIDIA DGX B200 data sheet: 8 GPUs with 1,440 GB, 72 PFLOP/s FP8 with sparsity, of which bf16
    # dense is a quarter; NVLink 5 1.8 TB/s both ways; a 400 Gb/s adapter a GPU.
    _gpu("B200", 180, 2250.0, 1125.0, 75.0, 900.0, 50.0),
    # NVIDIA L4 data sheet: 242 bf16 and 120 TF32 with sparsity, 30.3 FP32; PCIe 4 x16 64 GB/s.
    _gpu("L4", 24, 121.0, 60.0, 30.3, 32.0, 12.5),
    # NVIDIA L40S data sheet: 362 bf16 and 183 TF32 dense, 91.6 FP32; PCIe 4 x16 64 GB/s.
    _gpu("L40S", 48, 362.0, 183.0, 91.6, 32.0, 25.0),
    # AMD Instinct MI300X data sheet: 1,307 bf16 and 653.7 TF32 dense, 163.4 FP32 (vector); seven
    # Infinity Fabric links of 64 GB/s each way.
    _gpu("MI300X", 192, 1307.0, 653.0, 163.4, 448.0, 50.0),
)


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UsageError: If the table has none.
    """
    known = {gpu.name.lower(): gpu for gpu in GPUS}
    if name.lower() not in known:
        names = [gpu.name for gpu in GPUS]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0)
        raise UsageError(
            f"unknown GPU {name!r}; did you mean {near[0]!r}? Known: {', '.join(names)}. For "
            "others give --memory, --peak-tflops and --bandwidth"
        )
    return known[name.lower()]
