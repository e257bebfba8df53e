"""SSL-Cleanse: the planted cluster is flagged, the trigger loses its effect, the card says it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mimic_fast.baselines.repair import open_repair
from mimic_fast.baselines.ssl_cleanse import SslCleanseSettings, ssl_cleanse, unlearn
from mimic_fast.config import OptimSettings
from mimic_fast.errors import NothingSavedError, UsageError
from mimic_fast.progress import silent

SMALL = SslCleanseSettings(
    optim=OptimSettings(name="adam", lr=1e-2, epochs=6, batch_size=27, warmup_epochs=0),
    crop_scale=(0.9, 1.0),
    clusters=3,
    steps=40,
    inversion_batch=8,
    success=0.9,
    penalty=1e-2,
    projection=8,
)
ONE = SMALL.optim.model_copy(update={"epochs": 1})


def changed(**changes):
    return SMALL.model_copy(update=changes)


def changed_weights(path, before):
    written = load_file(path)
    return any(not torch.equal(written[key], value) for key, value in load_file(before).items())


def card_of(path):
    return json.loads(path.with_suffix(".json").read_bytes())


def test_the_planted_trigger_is_unlearned_when_it_is_known(settings_of, planted):
    settings = settings_of(encoder={"teacher": str(planted.path)})
    repair = open_repair(settings, kind="ssl_cleanse", report=silent, stop=lambda: False)
    white = torch.ones(3, *planted.mask.shape[1:])

    def after(mask):
        encoder = repair.copy()
        unlearn(repair, encoder, SMALL, [(mask, white)])
        assert not encoder.training
        return planted.shift(encoder)

    told, untold = after(planted.mask), after(torch.zeros_like(planted.mask))

    assert planted.shift(repair.suspect.encoder) > 1
    assert told < 0.15
    assert untold > 3 * told  # forgotten for want of practice, but not as much


def test_a_cluster_that_stands_out_is_flagged_and_unlearned(settings_of, planted):
    path = ssl_cleanse(
        settings_of(encoder={"teacher": str(planted.path)}), changed(index=0.1, optim=ONE)
    )

    card = card_of(path)
    above = [k for k, index in enumerate(card["anomaly_indices"]) if index > 0.1]
    assert above  # of three sizes that differ
    assert card["flagged"] == card["unlearned"] == above
    assert changed_weights(path, planted.path)


def test_where_nothing_is_flagged_the_suspect_is_left_as_it_came(settings_of, suspect):
    path = ssl_cleanse(settings_of(), changed(index=1e7, steps=10))

    card = card_of(path)
    assert (card["kind"], card["flagged"], card["unlearned"]) == ("ssl_cleanse", [], [])
    assert len(card["sizes"]) == len(card["anomaly_indices"]) == 3
    assert not changed_weights(path, suspect)


def test_the_smallest_trigger_can_be_unlearned_where_none_is_flagged(settings_of, planted):
    options = changed(index=1e7, unflagged="smallest", optim=ONE)

    path = ssl_cleanse(settings_of(encoder={"teacher": str(planted.path)}), options)

    card = card_of(path)
    assert card["flagged"] == []
    assert card["unlearned"] == [card["sizes"].index(min(card["sizes"]))]
    assert changed_weights(path, planted.path)


def test_weights_scale_the_losses_of_the_first_step(settings_of, planted):
    def first(**changes):
        seen = []
        options = changed(index=1e7, unflagged="smallest", optim=ONE, **changes)
        settings = settings_of(encoder={"teacher": str(planted.path)})
        ssl_cleanse(settings, options, report=seen.append)
        return next(event.metrics for event in seen if event.phase == "ssl_cleanse")

    one, other = first(), first(byol_weight=3.0, unlearn_weight=0.5)

    assert 0 < one["unlearn"] <= 4
    assert other["byol"] == pytest.approx(3 * one["byol"], rel=1e-5)
    assert other["unlearn"] == pytest.approx(one["unlearn"] / 2, rel=1e-5)


def test_it_can_be_stopped_during_the_inversion(settings_of, tmp_path):
    with pytest.raises(NothingSavedError, match="ssl_cleanse keeps no state"):
        ssl_cleanse(settings_of(), SMALL, stop=lambda: True)
    assert not (tmp_path / "out").exists()


def test_more_clusters_than_images_are_refused(settings_of):
    with pytest.raises(UsageError, match="asked for 82 clusters"):
        ssl_cleanse(settings_of(), changed(clusters=82))
