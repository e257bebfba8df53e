"""Ways to the mutual information of many pairs of directions, for bench_mi.py.

All get bin codes and return nats in float64, the plug-in estimate from a table of counts a pair.
numpy and fast-histogram get the codes as float64 and edges, which is when they are fastest; their
tables are turned into information all at once, or, as one would write it first, pair by pair.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fast_histogram import histogram2d
from jaxtyping import Float32
from numpy.typing import NDArray
from sklearn.metrics import mutual_info_score
from torch import Tensor

BINS = 16
IMAGES = 2048
SHARED = 1.5  # of the first direction in the second, beside noise of standard deviation 1

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Values of directions by image, ``[direction, image]``, and which of them make a pair.

    Args:
        name: ``cross``: every first direction with every second; ``matched``: row by row.
        shape: For the rows of results.
        x: First directions.
        y: Second directions.
    """

    name: str
    shape: str
    x: Float32[np.ndarray, "x_direction image"]
    y: Float32[np.ndarray, "y_direction image"]

    @property
    def pairs(self) -> int:
        """How many."""
        return len(self.x) * (len(self.y) if self.name == "cross" else 1)


def workload(name: str, *, layers: int, directions: int, images: int = IMAGES) -> Workload:
    """Directions of ``layers`` layers and of the features they are compared with, seeded.

    No value occurs twice in a direction, so that every way of ranking has the same answer.
    """
    generator = np.random.default_rng(0)
    x = _distinct(generator, np.zeros((layers * directions, images), np.float32))
    y = _distinct(generator, SHARED * (x[:directions] if name == "cross" else x))
    shape = "x".join(map(str, [layers, *[directions] * (2 if name == "cross" else 1)]))
    return Workload(name=name, shape=f"{shape} pairs, {images} images, K={BINS}", x=x, y=y)


def numpy_codes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Equal-mass bins: edges from a sort, then as many comparisons as edges.

    The fastest of several ways in numpy (argsort, partition, searchsorted by row).
    """
    cuts = np.arange(1, BINS) * values.shape[1] // BINS
    edges = np.sort(values, axis=1)[:, cuts]
    codes = np.zeros(values.shape, np.uint8)
    for number in range(BINS - 1):
        codes += values >= edges[:, number : number + 1]
    return codes


def numpy_histogram(x: Array, y: Array, name: str) -> Array:
    """numpy.histogram2d a pair, information of all tables at once."""
    edges = np.arange(BINS + 1.0)
    return information([np.histogram2d(a, b, bins=edges)[0] for a, b in _pairs(x, y, name)])


def numpy_loop(x: Array, y: Array, name: str) -> Array:
    """numpy.histogram2d and information, pair by pair."""
    edges = np.arange(BINS + 1.0)
    found = []
    for a, b in _pairs(x, y, name):
        joint = np.histogram2d(a, b, bins=edges)[0] / len(a)
        product = joint.sum(axis=1)[:, None] * joint.sum(axis=0)
        filled = joint > 0
        found.append((joint[filled] * np.log(joint[filled] / product[filled])).sum())
    return np.array(found)


def numpy_bincount(x: NDArray[np.int64], y: NDArray[np.int64], name: str) -> Array:
    """numpy.bincount of the cell's number a pair, information of all tables at once."""
    cells = BINS * BINS
    x = x * BINS
    tables = [np.bincount(a + b, minlength=cells) for a, b in _pairs(x, y, name)]
    return information([table.reshape(BINS, BINS) for table in tables])


def fast_histogram(x: Array, y: Array, name: str) -> Array:
    """fast_histogram.histogram2d a pair, information of all tables at once."""
    within = [[0, BINS], [0, BINS]]
    return information([histogram2d(a, b, bins=BINS, range=within) for a, b in _pairs(x, y, name)])


def scikit_learn(x: NDArray[np.int64], y: NDArray[np.int64], name: str) -> Array:
    """sklearn.metrics.mutual_info_score a pair."""
    return np.array([mutual_info_score(a, b) for a, b in _pairs(x, y, name)])


def information(tables: Sequence[NDArray[np.generic]]) -> Array:
    """Plug-in mutual information of tables of counts that have equal sums."""
    counts = np.stack(tables).astype(np.int64)
    images = int(counts[0].sum())
    looked_up = _c_log_c(images)
    terms = [counts.reshape(len(counts), -1), counts.sum(axis=2), counts.sum(axis=1)]
    cells, rows, columns = (looked_up[term].sum(axis=1) for term in terms)
    return np.log(images) + (cells - rows - columns) / images


def one_hot_product(x: Tensor, y: Tensor, looked_up: Tensor) -> Tensor:
    """Counts of all pairs as one matrix product of one-hot codes, for torch.compile.

    ``looked_up`` is c log c by count, float64.
    """
    bins = torch.arange(BINS, dtype=torch.uint8, device=x.device)[:, None]
    first = (x[:, None] == bins).to(torch.float32).flatten(0, 1)
    second = (y[:, None] == bins).to(torch.float32).flatten(0, 1)
    counts = (first @ second.T).view(len(x), BINS, len(y), BINS)
    cells = looked_up[counts.int()].sum(dim=(1, 3))
    rows = looked_up[first.sum(dim=1).view(len(x), BINS).int()].sum(dim=1)
    columns = looked_up[second.sum(dim=1).view(len(y), BINS).int()].sum(dim=1)
    images = x.shape[1]
    return (cells - rows[:, None] - columns) / images + math.log(images)


@functools.cache
def _c_log_c(images: int) -> Array:
    counts = np.arange(images + 1.0)
    return counts * np.log(np.maximum(counts, 1))


def _pairs(x: NDArray, y: NDArray, name: str) -> Iterator[tuple[NDArray, NDArray]]:
    if name == "matched":
        yield from zip(x, y, strict=True)
        return
    for a in x:
        for b in y:
            yield a, b


def _distinct(generator: np.random.Generator, shared: NDArray[np.float32]) -> NDArray[np.float32]:
    """Noise added to what is shared, drawn anew for rows in which two values are equal."""
    values = np.empty_like(shared)
    pending = np.arange(len(shared))
    while len(pending):
        values[pending] = shared[pending] + generator.standard_normal(
            (len(pending), shared.shape[1]), np.float32
        )
        ordered = np.sort(values[pending], axis=1)
        pending = pending[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
    return values
