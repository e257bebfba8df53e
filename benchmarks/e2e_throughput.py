"""Images per second of whole steps: ours and the demo-style loop in turns, step by step."""

import torch
from e2e_setup import (
    Setup,
    check_same_losses,
    demo_steps,
    mimic_fast_steps,
    step_function,
)
from measure import Case, Machine, Row, Timing, interleaved, ratio_rows, timing_rows

DEMO = "demo_style"
OURS = "mimic_fast official"
DEFAULT = "mimic_fast hardened (other losses)"


def throughput_rows(
    setup: Setup, *, rounds: int, warmup: int, machine: Machine, threads: int
) -> list[Row]:
    """Checks that the losses agree, then times the loops.

    Args:
        setup: What is compared.
        rounds: Timed steps of every loop.
        warmup: Untimed steps of every loop.
        machine: Where.
        threads: Of torch.

    Raises:
        AssertionError: If the loops do not minimize the same function; nothing is timed then.
    """
    check_same_losses(setup)
    print("losses of both loops agree; timing", flush=True)
    official, hardened = setup.settings("official"), setup.settings("hardened")
    candidates = {
        DEMO: demo_steps(setup, setup.student(official)),
        OURS: mimic_fast_steps(setup, setup.student(official), official),
        DEFAULT: mimic_fast_steps(setup, setup.student(hardened), hardened),
    }
    torch.set_num_threads(threads)
    timings = interleaved(
        {name: step_function(steps) for name, steps in candidates.items()},
        rounds=rounds,
        warmup=warmup,
        report=lambda line: print(line, flush=True),
    )
    assert torch.get_num_threads() == threads
    return _rows(setup, timings, machine)


def _rows(setup: Setup, timings: dict[str, Timing], machine: Machine) -> list[Row]:
    rows: list[Row] = []
    for name, timing in timings.items():
        case = Case(op="step", impl=name, mode="throughput", shape=shape(setup))
        rows += timing_rows(case, timing, images=setup.batch_size, machine=machine)
        if name != DEMO:
            rows += ratio_rows(case, timing, timings[DEMO], machine=machine)
    return rows


def shape(setup: Setup) -> str:
    """Encoder and batch, e.g. ``resnet18 small_stride1 128x3x32x32``."""
    spec = setup.teacher.spec
    channels = spec.arguments.get("channels")
    width = " " + "-".join(map(str, channels)) if isinstance(channels, list) else ""
    batch = f"{setup.batch_size}x{spec.in_channels}x{spec.image_size}x{spec.image_size}"
    return f"{spec.architecture.partition(':')[2]}{width} {spec.stem} {batch}"
