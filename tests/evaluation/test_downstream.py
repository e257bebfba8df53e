"""Draws that are stratified and repeatable, and images encoded once for all encoders."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimic_fast.config import DownstreamSettings, EvaluationSettings
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.evaluation.downstream import (
    draw_stratified,
    draw_uniform,
    encode_split,
    open_downstream,
)
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.triggers import sinusoid, white_patch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    share=st.floats(0.02, 1.2),
    seed=st.integers(0, 5),
)
def test_stratified_draw_is_exact_and_within_one_of_proportional(sizes, share, seed):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=seeded(9))]
    count = max(1, round(share * len(labels)))

    drawn = draw_stratified(labels, count, generator=seeded(seed))

    assert len(drawn) == min(count, len(labels))
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    for label, size in enumerate(sizes):
        exact = size * min(count, len(labels)) / len(labels)
        assert abs(int((labels[drawn] == label).sum()) - exact) < 1


def test_draws_depend_on_the_seed_alone():
    labels = torch.arange(300) % 3
    torch.manual_seed(5)
    first = draw_stratified(labels, 30, generator=seeded(1))
    torch.manual_seed(6)

    assert torch.equal(first, draw_stratified(labels, 30, generator=seeded(1)))
    assert not torch.equal(first, draw_stratified(labels, 30, generator=seeded(2)))
    assert torch.equal(
        draw_uniform(300, 30, generator=seeded(1)), draw_uniform(300, 30, generator=seeded(1))
    )


@pytest.mark.parametrize("count", [None, 300, 400])
def test_no_limit_and_a_large_one_give_everything(count):
    labels = torch.arange(300) % 3

    assert torch.equal(draw_stratified(labels, count, generator=seeded()), torch.arange(300))
    assert torch.equal(draw_uniform(300, count, generator=seeded()), torch.arange(300))


def test_open_downstream_draws_as_set(task):
    settings = EvaluationSettings(probe_labels=12, test_images=20)

    data = open_downstream(task, settings, seed=3)
    again = open_downstream(task, settings, seed=3)
    other = open_downstream(task, settings, seed=4)

    assert data.num_classes == 3
    assert data.train.labels.bincount().tolist() == [4, 4, 4]
    assert len(data.test.indices) == 20
    assert torch.equal(data.train.indices, again.train.indices)
    assert torch.equal(data.test.indices, again.test.indices)
    assert not torch.equal(data.test.indices, other.test.indices)
    labels = torch.tensor(data.test.source.labels)
    assert torch.equal(data.test.labels, labels[data.test.indices])


def test_images_without_labels_are_refused(task, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(f"{task.train}/red", flat)
    unlabeled = DownstreamSettings(name="flat", train=str(flat), test=task.test)

    with pytest.raises(UsageError, match=r"flat has no labels; give class subfolders"):
        open_downstream(unlabeled, EvaluationSettings(), seed=0)


def test_splits_of_different_tasks_are_refused(task, tmp_path, write_images):
    other = write_images(tmp_path / "other", per_class=2, seed=0, classes=("cat", "dog", "eel"))
    mixed = DownstreamSettings(name="mixed", train=task.train, test=str(other))

    with pytest.raises(UsageError, match="train has classes blue, green, red, test has cat"):
        open_downstream(mixed, EvaluationSettings(), seed=0)


def test_every_encoder_sees_the_same_images_as_alone(task, encoders):
    data = open_downstream(task, EvaluationSettings(test_images=20), seed=0)
    stamps = (sinusoid(image_size=16, channels=3), white_patch(image_size=16, channels=3))

    together = encode_split(
        data.test, encoders, triggers=dict.fromkeys(encoders, stamps), batch_size=7
    )

    assert torch.equal(together.labels, data.test.labels)
    for role, loaded in encoders.items():
        alone = encode_split(data.test, {role: loaded}, triggers={role: stamps[1:]}, batch_size=20)
        torch.testing.assert_close(together.clean[role], alone.clean[role])
        torch.testing.assert_close(together.triggered[role][1], *alone.triggered[role])
    features = (together.clean["purified"], *together.triggered["purified"])
    for place, one in enumerate(features):
        assert not any(torch.equal(one, other) for other in features[:place])


def test_features_come_in_the_order_of_the_split_across_blocks(tmp_path, encoders, write_images):
    folder = write_images(tmp_path / "many", per_class=400, seed=2)
    many = DownstreamSettings(name="many", train=str(folder), test=str(folder))
    split = open_downstream(many, EvaluationSettings(), seed=0).test
    events = []

    encoded = encode_split(
        split, {"clean": encoders["clean"]}, triggers={}, batch_size=256, report=events.append
    )

    pixels = torch.stack([split.source.decode(split.source.read(i)) for i in range(1200)])
    torch.testing.assert_close(
        encoded.clean["clean"], encode(encoders["clean"].encoder, pixels), rtol=1e-6, atol=1e-6
    )
    assert [(event.done, event.total) for event in events] == [(600, 1200), (1200, 1200)]
    assert encoded.triggered == {}


def test_unreadable_images_are_left_out_and_named(task, tmp_path, encoders):
    broken = tmp_path / "broken"
    shutil.copytree(task.test, broken)
    (broken / "green" / "0003.png").write_bytes(b"no image")
    data = open_downstream(
        DownstreamSettings(name="broken", train=task.train, test=str(broken)),
        EvaluationSettings(),
        seed=0,
    )
    messages = []

    encoded = encode_split(
        data.test,
        encoders,
        triggers={},
        batch_size=64,
        report=lambda event: messages.append(event.message),
    )

    assert encoded.unreadable == ("green/0003.png",)
    assert len(encoded.labels) == len(encoded.indices) == len(encoded.clean["teacher"]) == 44
    assert torch.equal(encoded.labels, torch.tensor(data.test.source.labels)[encoded.indices])
    assert sum("green/0003.png" in message for message in messages) == 1


def test_a_set_with_no_readable_image_is_refused(task, tmp_path, encoders):
    for name in ("red", "green", "blue"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"")
    data = open_downstream(
        DownstreamSettings(name="broken", train=task.train, test=str(tmp_path)),
        EvaluationSettings(),
        seed=0,
    )

    with pytest.raises(UnsafeInputError, match="none of 3 images"):
        encode_split(data.test, encoders, triggers={}, batch_size=8)
