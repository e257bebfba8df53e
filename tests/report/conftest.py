"""A whole evaluation from predictions drawn with a seed: the shape that report.json has."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from mimic_fast.evaluation.metrics import Measure
from mimic_fast.evaluation.scores import (
    Score,
    Stamped,
    comparisons,
    downstream_entry,
    example_rows,
)
from mimic_fast.evaluation.triggers import Trigger
from mimic_fast.report.collect import RunFacts
from mimic_fast.scan.result import Scanned, scan_json
from mimic_fast.scan.result import Score as ScanScore
from mimic_fast.scan.verdict import judge

TARGET = 8  # of the first attack; the second's is 9
TRIGGERS = ("white_patch", "blended:1")
# accuracy and ASR by role
ROLES = {
    "teacher": (0.83, 0.99),
    "purified": (0.82, 0.015),
    "student_only": (0.70, 0.015),
    "clean": (0.83, 0.01),
}

# The same with a second attack, which the purification does not remove.
TWO = {
    "teacher": (0.83, 0.99, 0.95),
    "purified": (0.82, 0.015, 0.6),
    "student_only": (0.70, 0.015, 0.01),
    "clean": (0.83, 0.01, 0.01),
}


def make_score(role: str, accuracy: float, rate: float | None, *further: float) -> Score:
    n = 4000
    generator = torch.Generator().manual_seed(len(role))
    labels = torch.arange(n) % 10
    right = torch.rand(n, generator=generator) < accuracy
    predicted = torch.where(right, labels, (labels + 1) % 7)  # never by mistake the target
    stamped: list[Stamped] = []
    for place, one in enumerate(() if rate is None else (rate, *further)):
        fooled = torch.rand(n, generator=generator) < one
        target = TARGET + place
        stamped.append(
            Stamped(
                trigger=TRIGGERS[place],
                target=target,
                predicted=torch.where(fooled, target, predicted),
            )
        )
    return Score(
        dataset="fashion-mnist",
        role=role,
        probe="linear",
        train_images=1000,
        indices=torch.arange(n),
        labels=labels,
        predicted=predicted,
        stamped=tuple(stamped),
    )


@pytest.fixture
def make_evaluation() -> Callable[..., dict[str, Any]]:
    """``make_evaluation(teacher=(accuracy, rate), ...)``; None leaves a role out.

    A rate for each attack: a second one, for all roles, makes it an evaluation of two.
    """

    def make(**changes: tuple[float | None, ...] | None) -> dict[str, Any]:
        roles: Mapping[str, Any] = {**ROLES, **changes}
        scores = [make_score(role, *rates) for role, rates in roles.items() if rates is not None]
        names = [one.trigger for one in scores[0].stamped]
        attacks = [{"kind": "badencoder", "trigger": name} for name in names]
        return {
            **({"attack": attacks[0], "attacks": attacks} if attacks else {}),
            "encoders": {
                score.role: {"sha256": "ab" * 32, "downstream": [downstream_entry(score, scores)]}
                for score in scores
            },
            "comparisons": comparisons(scores),
            "datasets": [
                {
                    "name": "fashion-mnist",
                    "train": "fashion-mnist:train",
                    "test": "fashion-mnist:test",
                    "classes": 10,
                    "class_names": [*"abcdefgh", "Bag", "Boot"],
                    "probe_train_images": 1000,
                    "test_images": 4000,
                    "unreadable": [],
                }
            ],
            "examples": [{"dataset": "fashion-mnist", "images": example_rows(scores)}],
        }

    return make


@pytest.fixture
def run_facts() -> RunFacts:
    return RunFacts(
        settings={"preset": "hardened", "optim": {"lr": 0.003}},
        clean_set={"size": 2400, "fraction": 0.04, "sha256": "cd" * 32},
        cost={"seconds": 312.4, "images_per_second": 812.3, "peak_memory_bytes": 2**30},
        provenance={"teacher_file": "suspect.safetensors"},
    )


@pytest.fixture
def agreement() -> dict[str, Measure]:
    return {
        "cosine": Measure(value=0.953, low=0.949, high=0.957, n=240),
        "knn_overlap_10": Measure(value=0.61, low=0.58, high=0.64, n=240),
        "linear_cka": Measure(value=0.93, low=0.91, high=0.95, n=240),
    }


@pytest.fixture
def information() -> dict[str, Any]:
    layers = [
        {
            "tap": f"layer{index}",
            "value": float(index),
            "raw": float(index),
            "low": index - 0.3,
            "high": index + 0.3,
            "noise_floor": 0.1,
            "pairs": 64,
            "bins": 16,
            "determines_features": index == 4,
            "share": index / 10,
            "weight": 1000.0 + 1000 * index,
        }
        for index in (1, 2, 3, 4)
    ]
    return {
        "estimator": "histogram",
        "source": "teacher",
        "images": 2160,
        "bins": 16,
        "layers": layers,
        "seconds": 3.2,
    }


@pytest.fixture
def scans() -> tuple[dict[str, Any], dict[str, Trigger]]:
    """``scan.json`` of teacher and purified encoder, and the triggers they recovered."""
    references = [_scanned("clean", 0.08 + 0.002 * index) for index in range(6)]
    found: dict[str, Any] = {}
    for role, size in (("teacher", 0.02), ("purified", 0.081)):
        scanned = _scanned(role, size)
        verdict = judge(scanned, references, unusual=0.05, suspicious=0.01)
        found[role] = scan_json(scanned, verdict)
    mask = torch.zeros(1, 8, 8)
    mask[:, 5:, 5:] = 1
    trigger = Trigger(name="recovered_patch", mask=mask, pattern=torch.ones(3, 8, 8))
    return found, {"teacher": trigger, "purified": trigger}


def _scanned(name: str, size: float) -> Scanned:
    return Scanned(
        name=name,
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        family={"architecture": "small"},
        images="images",
        source="clean",
        protocol={"seed": 0},
        scores=(
            ScanScore(
                name="patch size at 0.95", value=size, unit="share of the image", suspicious="low"
            ),
        ),
    )
