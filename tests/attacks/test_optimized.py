"""Attacks that optimize their trigger: what they leave is bounded, stored exactly and works."""

import pytest
import torch
import torch.nn.functional as F

from mimic_fast.attacks.adaptive import AdaptiveSettings, adaptive
from mimic_fast.attacks.inactive import InactiveSettings, inactive
from mimic_fast.attacks.stand_in import heading
from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import NothingSavedError, UsageError
from mimic_fast.evaluation.attack_file import read_attack
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.triggers import blended, random_patch

SHORT = {"optim": {"epochs": 60, "lr": 0.05}}


def reached(result, pictures):
    """Mean cosine with the reference from the files alone."""
    attack, encoder = read_attack(result.attack), load_encoder(result.encoder).encoder
    assert attack.reference is not None
    goal = encode(encoder, attack.reference[None])
    return F.cosine_similarity(encode(encoder, pictures, trigger=attack.trigger), goal).mean()


@pytest.fixture
def pictures(images):
    from mimic_fast.data.images import load_images
    from mimic_fast.data.sources import open_source

    source = open_source(str(images))
    return load_images(source, range(len(source)), image_size=16, channels=3)[0]


def test_inactive_trigger_is_small_and_what_the_facts_say(values, pictures):
    run = InactiveSettings.model_validate(values(**SHORT, trigger_steps=20))

    result = inactive(run)

    attack = read_attack(result.attack)
    assert attack.kind == "inactive"
    assert attack.trigger.add
    assert attack.trigger.pattern.abs().max() <= 8 / 255 + 1e-6
    steps = attack.trigger.pattern * 255
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert steps.abs().max() > 0
    assert result.facts["psnr_db"] > 30
    assert result.facts["largest_change"] <= 8 / 255 + 1e-6
    assert -1 <= result.facts["augmented_cosine"] <= 1
    assert reached(result, pictures).item() == pytest.approx(
        result.facts["reached_cosine"], abs=1e-4
    )
    assert result.facts["reached_cosine"] > result.facts["untriggered_cosine"] + 0.02


def test_adaptive_trigger_stays_in_its_place(values, pictures):
    run = AdaptiveSettings.model_validate(
        values(trigger_steps=10, stand_in_steps=10, survive_images=8)
    )

    result = adaptive(run)

    attack = read_attack(result.attack)
    start = random_patch(image_size=16, channels=3)
    assert attack.kind == "adaptive"
    assert not attack.trigger.add
    assert torch.equal(attack.trigger.mask, start.mask)
    inside = start.mask.bool().expand_as(start.pattern)
    assert not torch.equal(attack.trigger.pattern[inside], start.pattern[inside])
    assert attack.trigger.pattern.min() >= 0
    assert attack.trigger.pattern.max() <= 1
    assert -1 <= result.facts["stand_in_heading"] <= 1
    # Facts are of the 38 images that were not held out, these are of all.
    assert reached(result, pictures).item() == pytest.approx(
        result.facts["reached_cosine"], abs=0.05
    )


def test_adaptive_trigger_heads_for_the_reference(values, pictures, clean):
    # Blended: an untrained ResNet's residual branches are zero and would not see a small patch.
    run = AdaptiveSettings.model_validate(
        values(
            trigger="blended", trigger_steps=40, stand_in_steps=10, survive_images=8, refine_lr=0
        )
    )

    attack = read_attack(adaptive(run).attack)

    start, encoder = blended(None, image_size=16, channels=3), load_encoder(clean).encoder
    assert attack.reference is not None
    plain, goal = encode(encoder, pictures), encode(encoder, attack.reference[None])
    before, after = (
        heading(encode(encoder, pictures, trigger=trigger), plain, goal).item()
        for trigger in (start, attack.trigger)
    )
    assert after > before + 0.1


def test_adaptive_takes_triggers_that_are_added(values):
    run = AdaptiveSettings.model_validate(
        values(
            trigger="sinusoid",
            bound=0.05,
            trigger_steps=2,
            stand_in_steps=2,
            survive_weight=0,
            attention=0,
        )
    )

    trigger = read_attack(adaptive(run).attack).trigger

    assert trigger.add
    assert trigger.pattern.abs().max() <= 0.05 + 1 / 510


@pytest.mark.parametrize(
    ("model", "function"), [(InactiveSettings, inactive), (AdaptiveSettings, adaptive)]
)
def test_one_target_alone_and_stoppable(values, tmp_path, model, function):
    other = [{"reference": "class:0", "trigger": "blended"}]
    with pytest.raises(UsageError, match="leave others out"):
        function(model.model_validate(values(others=other)))

    with pytest.raises(NothingSavedError):
        function(model.model_validate(values()), stop=lambda: True)
    assert not (tmp_path / "out").exists()


def test_inactive_takes_no_trigger(values):
    with pytest.raises(UsageError, match="makes its own trigger"):
        inactive(InactiveSettings.model_validate(values(trigger="sinusoid")))


def test_adaptive_attacks_a_transformer(values, tmp_path):
    spec = EncoderSpec(
        architecture="timm:vit_tiny_patch16_224",
        arguments={"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
        image_size=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    clean = export_encoder(
        build_encoder(spec, seed=0).eval(), tmp_path / "vit", key_map=None, card={}
    )
    run = AdaptiveSettings.model_validate(
        values(
            encoder={"teacher": clean, "taps": ("blocks.1",)},
            trigger_steps=2,
            stand_in_steps=2,
            survive_images=4,
        )
    )

    assert -1 <= adaptive(run).facts["stand_in_heading"] <= 1


def test_held_out_images_must_leave_a_batch(values):
    with pytest.raises(UsageError, match="exceeds the 24 shadow images"):
        adaptive(AdaptiveSettings.model_validate(values(held_out=0.5, optim={"batch_size": 30})))
