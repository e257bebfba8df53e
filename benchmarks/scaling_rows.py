"""Rows of measured weak scaling: ratios of pairs, intervals, and the model held against them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from measure import Case, Machine, Row, Timing, single_row, spread_row, timing_rows
from scaling_model import Ring, all_reduce, ddp_exposed, fitted_ring
from scaling_pairs import ALONE, LOCAL, SYNCHRONIZED, Pairs

RESAMPLES = 10_000
_WITH, _WITHOUT = "gradients synchronized", "gradients not synchronized"


def bootstrap_median(
    values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of the median: rounds drawn again, with repetition.

    Args:
        values: One a round; at least one.
        resamples: Draws.
        seed: Of the draws.
    """
    data = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(len(data), size=(resamples, len(data)))
    low, high = np.percentile(np.median(data[draws], axis=1), [2.5, 97.5])
    return float(low), float(high)


def measured_rows(
    pairs: Pairs, timings: Mapping[int, Timing], *, shape: str, images: int, machine: Machine
) -> list[Row]:
    """Steps and their efficiency, all-reduces with their fit, the model held against the steps.

    Args:
        pairs: What was timed.
        timings: All-reduces by their bytes.
        shape: Encoder and batch of a process.
        images: Of a process in a step.
        machine: Where.
    """
    ring = ring_from(timings, pairs.world)
    return [
        *pair_rows(pairs, shape=shape, images=images, machine=machine),
        *all_reduce_rows(timings, ring, machine=machine),
        *prediction_rows(pairs, ring, shape=shape, machine=machine),
    ]


def pair_rows(pairs: Pairs, *, shape: str, images: int, machine: Machine) -> list[Row]:
    """Times of all steps, then efficiency: of a pair, and against one process alone."""
    world = pairs.world
    alone = Case(op="step", impl=ALONE, mode=ALONE, shape=shape)
    rows = timing_rows(alone, pairs.alone, images=images, machine=machine)
    for arm, timing in pairs.synchronized.items():
        for impl, own in ((_WITH, timing), (_WITHOUT, pairs.local[arm])):
            case = Case(op="step", impl=f"{world} processes, {impl}", mode=arm, shape=shape)
            rows += timing_rows(case, own, images=images * world, machine=machine)
    return rows + _all_efficiency_rows(pairs, shape=shape, machine=machine)


def all_reduce_rows(timings: Mapping[int, Timing], ring: Ring, *, machine: Machine) -> list[Row]:
    """Times by size, and the alpha and beta that explain them best."""
    rows: list[Row] = []
    shape = f"{ring.ranks} processes"
    for size, timing in timings.items():
        case = Case(op="all-reduce", impl="gloo", mode=f"{size} bytes", shape=shape)
        rows.append(spread_row(case, "wall_time", "s", timing.wall, min(timing.wall), machine))
    misses = [abs(all_reduce(ring, size) / t - 1) for size, t in _medians(timings).items()]
    sizes = f"{min(timings)} to {max(timings)} bytes"
    case = Case(op="all-reduce, fitted", impl="gloo", mode=sizes, shape=shape)
    return [
        *rows,
        single_row(case, "alpha", "us", 1e6 * ring.latency / (ring.ranks - 1), machine=machine),
        single_row(case, "beta", "GB/s", ring.rate / 1e9, machine=machine),
        single_row(case, "largest relative error", "share", max(misses), machine=machine),
    ]


def prediction_rows(pairs: Pairs, ring: Ring, *, shape: str, machine: Machine) -> list[Row]:
    """The model on this machine, held against the pairs.

    Twice: with all of the backward pass as overlap window, as on a GPU, and with none, since here
    the core that computes also copies and adds what is sent.
    """
    rows: list[Row] = []
    for arm, buckets in pairs.buckets.items():
        without = float(np.median(pairs.local[arm].wall))
        measured = float(np.median(pairs.synchronized[arm].wall))
        backward = float(np.median(pairs.backward[arm]))
        efficiency = np.median(_ratios(pairs.synchronized[arm].wall, pairs.local[arm].wall))
        for impl, window in (("overlap with backward", backward), ("no overlap", 0.0)):
            predicted = without + ddp_exposed(buckets, window, ring)
            case = Case(op="step, predicted", impl=impl, mode=arm, shape=shape)
            for metric, unit, value in (
                ("overlap window", "ms", 1e3 * window),
                ("gradients", "MB", sum(buckets) / 1e6),
                ("buckets", "", len(buckets)),
                ("exposed communication", "ms", 1e3 * (predicted - without)),
                ("measured difference", "ms", 1e3 * (measured - without)),
                ("efficiency", "share", without / predicted),
                ("measured efficiency", "share", float(efficiency)),
                ("predicted over measured step", "x", predicted / measured),
            ):
                rows.append(single_row(case, metric, unit, value, machine=machine))
    return rows


def ring_from(timings: Mapping[int, Timing], world: int) -> Ring:
    """Fitted to the medians."""
    medians = _medians(timings)
    return fitted_ring(list(medians), list(medians.values()), world)


def _medians(timings: Mapping[int, Timing]) -> dict[int, float]:
    return {size: float(np.median(timing.wall)) for size, timing in timings.items()}


def _all_efficiency_rows(pairs: Pairs, *, shape: str, machine: Machine) -> list[Row]:
    """Round by round, then the medians with their intervals."""
    spreads: list[Row] = []
    medians: list[Row] = []
    for impl, arm, timing, baseline in _compared(pairs):
        case = Case(op="weak scaling", impl=impl, mode=arm, shape=shape)
        median = replace(case, op="weak scaling, median")
        for clock in ("wall", "cpu"):
            own, other = (getattr(t, clock) for t in (timing, baseline))
            ratios, metric = _ratios(own, other), f"{clock}_efficiency"
            best = min(other) / min(own)
            spreads.append(spread_row(case, metric, "share", ratios, best, machine))
            low, high = bootstrap_median(ratios)
            for name, value in (
                (metric, float(np.median(ratios))),
                (f"{metric}, 95 % from", low),
                (f"{metric}, 95 % to", high),
            ):
                medians.append(single_row(median, name, "share", value, machine=machine))
        medians.append(single_row(median, "pairs", "", len(timing.wall), machine=machine))
    return spreads + medians


def _compared(pairs: Pairs) -> Iterator[tuple[str, str, Timing, Timing]]:
    """Against what, arm, steps with synchronized gradients, what they are compared with."""
    for arm, timing in pairs.synchronized.items():
        yield f"against {_WITHOUT}", arm, timing, pairs.local[arm]
    for arm, timing in pairs.synchronized.items():
        yield f"against {ALONE}", arm, timing, pairs.alone
    synchronized, local = pairs.synchronized[SYNCHRONIZED], pairs.synchronized[LOCAL]
    yield f"against {LOCAL}", SYNCHRONIZED, synchronized, local


def _ratios(own: Sequence[float], baseline: Sequence[float]) -> list[float]:
    return [b / a for a, b in zip(own, baseline, strict=True)]
