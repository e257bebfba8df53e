"""What a forecast rests on, in sentences."""

from mimic_fast.config import Settings
from mimic_fast.ops_choice import Path
from mimic_fast.planning.memory import FRAGMENTS, RESERVED
from mimic_fast.planning.timing import CONVOLUTION_SHARE, LINK_SHARE, PRODUCT_SHARE, Speed


def assumptions(settings: Settings, speed: Speed | None, path: Path) -> list[str]:
    """A sentence each.

    Args:
        settings: Of the run.
        speed: Of the machine; None: no time was predicted.
        path: What the losses were counted on.
    """
    said = [
        "peak: bytes of live tensors of one process, counted by running the step on fake tensors "
        "for ddp; shares and buffers of the other engines are formulas",
        f"losses counted on the path {path!r}; what a library allocates inside one operation "
        "(cuDNN's workspaces) is not counted",
    ]
    if settings.run.device == "cpu":
        said.append("on a CPU, decoded images and the program itself come on top")
    else:
        said.append(
            f"fits: peak x {1 + FRAGMENTS:g} (fragments) + {RESERVED / 1e9:g} GB (context, "
            "libraries) is at most the memory"
        )
    if settings.optim.compile:
        said.append("optim.compile is counted as eager, which needs no less")
    return said + _of_time(speed)


def _of_time(speed: Speed | None) -> list[str]:
    if speed is None:
        return ["step time needs --gpu NAME or --peak-tflops"]
    said = [
        f"step time: counted work at {CONVOLUTION_SHARE:.0%} (convolutions) and "
        f"{PRODUCT_SHARE:.0%} (matrix products) of {speed.tflops:g} TFLOP/s; data arrives in time",
    ]
    if speed.bandwidth is None:
        return [*said, "communication is left out; it needs --gpu NAME or --bandwidth"]
    return [
        *said,
        f"communication: rings at {LINK_SHARE:.0%} of {speed.bandwidth:g} GB/s a GPU, hidden as "
        "far as forward and backward last",
    ]
