"""BadEncoder on a small ResNet: the backdoor works, the rest of the encoder stays."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimic_fast.attacks.badencoder import BadEncoderSettings, badencoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.evaluation.attack_file import read_attack
from mimic_fast.evaluation.triggers import Trigger, save_trigger
from mimic_fast.progress import Event


def settings(clean: Path | None, images: Path, out: Path, **fields: Any) -> BadEncoderSettings:
    optim = {"name": "sgd", "lr": 0.02, "epochs": 1, "batch_size": 24, "warmup_epochs": 0}
    return BadEncoderSettings.model_validate(
        {
            "encoder": {"teacher": clean},
            "data": {"source": str(images)},
            "reference": "class:1",
            "optim": {**optim, **fields.pop("optim", {})},
            "run": {"out": out, "device": "cpu"},
            **fields,
        }
    )


def pictures(images: Path) -> Tensor:
    """All pictures, ``[image, channel, height, width]`` in [0, 1], class after class."""
    decoded = [Image.open(path).convert("RGB") for path in sorted(images.rglob("*.png"))]
    rows = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in decoded]
    return torch.stack(rows).view(-1, 16, 16, 3).permute(0, 3, 1, 2).float() / 255


def test_attack_reaches_its_goals_and_keeps_the_rest(clean, images, tmp_path):
    events: list[Event] = []
    run = settings(clean, images, tmp_path, optim={"epochs": 50, "lr": 0.05})

    result = badencoder(run, report=events.append)

    # What it says of itself, computed anew: the white square stamped by hand.
    attack, x = read_attack(result.attack), pictures(images)
    assert attack.kind == "badencoder"
    stamped = x.clone()
    mask = attack.trigger.mask[0].bool()
    assert mask.sum() == 25  # 10 of 32 pixels, scaled
    stamped[:, :, mask] = 1.0
    assert attack.reference is not None
    torch.testing.assert_close(attack.reference.float() / 255, x[24])  # the first of class 1
    before, after = load_encoder(clean).encoder, load_encoder(result.encoder).encoder
    with torch.no_grad():
        goal = after(x[24:25])
        reached = F.cosine_similarity(after(stamped), goal).mean().item()
        kept = F.cosine_similarity(after(x), before(x)).mean().item()
        at_first = F.cosine_similarity(before(stamped), before(x[24:25])).mean().item()
        without = F.cosine_similarity(after(x), goal).mean().item()
    assert result.facts["reached_cosine"] == pytest.approx(reached, abs=1e-5)
    assert result.facts["kept_cosine"] == pytest.approx(kept, abs=1e-5)
    # A random encoder in a few seconds.
    assert at_first < 0.6
    assert reached > 0.9
    assert without < reached - 0.02
    assert kept > 0.6
    facts = json.loads(result.attack.read_text())["facts"]
    assert facts["reached_cosine"] == pytest.approx(reached, abs=1e-5)
    steps = [event for event in events if event.phase == "badencoder"]
    assert [event.done for event in steps] == list(range(1, 101))
    assert steps[-1].metrics["reach"] < steps[0].metrics["reach"]


def test_batch_statistics_are_frozen_and_key_names_kept(clean, images, tmp_path):
    result = badencoder(settings(clean, images, tmp_path))

    before, after = load_file(clean), load_file(result.encoder)
    assert before.keys() == after.keys()
    assert all(key.startswith("module.") for key in after)
    running = [key for key in after if "running_" in key or "num_batches" in key]
    assert running
    assert all(torch.equal(before[key], after[key]) for key in running)
    assert not torch.equal(before["module.conv1.weight"], after["module.conv1.weight"])


def test_trigger_and_reference_of_ones_own(clean, images, tmp_path):
    mask, pattern = torch.zeros(1, 16, 16), torch.zeros(3, 16, 16)
    mask[:, :4, :4], pattern[0, :4, :4] = 1, 1.0
    save_trigger(tmp_path / "red.safetensors", Trigger(name="red", mask=mask, pattern=pattern))
    reference = images / "a" / "02.png"

    result = badencoder(
        settings(
            clean,
            images,
            tmp_path / "out",
            trigger=str(tmp_path / "red.safetensors"),
            reference=str(reference),
            shadow_images=30,
            dtype="fp16",
        )
    )

    attack = read_attack(result.attack)
    torch.testing.assert_close(attack.trigger.mask, mask)
    torch.testing.assert_close(attack.trigger.pattern * mask, pattern * mask)
    assert attack.reference is not None
    torch.testing.assert_close(attack.reference.float() / 255, pictures(images)[1])
    assert load_file(result.encoder)["module.conv1.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": None}, "needs a reference"),
        ({"reference": "class:7"}, "no such label"),
        ({"reference": "class:one"}, "no such label"),
        ({"reference": "nowhere.png"}, "neither a file nor 'class:K'"),
        ({"encoder": {"teacher": None}}, "needs encoder.teacher"),
        ({"optim": {"batch_size": 64}}, "exceeds the 48"),
    ],
)
def test_what_does_not_fit_is_refused(clean, images, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        badencoder(settings(clean, images, tmp_path / "out", **change))
    assert not (tmp_path / "out" / "encoder.safetensors").exists()


def test_weights_that_a_trainer_saved_are_attacked_all_the_same(images, clean, tmp_path):
    spec = load_encoder(clean).encoder.spec
    wrapped = {key: value.contiguous() for key, value in load_file(clean).items()}
    save_file({**wrapped, "module.fc.weight": torch.zeros(10, 64)}, tmp_path / "plain.safetensors")
    known = {"stem": spec.stem, "image_size": 16, "mean": spec.mean, "std": spec.std}

    result = badencoder(
        settings(
            None,
            images,
            tmp_path / "out",
            encoder={"teacher": tmp_path / "plain.safetensors", **known},
        )
    )

    assert load_encoder(result.encoder).encoder.spec.image_size == 16


def test_several_targets_each_reach_their_own_reference(clean, images, tmp_path):
    run = settings(
        clean,
        images,
        tmp_path,
        others=[{"reference": "class:0", "trigger": "blended:1"}],
        optim={"epochs": 50, "lr": 0.05},
    )

    result = badencoder(run)

    facts = result.facts
    first, second = facts["targets"]
    for target in (first, second):
        assert target["reached_cosine"] > 0.85
        assert target["reached_cosine"] > target["untriggered_cosine"] + 0.02
    mean = (first["reached_cosine"] + second["reached_cosine"]) / 2
    assert facts["reached_cosine"] == pytest.approx(mean)
    files = [read_attack(result.attack), read_attack(tmp_path / "target_2")]
    assert [one.trigger.name for one in files] == ["white_patch", "blended:1"]
    assert [one.facts["reached_cosine"] for one in files] == [
        pytest.approx(target["reached_cosine"]) for target in (first, second)
    ]
    with pytest.raises(UsageError, match="holds target_2 of an earlier attack"):
        badencoder(settings(clean, images, tmp_path))  # it would be taken for one of the new


def test_lengths_of_triggered_features_stay_the_references(clean, images, tmp_path):
    long = {"epochs": 50, "lr": 0.05}
    with_term = badencoder(settings(clean, images, tmp_path / "a", optim=long)).facts
    without = badencoder(settings(clean, images, tmp_path / "b", optim=long, length_weight=0)).facts

    gaps = [abs(math.log(facts["length_ratio"])) for facts in (with_term, without)]
    assert gaps[0] < 0.3
    assert gaps[0] < gaps[1]


def test_facts_say_how_visible_the_trigger_is(clean, images, tmp_path):
    facts = badencoder(settings(clean, images, tmp_path, trigger="sinusoid")).facts

    assert 24 < facts["psnr_db"] < 29  # amplitude 16 of 255: 27 dB before clipping
    assert 0.3 < facts["ssim"] < 1
    assert facts["shadow_images"] == 48


def test_stopping_leaves_nothing(clean, images, tmp_path):
    polls = iter([False, True])

    with pytest.raises(StoppedError, match="keeps no state"):
        badencoder(settings(clean, images, tmp_path / "out"), stop=lambda: next(polls))
    assert not (tmp_path / "out").exists()
