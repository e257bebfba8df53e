"""BCU: which weights are drawn anew, what is learned from the suspect, and how softly."""

import json
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from mimic_fast.baselines.bcu import (
    BcuSettings,
    bcu,
    reinitialize,
    softened_loss,
    stage_shares,
    temperature_at,
)
from mimic_fast.config import EncoderSpec, OptimSettings
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.encoders.taps import default_taps
from mimic_fast.errors import DivergedError, NothingSavedError, UsageError

SHORT = OptimSettings(name="sgd", lr=0.02, momentum=0.9, epochs=4, batch_size=27, warmup_epochs=0)
VIT = EncoderSpec(
    architecture="timm:vit_tiny_patch16_224",
    arguments={"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2},
    image_size=16,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
)
SHARES = (0.01, 0.03, 0.09, 0.27)


@pytest.fixture
def changed(suspect):
    """``changed(shares)``: old and new state of the suspect, and what was counted."""

    def make(shares, *, encoder=None):
        encoder = encoder or load_encoder(suspect).encoder
        old = {k: v.clone() for k, v in encoder.backbone.state_dict().items()}
        taps = default_taps(encoder)
        drawn = reinitialize(encoder, taps, shares, seed=0)
        return old, encoder.backbone.state_dict(), drawn

    return make


def test_the_papers_shares_come_out_for_four_stages():
    assert stage_shares(4, BcuSettings()) == pytest.approx((*SHARES, 0.1))


@pytest.mark.parametrize("stages", [2, 3, 12])
def test_shares_rise_from_the_first_to_the_last_stage(stages):
    shares = stage_shares(stages, BcuSettings(first_share=0.05, last_share=0.5, head_share=0.2))

    assert all(shallow < deep for shallow, deep in pairwise(shares[:-1]))
    assert (shares[0], shares[-2], shares[-1]) == pytest.approx((0.05, 0.5, 0.2))


def test_a_single_stage_has_the_last_share():
    assert stage_shares(1, BcuSettings()) == pytest.approx((0.27, 0.1))


def test_every_convolution_loses_exactly_its_stages_share(changed):
    old, new, drawn = changed((*SHARES, 0.1))

    counted, sizes = [0] * 5, [0] * 4
    for name, before in old.items():
        differing = int((before != new[name]).sum())
        if before.ndim != 4:
            assert differing == 0, name  # BatchNorm: weights, biases and statistics
            continue
        stage = int(name[5]) - 1 if name.startswith("layer") else 0
        assert differing == round(SHARES[stage] * before.numel()), name
        counted[stage] += differing
        sizes[stage] += before.numel()
    assert drawn == tuple(counted)
    rates = [count / size for count, size in zip(drawn, sizes, strict=False)]
    assert rates == pytest.approx(SHARES, rel=0.05)


def test_new_numbers_are_those_of_a_random_encoder(changed, suspect):
    old, new, _ = changed((0.5, 0.5, 0.5, 0.5, 0.5))
    fresh = build_encoder(load_encoder(suspect).encoder.spec, seed=0).backbone.state_dict()

    for name, before in old.items():
        where = before != new[name]
        assert torch.equal(new[name][where], fresh[name][where])


def test_a_vit_keeps_tokens_positions_and_norms(changed):
    encoder = build_encoder(VIT, seed=1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.5)  # no number is that of a fresh encoder

    old, new, _ = changed((0.1, 0.2, 0.4, 1.0), encoder=encoder)

    for name, before in old.items():
        differing = int((before != new[name]).sum())
        if "norm" in name or name in ("cls_token", "pos_embed"):
            assert differing == 0, name
        else:
            stage = int(name.split(".")[1]) if name.startswith("blocks") else 0
            assert differing == round((0.1, 0.2, 0.4)[stage] * before.numel()), name


def test_what_follows_the_last_stage_has_the_heads_share(suspect):
    encoder = load_encoder(suspect).encoder
    old = {k: v.clone() for k, v in encoder.backbone.state_dict().items()}

    drawn = reinitialize(encoder, ("layer1", "layer2"), (0.0, 0.0, 0.5), seed=0)

    new = encoder.backbone.state_dict()
    touched = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert touched == {"layer3", "layer4"}
    assert drawn[:2] == (0, 0)


def test_the_softened_loss_is_the_divergence_of_naive_softmaxes():
    generator = torch.Generator().manual_seed(0)
    mine, theirs = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)

    def probabilities(features, i):
        exps = []
        for j in range(5):
            cosine = features[i] @ theirs[j] / (features[i].norm() * theirs[j].norm())
            exps.append(math.exp(cosine / 0.3))
        return [e / sum(exps) for e in exps]

    expected = 0.0
    for i in range(5):
        p, q = probabilities(theirs, i), probabilities(mine, i)
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 5
    got = softened_loss(mine, theirs, temperature=0.3)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_the_softened_loss_of_agreeing_directions_is_zero_and_rotations_are_seen():
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))

    same = softened_loss(3 * features, features, temperature=0.1)
    rolled = softened_loss(features.roll(1, 1), features, temperature=0.1)

    torch.testing.assert_close(same, torch.tensor(0.0), atol=1e-6, rtol=0)
    assert rolled > 0.1


