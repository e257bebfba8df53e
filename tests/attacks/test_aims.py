"""Which images an attack takes as references."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from mimic_fast.attacks import aims as aims_module
from mimic_fast.attacks.aims import most_typical, read_aims
from mimic_fast.attacks.badencoder import BadEncoderSettings
from mimic_fast.data.sources import open_source
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import UsageError


@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(6, 40))
def test_typical_images_come_by_the_margin_to_the_nearest_other_mean(seed, kinds, count):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 4, generator=generator)
    labels = torch.arange(count) % kinds

    found = most_typical(features, labels, label=1)

    x = torch.from_numpy(StandardScaler().fit_transform(features.double().numpy()))
    x = x * ((count - 1) / count) ** 0.5  # sample instead of population deviation
    means = [x[labels == kind].mean(0) for kind in range(kinds)]
    margins = [
        min(((x[i] - means[k]) ** 2).sum() for k in range(kinds) if k != 1)
        - ((x[i] - means[1]) ** 2).sum()
        for i in found.tolist()
    ]
    assert sorted(found.tolist()) == (labels == 1).nonzero()[:, 0].tolist()
    assert all(a >= b - 1e-9 for a, b in pairwise(margins))


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_typical_needs_another_label(labels):
    with pytest.raises(ValueError, match="of another"):
        most_typical(torch.rand(2, 3), torch.tensor(labels), label=1)


@pytest.fixture
def aims(values, images, clean):
    encoder = load_encoder(clean).encoder
    source = open_source(str(images))
    return lambda **fields: read_aims(
        BadEncoderSettings.model_validate(values(**fields)), source, encoder
    )


def test_references_of_a_class_are_its_first_and_typical_ones_its_best(aims, images):
    first = aims(reference="class:1", num_references=3)[0].references
    best = aims(reference="typical:1", num_references=24)[0].references

    every = aims(reference="class:1", num_references=24)[0].references
    assert torch.equal(first, every[:3])
    assert {one.numpy().tobytes() for one in best} == {one.numpy().tobytes() for one in every}
    assert not torch.equal(best, every)


def test_every_target_has_its_own_trigger(aims):
    found = aims(
        trigger="white_patch",
        others=[{"reference": "class:0", "trigger": "blended:3"}],
    )

    assert [aim.trigger.name for aim in found] == ["white_patch", "blended:3"]
    assert not torch.equal(found[0].references, found[1].references)
    with pytest.raises(UsageError, match="two targets share the trigger 'white_patch'"):
        aims(others=[{"reference": "class:0", "trigger": "white_patch"}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reference": "typical:7"}, "no such label"),
        ({"reference": "typical:1", "num_references": 25}, "there are 24"),
        ({"trigger": "green_patch"}, "neither a file nor one of"),
    ],
)
def test_what_is_not_there_is_named(aims, fields, message):
    with pytest.raises(UsageError, match=message):
        aims(**fields)


def test_several_references_are_no_file(aims, images):
    with pytest.raises(UsageError, match="num_references is for"):
        aims(reference=str(images / "a" / "02.png"), num_references=2)


def test_typical_looks_at_few_images_of_many_labels(monkeypatch, images, clean):
    monkeypatch.setattr(aims_module, "_OTHERS", 6)
    looked: list[int] = []
    source = open_source(str(images))

    def read(index: int) -> bytes:
        looked.append(index)
        return source.read(index)

    settings = BadEncoderSettings.model_validate({"reference": "typical:1"})
    read_aims(settings, replace(source, read=read), load_encoder(clean).encoder)

    assert source.labels is not None
    labels = [source.labels[index] for index in dict.fromkeys(looked)]
    assert labels.count(1) == 24
    assert labels.count(0) == 6
