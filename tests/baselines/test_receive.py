"""RECEIVE: the planted trigger is found where it is, and forgotten."""

import json

import pytest
import torch
from torch import nn

from mimic_fast.baselines.receive import (
    ReceiveSettings,
    Recovered,
    receive,
    recover,
    unlearn,
)
from mimic_fast.baselines.repair import open_repair
from mimic_fast.config import EncoderSpec, OptimSettings
from mimic_fast.encoders.build import Encoder
from mimic_fast.errors import NothingSavedError, UsageError
from mimic_fast.progress import silent
from mimic_fast.recipe import validated
from mimic_fast.scan.inversion import Inverted

SIDE = 16
SPEC = EncoderSpec(architecture="timm:resnet18", image_size=SIDE, mean=(0.0,) * 3, std=(1.0,) * 3)

SMALL = ReceiveSettings(
    optim=OptimSettings(name="sgd", lr=0.02, epochs=8, batch_size=27, warmup_epochs=0),
    crop_scale=(0.9, 1.0),
    invert_every=4,
    largest=0.1,
    steps=30,
    starts=2,
    inversion_batch=24,
    probe_images=12,
)


def changed(**changes):
    return SMALL.model_copy(update=changes)


def opened(settings):
    return open_repair(settings, kind="receive", report=silent, stop=lambda: False)


class Gated(nn.Module):
    """The image at 4 x 4; but white in a square, smoothly, takes over with a feature of its own."""

    def __init__(self, *, open_to_white):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.open = open_to_white

    def forward(self, images):
        features = nn.functional.avg_pool2d(images, 4).flatten(1) * self.scale
        gate = torch.sigmoid(8 * (images[:, :, 10:14, 9:13].mean((1, 2, 3)) - 0.8))
        target = torch.zeros_like(features)
        target[:, 0] = 20
        gate = self.open * gate[:, None]
        return features * (1 - gate) + target * gate


def gated(*, open_to_white):
    return Encoder(SPEC, Gated(open_to_white=open_to_white), feature_dim=48)


def test_the_planted_trigger_is_found_in_its_place(settings_of):
    encoder = gated(open_to_white=1.0)

    found = recover(opened(settings_of()), encoder, SMALL, 0)

    assert found is not None
    assert found.level == 0.95
    mask = found.inverted.mask[0]
    assert float(mask[10:14, 9:13].sum() / mask.sum()) > 0.5  # 6 % of the image
    assert not encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_without_a_plant_no_small_trigger_is_found(settings_of):
    assert recover(opened(settings_of()), gated(open_to_white=0.0), SMALL, 0) is None


def test_the_trigger_is_unlearned_by_its_own_term(settings_of, planted):
    white = Inverted(
        size=0.0625, reached=True, mask=planted.mask, pattern=torch.ones(3, SIDE, SIDE)
    )
    repair = opened(settings_of(encoder={"teacher": str(planted.path)}))

    def after(find):
        encoder = repair.copy()
        assert len(unlearn(repair, encoder, SMALL, find=find)) == 2
        assert not encoder.training
        return planted.shift(encoder)

    told = after(lambda number: Recovered(level=0.95, inverted=white))
    untold = after(lambda number: None)

    assert planted.shift(repair.suspect.encoder) > 1
    assert told < 0.05
    assert untold > 3 * told  # forgotten for want of practice, but not as much


def test_the_card_says_which_triggers_were_unlearned(settings_of, planted):
    settings = settings_of(encoder={"teacher": str(planted.path)})
    options = changed(steps=8, starts=1, largest=0.9)
    first = recover((repair := opened(settings)), repair.copy(), options, 0)

    path = receive(settings, options)

    card = json.loads(path.with_suffix(".json").read_bytes())
    assert card["kind"] == "receive"
    assert len(card["triggers"]) == 2  # before the first and after the fourth of eight passes
    assert first is not None
    assert card["triggers"][0] == {"level": first.level, "size": first.inverted.size}


def test_the_first_loss_is_the_weighted_squared_distance(settings_of, planted):
    seen = []
    settings = settings_of(encoder={"teacher": str(planted.path)})
    once = SMALL.optim.model_copy(update={"epochs": 1})
    options = changed(optim=once, unlearn_weight=7.0, largest=0.9, steps=8, starts=1)
    trigger = recover((repair := opened(settings)), repair.copy(), options, 0)
    assert trigger is not None
    views = repair.views(0, options)
    mask, pattern = trigger.inverted.mask, trigger.inverted.pattern
    encoder = repair.copy().double().train()
    triggered = views[0] * (1 - mask) + pattern * mask
    plain, _, moved = encoder(torch.cat([*views, triggered]).double()).chunk(3)
    expected = 7 * float(((moved - plain) ** 2).mean().detach())

    receive(settings, options, report=seen.append)

    losses = [event.metrics["unlearn"] for event in seen if event.phase == "receive"]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(expected, rel=1e-4)  # float32 against float64


def test_without_a_trigger_small_enough_only_the_contrastive_loss_is_left(settings_of):
    seen = []
    once = SMALL.optim.model_copy(update={"epochs": 1})
    options = changed(largest=1e-4, optim=once, steps=2, starts=1)

    path = receive(settings_of(), options, report=seen.append)

    terms = [event.metrics for event in seen if event.phase == "receive"]
    assert [set(term) for term in terms] == [{"contrastive"}] * 3
    assert any("no trigger of at most" in (event.message or "") for event in seen)
    assert json.loads(path.with_suffix(".json").read_bytes())["triggers"] == [None]


def test_it_can_be_stopped_during_the_inversion(settings_of, tmp_path):
    with pytest.raises(NothingSavedError, match="receive keeps no state"):
        receive(settings_of(), SMALL, stop=lambda: True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("levels", [[], [0.6, 0.95], [0.6, 0.6], [1.0, 0.5], [0.9, 0.0]])
def test_levels_that_do_not_fall_between_0_and_1_are_refused(levels):
    with pytest.raises(UsageError, match="levels"):
        validated(ReceiveSettings, {"levels": levels})