def test_the_temperature_rises_by_the_pass_to_its_multiple():
    options = BcuSettings(optim=SHORT.model_copy(update={"epochs": 3}), temperature=0.2, rise=4.0)

    found = [temperature_at(step, images=81, options=options) for step in range(9)]

    assert found == pytest.approx([0.4] * 3 + [0.6] * 3 + [0.8] * 3)


def test_distillation_comes_back_to_the_suspect_and_the_card_says_what_was_drawn(
    settings_of, suspect
):
    seen = []
    options = BcuSettings(optim=SHORT, first_share=0.1, last_share=0.8, crop_scale=(0.6, 1.0))

    path = bcu(settings_of(), options, report=seen.append)

    losses = [event.metrics for event in seen if event.phase == "bcu"]
    assert len(losses) == 12
    assert sum(m["cosine"] for m in losses[-3:]) < sum(m["cosine"] for m in losses[:3])
    card = json.loads(path.with_suffix(".json").read_bytes())
    assert card["kind"] == "bcu"
    assert card["shares"] == pytest.approx(
        {"layer1": 0.1, "layer2": 0.2, "layer3": 0.4, "layer4": 0.8, "head": 0.1}
    )
    assert all(card["reinitialized"][stage] > 0 for stage in card["shares"] if stage != "head")
    assert card["reinitialized"]["head"] == 0
    written, before = load_file(path), load_file(suspect)
    assert written.keys() == before.keys()
    assert not load_encoder(path).encoder.training


def test_taps_of_the_settings_are_the_stages(settings_of, suspect):
    taps = ["layer2", "layer4"]
    settings = settings_of(encoder={"teacher": str(suspect), "taps": taps})

    path = bcu(settings, BcuSettings(optim=SHORT.model_copy(update={"epochs": 1})))

    assert list(json.loads(path.with_suffix(".json").read_bytes())["shares"]) == [*taps, "head"]


def test_a_tap_that_does_not_exist_is_refused(settings_of, suspect):
    settings = settings_of(encoder={"teacher": str(suspect), "taps": ["layer9"]})
    with pytest.raises(UsageError, match="tap layer 'layer9' is not in"):
        bcu(settings, BcuSettings(optim=SHORT))


def test_a_batch_larger_than_the_clean_set_is_refused(settings_of):
    with pytest.raises(UsageError, match="exceeds the 81 training images"):
        bcu(settings_of(), BcuSettings())


def test_it_can_be_stopped(settings_of):
    with pytest.raises(NothingSavedError, match="bcu keeps no state"):
        bcu(settings_of(), BcuSettings(optim=SHORT), stop=lambda: True)


def test_divergence_ends_it(settings_of):
    wild = SHORT.model_copy(update={"lr": 1e30, "clip_norm": 0.0, "schedule": "constant"})
    with pytest.raises(DivergedError, match="bcu diverged"):
        bcu(settings_of(), BcuSettings(optim=wild))
