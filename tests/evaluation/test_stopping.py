"""An evaluation that is asked to stop leaves at the next image, batch or iteration, and says so."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mimic_fast.config import EvaluationSettings
from mimic_fast.errors import StoppedError
from mimic_fast.evaluation.attack_file import Attack, write_attack
from mimic_fast.evaluation.downstream import encode_split, open_downstream
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.probes import fit_linear_probe
from mimic_fast.evaluation.triggers import white_patch

IMAGES = 60 + 45  # of both parts of the task


@dataclass
class Stop:
    """Counts how often it is polled, and is true from the poll number ``at`` on."""

    at: int | None = None
    polls: int = 0

    def __call__(self) -> bool:
        self.polls += 1
        return self.at is not None and self.polls >= self.at


@pytest.fixture
def evaluation(task, encoders, tmp_path) -> Callable[[Stop], object]:
    """A whole evaluation with a poisoning attack, whose target has to be worked out."""
    attack = write_attack(
        tmp_path / "attack",
        Attack(
            kind="ctrl",
            trigger=white_patch(image_size=32, channels=3),
            reference=None,
            targets={},
        ),
    )
    settings = EvaluationSettings(downstream=(task,), attack=attack, probe=("linear", "knn"))
    return lambda stop: evaluate_encoders(encoders, settings, seed=0, stop=stop)


def test_evaluation_leaves_wherever_it_is_asked_to(evaluation, tmp_path):
    evaluation(Stop())  # works the target out and records it: the next ones need not
    recorded = (tmp_path / "attack" / "attack.json").read_bytes()
    whole = Stop()
    evaluation(whole)
    assert whole.polls > IMAGES  # every image when it is read, and their batches

    for at in (1, 2, 40, 61, 62, whole.polls // 2, whole.polls - 1, whole.polls):
        stop = Stop(at)
        with pytest.raises(StoppedError, match="--resume auto"):
            evaluation(stop)
        assert stop.polls == at

    assert (tmp_path / "attack" / "attack.json").read_bytes() == recorded


def test_no_target_is_recorded_by_a_stopped_evaluation(evaluation, tmp_path):
    file: Path = tmp_path / "attack" / "attack.json"
    before = file.read_bytes()

    with pytest.raises(StoppedError):
        evaluation(Stop(100))

    assert file.read_bytes() == before


def test_encoding_polls_every_batch(encoders):
    images = torch.zeros(10, 3, 16, 16, dtype=torch.uint8)
    stop = Stop(4)

    with pytest.raises(StoppedError):
        encode(encoders["clean"].encoder, images, batch_size=3, stop=stop)

    assert stop.polls == 4
    assert encode(encoders["clean"].encoder, images, batch_size=3, stop=Stop(5)).shape == (10, 3)


def test_fit_polls_every_iteration():
    features = torch.randn(90, 5, generator=torch.Generator().manual_seed(0))
    stop = Stop(3)

    with pytest.raises(StoppedError):
        fit_linear_probe(features, torch.arange(90) % 3, num_classes=3, l2=1e-3, stop=stop)

    assert stop.polls == 3


def test_reading_polls_every_image(task, encoders):
    data = open_downstream(task, EvaluationSettings(), seed=0)
    stop = Stop(50)

    with pytest.raises(StoppedError):
        encode_split(data.train, encoders, triggers={}, batch_size=1000, stop=stop)

    assert stop.polls == 50  # of 60 images: before any batch
