"""RECEIVE: the planted trigger is found where it is, and forgotten."""

import json

import pytest
import torch

from mimic_fast.baselines.receive import ReceiveSettings, receive, recover
from mimic_fast.baselines.repair import open_repair
from mimic_fast.config import OptimSettings
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import NothingSavedError, UsageError
from mimic_fast.progress import silent
from mimic_fast.recipe import validated

SMALL = ReceiveSettings(
    optim=OptimSettings(name="sgd", lr=0.02, epochs=8, batch_size=27, warmup_epochs=0),
    crop_scale=(0.9, 1.0),
    invert_every=4,
    steps=30,
    starts=2,
    inversion_batch=24,
    probe_images=12,
)


def changed(**changes):
    return SMALL.model_copy(update=changes)


def opened(settings):
    return open_repair(settings, kind="receive", report=silent, stop=lambda: False)


def test_the_planted_trigger_is_found_in_its_place(settings_of, planted):
    repair = opened(settings_of(encoder={"teacher": str(planted.path)}))
    encoder = repair.copy()

    found = recover(repair, encoder, SMALL, number=0)

    assert found is not None
    mask = found.inverted.mask
    inside = float((mask * planted.mask).sum() / mask.sum())
    assert inside > 0.5  # 6 % of the image
    assert found.inverted.size < 0.15
    assert not encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_the_planted_trigger_is_unlearned(settings_of, planted):
    settings = settings_of(encoder={"teacher": str(planted.path)})
    before = planted.pull(load_encoder(planted.path).encoder.eval())

    path = receive(settings, SMALL)

    after = planted.pull(load_encoder(path).encoder.eval())
    assert before > 0.9
    assert after < before / 2
    card = json.loads(path.with_suffix(".json").read_bytes())
    assert card["kind"] == "receive"
    assert len(card["triggers"]) == 2  # before the first and after the fourth of eight passes
    assert card["triggers"][0]["size"] < 0.15


def test_the_first_loss_is_the_weighted_squared_distance(settings_of, planted):
    seen = []
    settings = settings_of(encoder={"teacher": str(planted.path)})
    options = changed(optim=SMALL.optim.model_copy(update={"epochs": 1}), unlearn_weight=7.0)
    trigger = recover((repair := opened(settings)), repair.copy(), options, number=0)
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
    options = changed(largest=1e-4, optim=SMALL.optim.model_copy(update={"epochs": 1}), steps=2)

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
