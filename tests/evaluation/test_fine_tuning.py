"""Fine-tuning trains a copy of the encoder, from the linear probe on, on the share asked for."""

import pytest
import torch

from mimic_fast.config import EncoderSpec, EvaluationSettings
from mimic_fast.encoders.build import build_encoder
from mimic_fast.errors import DivergedError, StoppedError
from mimic_fast.evaluation.attack_file import Attack, write_attack
from mimic_fast.evaluation.downstream import open_downstream
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.fine_tuning import fine_tuned
from mimic_fast.evaluation.triggers import white_patch
from tests.evaluation.conftest import SIZE, Loaded


@pytest.fixture
def encoder():
    spec = EncoderSpec(
        architecture="timm:resnet18",
        arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
        stem="small_stride2",
        image_size=SIZE,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    return build_encoder(spec, seed=0).eval()


def settings_of(task, **fields):
    return EvaluationSettings.model_validate(
        {
            "downstream": (task,),
            "probe": ("linear", "fine_tune"),
            "fine_tune_share": 0.5,
            "fine_tune_epochs": 4,
            **fields,
        }
    )


def test_a_copy_is_trained_on_its_share_of_every_class(task, encoder):
    settings = settings_of(task, probe_labels=6)  # of the 60, for frozen features alone
    data = open_downstream(task, settings, seed=0)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}

    tuned = fine_tuned(encoder, data, settings, seed=0)

    assert tuned.train_images == 30
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert not encoder.training
    images = torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    assert encode(tuned.encoder, images).shape == (5, 3)
    own = dict(tuned.encoder.backbone[0].named_parameters())  # pyright: ignore
    moved = [not torch.equal(p, before[f"backbone.{name}"]) for name, p in own.items()]
    assert all(moved)  # the encoder itself, not the head alone


def test_it_starts_as_the_linear_probe(task, encoder):
    """With a learning rate of almost nothing, and no running statistics to move, it stays that."""
    settings = settings_of(task, fine_tune_lr=1e-12, fine_tune_epochs=1, fine_tune_share=1.0)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    loaded = {"purified": Loaded(encoder=encoder, sha256="c" * 64)}

    linear, tuned = evaluate_encoders(loaded, settings, seed=0)["encoders"]["purified"][
        "downstream"
    ]

    assert (linear["probe"], tuned["probe"]) == ("linear", "fine_tune")
    assert tuned["clean_accuracy"] == linear["clean_accuracy"]
    assert tuned["probe_train_images"] == 60


def test_it_learns_and_the_attack_is_measured_on_it(task, encoder, tmp_path):
    attack = write_attack(
        tmp_path / "attack",
        Attack(
            kind="badencoder",
            trigger=white_patch(image_size=SIZE, channels=3),
            reference=None,
            targets={task.name: 1},
        ),
    )
    settings = settings_of(task, attack=attack, fine_tune_share=1.0, fine_tune_epochs=10)
    loaded = {"purified": Loaded(encoder=encoder, sha256="c" * 64)}

    entries = evaluate_encoders(loaded, settings, seed=0)["encoders"]["purified"]["downstream"]

    tuned = entries[1]
    assert tuned["clean_accuracy"]["value"] > 0.9
    assert tuned["attacks"][0]["attack_success_rate"]["n"] == 30


def test_same_seed_same_network_another_seed_another(task, encoder):
    settings = settings_of(task, fine_tune_epochs=1)
    data = open_downstream(task, settings, seed=0)
    first, again, other = (
        fine_tuned(encoder, data, settings, seed=seed).encoder.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_divergence_and_stopping_are_said(task, encoder):
    settings = settings_of(task, fine_tune_lr=1e30, fine_tune_share=1.0)
    data = open_downstream(task, settings, seed=0)
    with pytest.raises(DivergedError, match="fine_tune_lr"):
        fine_tuned(encoder, data, settings, seed=0)
    with pytest.raises(StoppedError):
        fine_tuned(encoder, data, settings_of(task), seed=0, stop=lambda: True)
