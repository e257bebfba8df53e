"""Known answers against independent integrals, draws against them, and the rows of the scripts."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.bench_mi_ranks import rank_rows
from benchmarks.measure import this_machine
from benchmarks.mi_tasks import (
    CORRELATION,
    DEGREES,
    NOISE,
    TASKS,
    drawn,
    spiral,
    student_nats,
    uniform_nats,
)
from mimic_fast.mutual_information.ksg import ksg_terms

ROOT = Path(__file__).parents[2]
# Frozen distributions have no types that say what they are.
STUDENT: Any = stats.multivariate_t
NORMAL: Any = stats.multivariate_normal
BY_NAME = {task.name: task for task in TASKS}


def integrated(joint, margin) -> float:
    """Mean log ratio of densities on a grid that reaches far out: x = sinh s."""
    s = np.linspace(-13, 13, 1001)
    x, step = np.sinh(s), np.cosh(s) * (s[1] - s[0])
    log_ratio = joint(*np.meshgrid(x, x)) - margin(x) - margin(x)[:, None]
    return float((step * step[:, None] * np.exp(joint(*np.meshgrid(x, x))) * log_ratio).sum())


def dispersion(dims: int) -> np.ndarray:
    block = CORRELATION * np.eye(dims)
    return np.block([[np.eye(dims), block], [block, np.eye(dims)]])


@pytest.mark.parametrize(
    "name", ["Gaussian, dense", "Gaussian under asinh", "Gaussian under a spiral"]
)
def test_gaussian_nats_are_the_integral(name):
    both = NORMAL(np.zeros(2), dispersion(1))

    found = integrated(lambda x, y: both.logpdf(np.stack([x, y], axis=-1)), stats.norm.logpdf)

    assert BY_NAME[name].nats(1) == pytest.approx(found, abs=1e-6)


def test_student_nats_are_the_integral():
    both = STUDENT(np.zeros(2), dispersion(1), df=DEGREES)

    found = integrated(
        lambda x, y: both.logpdf(np.stack([x, y], axis=-1)), STUDENT(0, 1, df=DEGREES).logpdf
    )

    assert BY_NAME["Student t"].nats(1) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("dims", [1, 3, 25])
def test_student_nats_are_those_of_the_entropies(dims):
    side = STUDENT(np.zeros(dims), np.eye(dims), df=DEGREES).entropy()
    both = STUDENT(np.zeros(2 * dims), dispersion(dims), df=DEGREES).entropy()

    assert BY_NAME["Student t"].nats(dims) == pytest.approx(float(2 * side - both), abs=1e-8)


def test_student_without_heavy_tails_adds_nothing():
    assert student_nats(1e7, 3) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("noise", [0.1, 0.5, NOISE, 2.0])
def test_uniform_nats_are_the_integral(noise):
    y = (np.arange(400_000) + 0.5) / 400_000 * (1 + 2 * noise) - noise
    density = (np.minimum(1, y + noise) - np.maximum(0, y - noise)) / (2 * noise)
    entropy = -(density * np.log(density)).mean() * (1 + 2 * noise)

    assert uniform_nats(noise) == pytest.approx(entropy - math.log(2 * noise), abs=1e-6)


def test_two_pairs_carry_the_sparse_task_in_any_dimension():
    nats = BY_NAME["Gaussian, 2 pairs"].nats

    assert nats(1) == pytest.approx(-0.5 * math.log(0.36))
    assert nats(2) == nats(25) == 2 * nats(1)


def test_a_spiral_can_be_undone():
    rows = torch.randn(50, 4, dtype=torch.float64)

    turned = spiral(rows)

    torch.testing.assert_close(turned.norm(dim=1), rows.norm(dim=1))
    torch.testing.assert_close(spiral(turned, -0.3), rows)
    assert not torch.allclose(turned, rows, atol=0.1)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_draws_hold_what_the_formula_says(task):
    dims = task.fewest
    found = [
        float(ksg_terms(*(side.double() for side in drawn(task, 1000, dims, seed=seed))).mean())
        for seed in range(3)
    ]

    # three draws of 1,000 in one or two dimensions: 0.02 nats, and a bias of up to 0.05 in two
    assert sum(found) / 3 == pytest.approx(task.nats(dims), abs=0.06)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_draws_depend_on_the_seed_alone(task):
    first, again, other = (drawn(task, 20, 3, seed=seed) for seed in (1, 1, 2))

    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    assert {side.shape for side in first} == {(20, 3)}


def test_the_script_adds_rows_of_truth_mean_bias_and_deviation(tmp_path):
    out = tmp_path / "rows.csv"
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "bench_mi_tasks.py"), "--out", str(out)),
        *("--images", "80", "--dims", "1", "2", "--seeds", "2", "--epochs", "1", "--batch", "8"),
        *("--tasks", "Gaussian under a spiral", "--slices", "5"),
        *("--estimators", "canonical", "cross", "sliced", "ksg", "dv", "infonce"),
    ]

    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {row["mode"] for row in rows} == {"2 a side"}, "there is no spiral in one dimension"
    metrics = {row["impl"].partition(",")[0]: [] for row in rows}
    for row in rows:
        metrics[row["impl"].partition(",")[0]].append(row["metric"])
    assert metrics["canonical"] == ["truth", "mean", "bias", "deviation"]
    assert metrics["cross"] == metrics["sliced"] == ["truth", "mean", "deviation"]
    assert list(metrics) == ["canonical", "cross", "sliced", "ksg", "dv", "infonce"]


def test_ranks_are_compared_between_seeds_and_with_the_default():
    up = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    swapped = {"a": 0.2, "b": 0.1, "c": 0.3, "d": 0.4}
    down = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    shares = {"canonical": [up, swapped], "ksg": [down, down]}

    rows = rank_rows("drupe", shares, 100, this_machine(threads=1))

    found = {
        (row["impl"], row["metric"]): float(row["p50"])
        for row in rows
        if row["op"] == "rank correlation"
    }
    assert found["canonical", "between seeds"] == pytest.approx(0.8)
    assert found["canonical", "with canonical"] == 1
    assert found["ksg", "between seeds"] == 1
    assert found["ksg", "with canonical"] == pytest.approx(-0.9)
    assert sum(row["op"] == "share of information" for row in rows) == 8
