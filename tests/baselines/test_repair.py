"""What all repairs share: the copy, the batches, the loop, and what is left."""

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from mimic_fast.baselines.fine_tuning import FineTuningSettings, fine_tuning
from mimic_fast.baselines.repair import (
    ContrastSettings,
    RepairSettings,
    ViewSettings,
    leave_repaired,
    minimize,
    open_repair,
    tell,
)
from mimic_fast.config import OptimSettings
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import DivergedError, NothingSavedError, UsageError
from mimic_fast.losses import contrastive_loss
from mimic_fast.progress import silent

SHORT = OptimSettings(name="sgd", lr=0.01, epochs=2, batch_size=27, warmup_epochs=0)


def opened(settings, **changes):
    return open_repair(
        settings, **{"kind": "test", "report": silent, "stop": lambda: False, **changes}
    )


def test_the_copy_is_trained_and_the_suspect_stays(settings_of):
    repair = opened(settings_of())
    before = {k: v.clone() for k, v in repair.suspect.encoder.state_dict().items()}
    encoder = repair.copy()
    minimize(
        repair,
        encoder,
        lambda step: {"size": encoder(repair.images[repair.batch(step, SHORT)]).square().mean()},
        optim=SHORT,
    )

    after = repair.suspect.encoder.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(
        encoder.state_dict()["backbone.conv1.weight"], before["backbone.conv1.weight"]
    )


def test_a_pass_takes_every_image_but_the_held_out_ones_once(settings_of):
    repair = opened(settings_of())

    ids = torch.cat([repair.batch(step, SHORT) for step in range(3)])

    assert sorted(ids.tolist()) == list(range(81))


def test_views_are_those_of_step_and_seed_and_differ_from_each_other(settings_of):
    options = ViewSettings(optim=SHORT)
    first, second = opened(settings_of()).views(1, options)
    again, _ = opened(settings_of()).views(1, options)
    other, _ = opened(settings_of(seed=1)).views(1, options)

    assert first.shape == (27, 3, 16, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_steps_are_those_of_the_epochs_and_the_rate_falls_to_zero(settings_of):
    repair = opened(settings_of())
    encoder, seen = repair.copy(), []
    minimize(
        repair,
        encoder,
        lambda step: {"size": encoder(repair.images[:4]).square().mean()},
        optim=SHORT,
        after=seen.append,
    )

    assert seen == list(range(6))  # 2 passes over 81 images in batches of 27


def test_a_loss_that_is_not_finite_ends_the_repair(settings_of):
    repair = opened(settings_of())
    encoder = repair.copy()

    with pytest.raises(DivergedError, match="test diverged at step 1"):
        minimize(
            repair,
            encoder,
            lambda step: {"broken": encoder(repair.images[:4]).sum() * torch.nan},
            optim=SHORT,
        )


def test_a_stopped_repair_writes_nothing(settings_of, tmp_path):
    with pytest.raises(NothingSavedError, match="fine_tuning keeps no state"):
        fine_tuning(settings_of(), FineTuningSettings(optim=SHORT), stop=lambda: True)
    assert not (tmp_path / "out").exists()


def test_a_batch_larger_than_the_clean_set_is_refused(settings_of):
    with pytest.raises(UsageError, match="exceeds the 81 training images"):
        fine_tuning(settings_of(), FineTuningSettings())


def test_what_is_left_can_be_loaded_and_says_what_was_done(settings_of, suspect):
    repair = opened(settings_of())

    path = leave_repaired(repair, repair.copy(), RepairSettings(optim=SHORT), facts={"pruned": 3})

    card = json.loads(path.with_suffix(".json").read_bytes())
    assert (card["kind"], card["clean_images"], card["pruned"]) == ("test", 81, 3)
    assert card["settings"]["optim"]["epochs"] == 2
    assert card["suspect"] == load_encoder(suspect).sha256
    written = load_file(path)
    assert all(torch.equal(written[k], v) for k, v in load_file(suspect).items())


def test_fine_tuning_lowers_the_contrastive_loss(settings_of):
    seen = []
    options = FineTuningSettings(
        optim=SHORT.model_copy(update={"epochs": 12, "lr": 0.05}), crop_scale=(0.6, 1.0)
    )
    path = fine_tuning(settings_of(), options, report=lambda event: seen.append(event))

    losses = [event.metrics["contrastive"] for event in seen if event.phase == "fine_tuning"]
    assert len(losses) == 36
    assert sum(losses[-6:]) < sum(losses[:6])
    assert not load_encoder(path).encoder.training


def test_the_first_loss_is_nt_xent_of_the_suspects_features(settings_of):
    from mimic_fast.baselines.repair import Contrast
    from mimic_fast.distributed import SINGLE

    repair = opened(settings_of())
    options = ContrastSettings(optim=SHORT)
    contrast = Contrast(repair.copy(), options, seed=0).eval()
    views = repair.views(0, options)
    projected = [contrast.head(repair.suspect.encoder(view)) for view in views]

    expected = contrastive_loss(*projected, temperature=0.5, processes=SINGLE)

    torch.testing.assert_close(contrast(views), expected)


@pytest.mark.parametrize(
    ("optim", "says"),
    [
        ({"ema": 0.9}, "does not read optim.ema"),
        ({"accumulate": 2}, "does not read optim.accumulate"),
        ({"compile": True}, "does not read optim.compile"),
        ({"precision": "fp64"}, "runs in fp32 or bf16, got optim.precision fp64"),
        ({"precision": "fp16"}, "runs in fp32 or bf16, got optim.precision fp16"),
    ],
    ids=str,
)
def test_what_a_repair_would_not_do_is_refused(optim, says):
    with pytest.raises(ValidationError, match=says):
        RepairSettings(optim=OptimSettings(**optim))


def test_every_loss_is_reported_by_its_name(settings_of):
    seen = []
    repair = opened(settings_of(), report=seen.append)
    terms = {"one": torch.tensor(1.5), "two": torch.tensor(-0.25, dtype=torch.float64)}

    tell(repair, terms, step=0, total=3)

    assert (seen[-1].metrics, seen[-1].done) == ({"one": 1.5, "two": -0.25}, 1)
