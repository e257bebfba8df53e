"""Time of a step: counted work over a share of the peak, and communication that work cannot hide.

An estimate of how recipes compare, not of a clock: shares are typical of well-tuned training, data
is assumed to arrive in time, and operations that wait for memory are in the shares.
"""

from dataclasses import dataclass

from mimic_fast.config import Settings
from mimic_fast.planning.counts import Counts
from mimic_fast.planning.flops import Work
from mimic_fast.planning.memory import Spread

# Shares of the peak. Convolutions: ResNet-50 in AMP, NHWC, on one A100 trains 2,600 images/s
# (github.com/huggingface/pytorch-image-models, issue 1491), at 24.5 GFLOP an image 64 of 312.
CONVOLUTION_SHARE = 0.20
# Products: ViTs train at 30-40 % of the bf16 peak in eager mode.
PRODUCT_SHARE = 0.35
LINK_SHARE = 0.80  # of a link's printed rate that collectives of large buffers reach
NODE = 8  # GPUs that share fast links


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What the machine can do.

    Args:
        tflops: Peak of the precision, TFLOP/s.
        bandwidth: Between two GPUs in one direction, GB/s; None: communication is left out.
    """

    tflops: float
    bandwidth: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one step of the optimizer.

    Args:
        compute: Forward and backward of all micro-batches.
        communication: In all, as if nothing else ran.
        exposed: Of it what computation does not hide.
    """

    compute: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        """Computation and what it does not hide."""
        return self.compute + self.exposed


def step_time(
    counts: Counts, settings: Settings, spread: Spread, speed: Speed, *, images: int
) -> StepTime:
    """One step: communication of the forward pass hides behind it, that of backward likewise."""
    parts, flops = settings.optim.accumulate, counts.flops
    forward = parts * images * _seconds(flops.forward, speed)
    backward = parts * images * _seconds(flops.backward, speed)
    if parts > 1 and settings.loss.contrastive > 0:
        # Projections of the whole share come first, from a pass of the student's two views more;
        # the teacher sees one.
        forward *= 5 / 3
    sent = _sent(counts, spread, parts)
    rate = (speed.bandwidth or 0.0) * 1e9 * LINK_SHARE
    with_forward, with_backward, after = (b / rate if rate else 0.0 for b in sent)
    exposed = max(0.0, with_forward - forward) + max(0.0, with_backward - backward) + after
    return StepTime(
        compute=forward + backward,
        communication=with_forward + with_backward + after,
        exposed=exposed,
    )


def _sent(counts: Counts, spread: Spread, parts: int) -> tuple[float, float, float]:
    """Bytes that each process sends with the forward pass, with backward, and after it.

    A ring sends (N-1)/N of a buffer to gather or to scatter it, twice that to reduce it everywhere.
    ZeRO 1 and 2 send as much as DDP, ZeRO 3 and FSDP2 half as much again (arXiv:1910.02054, section
    7). ZeRO 2 and 3 reduce after every part, the others after the last one.
    """
    engine, others = spread.engine, (spread.processes - 1) / spread.processes
    once = others * counts.weights
    teacher = parts * others * counts.teacher if spread.teacher_shard else 0.0
    if engine == "ddp":
        return teacher, 2 * once, 0.0
    if engine in ("zero1", "zero2"):
        return teacher, once * (parts if engine == "zero2" else 1), once
    scattered = once * (parts if engine == "zero3" else 1)
    return teacher + parts * once, parts * once + scattered, 0.0


def _seconds(work: Work, speed: Speed) -> float:
    peak = speed.tflops * 1e12
    return work.convolutions / (CONVOLUTION_SHARE * peak) + work.products / (PRODUCT_SHARE * peak)
