"""Seconds of training until a linear probe on the student reaches an accuracy, for both loops.

The loops train in turns, one epoch each, from the same student weights; only training is on the
clock, the probes are not. An accuracy is reached at the first probe at or above it.
"""

import time
from dataclasses import dataclass, field

import torch
from e2e_setup import (
    Setup,
    check_same_losses,
    demo_steps,
    mimic_fast_steps,
    synthetic_images,
    take,
)
from e2e_throughput import DEMO, OURS, shape
from measure import Case, Machine, Row, single_row
from torch import Tensor

from mimic_fast.data.images import load_images
from mimic_fast.data.sources import open_source
from mimic_fast.encoders.build import Encoder
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.probes import fit_linear_probe

_PROBE_L2 = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Labeled:
    """Images with classes."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Probing:
    """Where the probe is fitted and measured, and how often."""

    train: Labeled
    test: Labeled
    every: int


@dataclass(kw_only=True, slots=True)
class _Curve:
    """Training time so far, and (epoch, wall, cpu, accuracy) of every probe."""

    wall: float = 0.0
    cpu: float = 0.0
    points: list[tuple[int, float, float, float]] = field(default_factory=list)

    def reached(self, accuracy: float) -> tuple[int, float, float, float] | None:
        return next((point for point in self.points if point[3] >= accuracy), None)


def labeled_images(data: str | None, *, count: int, image_size: int, seed: int) -> Labeled:
    """``count`` images of a labeled source, drawn uniformly; synthetic ones if ``data`` is None.

    Raises:
        UsageError: If the source has no labels.
    """
    if data is None:
        images, labels = synthetic_images(count, image_size=image_size, seed=seed)
        return Labeled(images=images, labels=labels)
    source = open_source(data)
    if source.labels is None:
        raise UsageError(f"{data} has no labels, and a probe needs them; give a labeled source")
    drawn = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    images, kept = load_images(
        source, drawn[:count].tolist(), image_size=image_size, channels=3, evaluation=True
    )
    return Labeled(images=images, labels=torch.tensor(source.labels)[list(kept)])


def time_to_accuracy_rows(
    setup: Setup,
    probing: Probing,
    *,
    targets: tuple[float, ...],
    machine: Machine,
    threads: int,
) -> list[Row]:
    """Trains both loops and tells when each reached the targets.

    Args:
        setup: What is compared.
        probing: How accuracy is measured.
        targets: Accuracies; empty: the best that both loops reach in ``setup.epochs``.
        machine: Where.
        threads: Of torch.

    Raises:
        AssertionError: If the loops do not minimize the same function; nothing is timed then.
    """
    check_same_losses(setup)
    curves = _trained(setup, probing, targets, threads)
    best = {name: max(point[3] for point in curve.points) for name, curve in curves.items()}
    rows: list[Row] = []
    for target in targets or (min(best.values()),):
        rows += _target_rows(setup, curves, target, machine)
    for name, accuracy in best.items():
        mode = f"best of {curves[name].points[-1][0]} epochs"
        case = Case(op="training", impl=name, mode=mode, shape=shape(setup))
        rows.append(single_row(case, "clean_accuracy", "fraction", accuracy, machine=machine))
    return rows


def _target_rows(
    setup: Setup, curves: dict[str, _Curve], target: float, machine: Machine
) -> list[Row]:
    """When each loop reached ``target``; a loop that did not has no row."""
    rows: list[Row] = []
    points = {name: curve.reached(target) for name, curve in curves.items()}
    baseline = points[DEMO]
    for name, point in points.items():
        if point is None:
            print(f"{name} did not reach {target:.4f}")
            continue
        mode = f"time to accuracy {target:.4f}"
        case = Case(op="training", impl=name, mode=mode, shape=shape(setup))
        epoch, wall, cpu, _ = point
        figures = [("wall_time", "s", wall), ("cpu_time", "s", cpu), ("epochs", "epochs", epoch)]
        if name != DEMO and baseline is not None:
            figures.append(("wall_speedup", "x", baseline[1] / wall))
            figures.append(("cpu_speedup", "x", baseline[2] / cpu))
        rows += [single_row(case, *figure, machine=machine) for figure in figures]
    return rows


def _trained(
    setup: Setup, probing: Probing, targets: tuple[float, ...], threads: int
) -> dict[str, _Curve]:
    settings = setup.settings("official")
    torch.set_num_threads(threads)
    # What a process does once (imports, primitives of every shape) is nobody's training time.
    take(demo_steps(setup, setup.student(settings)), 1)
    take(mimic_fast_steps(setup, setup.student(settings), settings), 1)
    students = {DEMO: setup.student(settings), OURS: setup.student(settings)}
    loops = {
        DEMO: demo_steps(setup, students[DEMO]),
        OURS: mimic_fast_steps(setup, students[OURS], settings),
    }
    curves = {name: _Curve() for name in loops}
    for epoch in range(1, setup.epochs + 1):
        for name in list(loops)[:: 1 if epoch % 2 else -1]:
            curve = curves[name]
            wall, cpu = time.perf_counter(), time.process_time()
            take(loops[name], len(setup.pool) // setup.batch_size)
            curve.wall += time.perf_counter() - wall
            curve.cpu += time.process_time() - cpu
            if epoch % probing.every == 0 or epoch == setup.epochs:
                accuracy = _accuracy(students[name].tapped.encoder, probing)
                curve.points.append((epoch, curve.wall, curve.cpu, accuracy))
                print(f"epoch {epoch} {name}: {accuracy:.4f} after {curve.wall:.1f} s", flush=True)
        if targets and all(curve.reached(max(targets)) for curve in curves.values()):
            break
    return curves


def _accuracy(encoder: Encoder, probing: Probing) -> float:
    """Accuracy of a linear probe on the frozen features; training goes on undisturbed."""
    train, test = probing.train, probing.test
    probe = fit_linear_probe(
        encode(encoder, train.images),
        train.labels,
        num_classes=int(torch.cat([train.labels, test.labels]).max()) + 1,
        l2=_PROBE_L2,
    )
    return (probe.predict(encode(encoder, test.images)) == test.labels).double().mean().item()
