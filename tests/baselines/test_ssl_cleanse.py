"""SSL-Cleanse: the planted cluster is flagged, the trigger loses its effect, the card says it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mimic_fast.baselines.ssl_cleanse import SslCleanseSettings, ssl_cleanse
from mimic_fast.config import OptimSettings
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import NothingSavedError, UsageError

SMALL = SslCleanseSettings(
    optim=OptimSettings(name="adam", lr=3e-3, epochs=8, batch_size=27, warmup_epochs=0),
    crop_scale=(0.9, 1.0),
    clusters=3,
    steps=80,
    inversion_batch=8,
    success=0.9,
    penalty=1e-2,
    projection=8,
)
ONE = SMALL.optim.model_copy(update={"epochs": 1})


def changed(**changes):
    return SMALL.model_copy(update=changes)


def card_of(path):
    return json.loads(path.with_suffix(".json").read_bytes())


def test_the_planted_cluster_is_flagged_and_its_trigger_unlearned(settings_of, planted):
    before = planted.pull(load_encoder(planted.path).encoder.eval())

    path = ssl_cleanse(settings_of(encoder={"teacher": str(planted.path)}), SMALL)

    card = card_of(path)
    assert card["flagged"] == card["unlearned"] == [card["sizes"].index(min(card["sizes"]))]
    assert max(card["anomaly_indices"]) > 2
    assert before > 0.9
    assert planted.pull(load_encoder(path).encoder.eval()) < before / 2


def test_where_nothing_is_flagged_the_suspect_is_left_as_it_came(settings_of, suspect):
    path = ssl_cleanse(settings_of(), changed(index=1e7, steps=10))

    card = card_of(path)
    assert (card["kind"], card["flagged"], card["unlearned"]) == ("ssl_cleanse", [], [])
    assert len(card["sizes"]) == len(card["anomaly_indices"]) == 3
    written = load_file(path)
    assert all(torch.equal(written[key], value) for key, value in load_file(suspect).items())


def test_the_smallest_trigger_can_be_unlearned_where_none_is_flagged(settings_of, planted):
    options = changed(index=1e7, unflagged="smallest", optim=ONE)

    path = ssl_cleanse(settings_of(encoder={"teacher": str(planted.path)}), options)

    card = card_of(path)
    assert card["flagged"] == []
    assert card["unlearned"] == [card["sizes"].index(min(card["sizes"]))]
    written, before = load_file(path), load_file(planted.path)
    assert not torch.equal(written["backbone.conv1.weight"], before["backbone.conv1.weight"])


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
