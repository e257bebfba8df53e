"""Pairs of vectors whose mutual information is known, for bench_mi_tasks.py.

Formulas as collected by Czyz et al., "Beyond Normal: On the Evaluation of Mutual Information
Estimators", NeurIPS 2023, arXiv:2306.11078; tests integrate each of them numerically. An injective
map of either side keeps the information, however it bends the pair.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CORRELATION = 0.6  # of every pair of the dense tasks
SPARSE_CORRELATION = 0.8  # of the two pairs of the sparse one
DEGREES = 5.0  # of Student's t
NOISE = 0.75  # half-width of the uniform noise
SPEED = 0.3  # radians that the spiral turns for every unit of squared length


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Vectors of ``dims`` entries a side.

    Args:
        name: What is drawn.
        fewest: Smallest number of dimensions it exists in.
        draw: ``draw(images, dims, generator)`` gives both sides, float64.
        nats: Their mutual information in so many dimensions.
    """

    name: str
    fewest: int
    draw: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    nats: Callable[[int], float]


def drawn(task: Task, images: int, dims: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Both sides as float32, the precision of activations."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + dims)
    x, y = task.draw(images, dims, generator)
    return x.float(), y.float()


def gaussian_nats(correlation: float, pairs: int) -> float:
    """Of independent pairs of one correlation."""
    return -0.5 * pairs * math.log(1 - correlation**2)


def student_nats(degrees: float, dims: int) -> float:
    """What Student's common scale of both sides adds to the Gaussian of the same dispersion."""

    def f(x: float) -> float:
        half = torch.tensor(x / 2, dtype=torch.float64)
        return float(half.lgamma() - half * half.digamma())

    return f(degrees) + f(degrees + 2 * dims) - 2 * f(degrees + dims)


def uniform_nats(noise: float) -> float:
    """Of X uniform on [0, 1] and X + N, N uniform on [-noise, noise]."""
    return 1 / (4 * noise) if noise >= 0.5 else noise - math.log(2 * noise)


def spiral(rows: Tensor, speed: float = SPEED) -> Tensor:
    """Turns the first two entries by an angle that grows with the squared length; lengths stay."""
    angle = speed * rows.square().sum(dim=1)
    a, b = rows[:, 0], rows[:, 1]
    turned = (angle.cos() * a - angle.sin() * b, angle.sin() * a + angle.cos() * b)
    return torch.cat([torch.stack(turned, dim=1), rows[:, 2:]], dim=1)


def _normal(images: int, dims: int, generator: torch.Generator) -> Tensor:
    return torch.randn(images, dims, generator=generator, dtype=torch.float64)


def _pairs(
    images: int, dims: int, generator: torch.Generator, correlation: float, pairs: int
) -> tuple[Tensor, Tensor]:
    """Correlated in the first so many entries, independent in the others."""
    x, noise = _normal(images, dims, generator), _normal(images, dims, generator)
    r = torch.zeros(dims, dtype=torch.float64)
    r[:pairs] = correlation
    return x, r * x + (1 - r * r).sqrt() * noise


def _rotated(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Under a random rotation."""
    return rows @ torch.linalg.qr(_normal(rows.shape[1], rows.shape[1], generator)).Q


def _dense(images: int, dims: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = _pairs(images, dims, generator, CORRELATION, dims)
    return _rotated(x, generator), _rotated(y, generator)


def _sparse(images: int, dims: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _pairs(images, dims, generator, SPARSE_CORRELATION, min(2, dims))


def _student(images: int, dims: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = _pairs(images, dims, generator, CORRELATION, dims)
    squares = _normal(images, int(DEGREES), generator).square().sum(dim=1, keepdim=True)
    scale = (DEGREES / squares).sqrt()
    return scale * x, scale * y


def _uniform(images: int, dims: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, noise = torch.rand(2, images, dims, generator=generator, dtype=torch.float64)
    return x, x + NOISE * (2 * noise - 1)


def _asinh(images: int, dims: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of ten standard deviations, where asinh is nearly a logarithm."""
    x, y = _pairs(images, dims, generator, CORRELATION, dims)
    return (10 * x).asinh(), (10 * y).asinh()


def _spiral(images: int, dims: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = _pairs(images, dims, generator, CORRELATION, dims)
    return spiral(x), y


TASKS = (
    Task(
        name="Gaussian, dense",
        fewest=1,
        draw=_dense,
        nats=lambda dims: gaussian_nats(CORRELATION, dims),
    ),
    Task(
        name="Gaussian, 2 pairs",
        fewest=1,
        draw=_sparse,
        nats=lambda dims: gaussian_nats(SPARSE_CORRELATION, min(2, dims)),
    ),
    Task(
        name="Student t",
        fewest=1,
        draw=_student,
        nats=lambda dims: gaussian_nats(CORRELATION, dims) + student_nats(DEGREES, dims),
    ),
    Task(
        name="uniform plus uniform noise",
        fewest=1,
        draw=_uniform,
        nats=lambda dims: dims * uniform_nats(NOISE),
    ),
    Task(
        name="Gaussian under asinh",
        fewest=1,
        draw=_asinh,
        nats=lambda dims: gaussian_nats(CORRELATION, dims),
    ),
    Task(
        name="Gaussian under a spiral",
        fewest=2,
        draw=_spiral,
        nats=lambda dims: gaussian_nats(CORRELATION, dims),
    ),
)
