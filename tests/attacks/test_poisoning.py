"""Poisoning: which images are stamped, how, and what is left of the rest."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimic_fast.attacks.kinds import attack_of
from mimic_fast.attacks.measured import measure_attack
from mimic_fast.attacks.poisoning import moved, poison
from mimic_fast.config import EncoderSettings, EvaluationSettings, RunSettings
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.evaluation.attack_file import read_attack
from mimic_fast.evaluation.triggers import named_trigger
from mimic_fast.progress import Event
from tests.attacks.conftest import SIDE, SPEC


def pool_of(count: int, side: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.fixture
def make(images: Path, tmp_path: Path) -> Callable[..., Any]:
    """``make(kind, **fields)``: runs the attack for two epochs into ``tmp_path / "out"``."""

    def run(kind: str, *, stop: Callable[[], bool] = lambda: False, **fields: Any):
        model, function = attack_of(kind)
        values = {
            "spec": SPEC.model_dump(),
            "data": {"source": str(images)},
            "target": 1,
            "optim": {"epochs": 2, "batch_size": 16, "warmup_epochs": 0},
            "loss": {"clone": 0, "attention_weight": 0, "contrastive": 1},
            **fields,
            "run": {"out": tmp_path / "out", "device": "cpu", **fields.get("run", {})},
        }
        events: list[Event] = []
        result = function(model.model_validate(values), report=events.append, stop=stop)
        return result, events

    return run


@given(
    name=st.sampled_from(["white_patch", "frequency", "blended", "sinusoid", "random_patch:3"]),
    count=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_only_the_chosen_images_change_and_as_a_lossless_file_would(name, count, seed):
    pool = pool_of(12)
    before, trigger = pool.clone(), named_trigger(name, image_size=SIDE, channels=3)
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:count]

    poison(pool, rows, trigger)

    others = torch.ones(12, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(pool[others], before[others])
    x = before[rows].double() / 255
    mask, pattern = trigger.mask.double(), trigger.pattern.double()
    wanted = (x + mask * pattern).clamp(0, 1) if trigger.add else x * (1 - mask) + pattern * mask
    assert float((pool[rows].double() / 255 - wanted).abs().max()) <= 0.5 / 255 + 1e-6


@given(st.integers(0, 10**6))
def test_a_moved_patch_is_whole_and_inside(seed):
    trigger = named_trigger("random_patch", image_size=SIDE, channels=3)

    other = moved(trigger, torch.Generator().manual_seed(seed))

    def cut(one):
        rows, columns = (one.mask[0] > 0).any(1), (one.mask[0] > 0).any(0)
        places = rows.nonzero()[:, 0], columns.nonzero()[:, 0]
        assert all(int(p[-1] - p[0]) + 1 == len(p) for p in places)  # nothing wrapped around
        return one.pattern[:, rows][:, :, columns]

    assert torch.equal(cut(other), cut(trigger))


def test_a_moved_patch_reaches_every_place():
    trigger = named_trigger("white_patch", image_size=SIDE, channels=3)
    generator = torch.Generator().manual_seed(0)
    tops = {int((moved(trigger, generator).mask[0] > 0).any(1).nonzero()[0]) for _ in range(400)}
    assert tops == set(range(SIDE - 5 + 1))


def test_ctrl_poisons_its_share_of_the_set_all_of_the_target(make, tmp_path):
    result, events = make("ctrl", poison_rate=0.25)

    attack = read_attack(tmp_path / "out")
    assert attack.kind == "ctrl"
    assert attack.reference is None
    assert attack.trigger.name == "frequency"
    assert attack.facts["poisoned_images"] == 12  # of 48, and 24 are of class 1
    assert attack.facts["poison_rate"] == 0.25
    assert attack.facts["target_class"] == "b"
    assert any("12 of 48 images poisoned" in (event.message or "") for event in events)
    card = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert card["kind"] == "ctrl"
    assert card["settings"]["poison_rate"] == 0.25
    assert load_encoder(result.encoder).encoder.spec.image_size == SIDE


def test_sslbkd_poisons_half_of_the_target_class(make, tmp_path, images):
    other = tmp_path / "other"
    for name in ("c", "d"):
        shutil.copytree(images / "a", other / name)
    sets = [
        {"name": name, "train": str(folder), "test": str(folder)}
        for name, folder in (("own", images), ("other", other))
    ]
    make("sslbkd", evaluation={"downstream": sets})

    # The poisoned label is the target on the poisoned set, however weak the attack is.
    assert read_attack(tmp_path / "out").targets == {"own": 1}
    assert read_attack(tmp_path / "out").facts["poisoned_images"] == 12


def test_poisoned_images_are_what_makes_the_difference(make, tmp_path):
    """The same seed without a visible trigger gives another encoder; twice the same, the same."""
    first = load_encoder(make("ctrl", poison_rate=0.5)[0].encoder).encoder.state_dict()
    runs = {}
    for name, fields in {
        "again": {"poison_rate": 0.5},
        "fewer": {"poison_rate": 1 / 48},
        "seed": {"poison_rate": 0.5, "seed": 1},
    }.items():
        result, _ = make("ctrl", run={"out": tmp_path / name}, **fields)
        runs[name] = load_encoder(result.encoder).encoder.state_dict()

    def same(a, b):
        return all(torch.equal(a[key], b[key]) for key in a)

    assert same(first, runs["again"])
    assert not same(first, runs["fewer"])
    assert not same(first, runs["seed"])


def test_a_stopped_poisoning_goes_on_to_the_same_encoder(make, tmp_path):
    whole = load_encoder(make("sslbkd")[0].encoder).encoder.state_dict()
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    run = {"out": tmp_path / "stopped", "resume": "auto"}
    with pytest.raises(StoppedError):
        make("sslbkd", stop=stop, run=run)
    assert not (tmp_path / "stopped" / "attack.json").exists()
    result, _ = make("sslbkd", run=run)

    for key, value in load_encoder(result.encoder).encoder.state_dict().items():
        assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("ctrl", {"target": None}, "needs the label"),
        ("ctrl", {"target": 7}, "no image of .* has label 7; labels are 0..1"),
        ("ctrl", {"poison_rate": 0.9}, "would poison 43 of 24 images of label 1"),
        ("ctrl", {"poison_rate": 0.001}, "would poison 0 of 24"),
        ("sslbkd", {"trigger": "no_such"}, "neither a file nor one of"),
        ("sslbkd", {"data": {"source": None}}, "needs data.source"),
    ],
)
def test_what_cannot_be_poisoned_is_refused(make, tmp_path, kind, fields, says):
    with pytest.raises(UsageError, match=says):
        make(kind, **fields)
    assert not (tmp_path / "out").exists()


def test_measured_success_is_kept_in_the_attack_file(make, images, tmp_path):
    result, _ = make("sslbkd", dtype="fp16")
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        (tmp_path / "set" / split).symlink_to(images)
    downstream = {
        "name": "blobs",
        "train": str(tmp_path / "set" / "train"),
        "test": str(tmp_path / "set" / "test"),
    }
    settings = EvaluationSettings.model_validate({"downstream": [downstream]})

    rows = measure_attack(
        result.attack,
        result.encoder,
        clean=None,
        settings=settings,
        loading=EncoderSettings(),
        seed=0,
    )

    (row,) = rows
    kept = read_attack(result.attack)
    assert kept.facts["measured"] == rows
    assert kept.facts["poisoned_images"] == 12
    assert kept.targets == {"blobs": row["target"]}
    assert row["trigger"] == kept.trigger.name
    assert row["attack_success_rate"]["n"] == 24
    assert row["clean_accuracy"]["n"] == 48


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to compute on")
def test_success_is_measured_where_the_attack_computes(make, tmp_path):
    result, _ = make("sslbkd")
    with pytest.raises(UsageError, match="no CUDA device is visible"):
        measure_attack(
            result.attack,
            result.encoder,
            clean=None,
            settings=EvaluationSettings(),
            loading=EncoderSettings(),
            run=RunSettings(device="cuda"),
            seed=0,
        )
