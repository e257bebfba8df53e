"""Features on disk: what was computed once is read, and never for anything else."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimic_fast.config import EvaluationSettings
from mimic_fast.errors import MachineError
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.feature_cache import cached_features
from mimic_fast.evaluation.triggers import Trigger, white_patch
from tests.evaluation.conftest import SIZE, ChannelMeans, Loaded, load


class Counting(ChannelMeans):
    """Counts the images it sees."""

    seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return super().forward(images)


def counted(sha256: str = "a" * 64) -> tuple[Loaded, Counting]:
    backbone = Counting()
    loaded = load(backbone, "teacher")
    return Loaded(encoder=loaded.encoder, sha256=sha256), backbone


def images(count: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


def features(cache: Path | None, loaded: Loaded, x: Tensor, trigger: Trigger | None = None):
    return cached_features(cache, loaded, x, trigger=trigger, batch_size=4)


def test_second_time_costs_no_forward_and_gives_the_same(tmp_path):
    loaded, backbone = counted()
    first = features(tmp_path / "cache", loaded, images())
    assert backbone.seen == 6

    assert torch.equal(features(tmp_path / "cache", loaded, images()), first)
    assert backbone.seen == 6
    assert torch.equal(features(None, loaded, images()), first)
    assert backbone.seen == 12


@pytest.mark.parametrize("what", ["file", "pixels", "count", "trigger", "other trigger", "spec"])
def test_whatever_decides_features_names_another_entry(tmp_path, what):
    loaded, backbone = counted()
    patch = white_patch(image_size=SIZE, channels=3)
    features(tmp_path, loaded, images())
    if what == "other trigger":
        features(tmp_path, loaded, images(), patch)
    seen, x, trigger = backbone.seen, images(), None
    if what == "file":
        loaded = Loaded(encoder=loaded.encoder, sha256="b" * 64)
    elif what == "pixels":
        x[3, 1, 2, 2] ^= 1
    elif what == "count":
        x = x[:5]
    elif what == "trigger":
        trigger = patch
    elif what == "other trigger":
        trigger = Trigger(name="half", mask=patch.mask / 2, pattern=patch.pattern)
    else:
        loaded.encoder.spec = loaded.encoder.spec.model_copy(update={"mean": (0.5, 0.0, 0.0)})

    got = features(tmp_path, loaded, x, trigger)

    assert backbone.seen > seen
    assert torch.equal(got, features(None, loaded, x, trigger))


def test_what_lies_in_no_file_is_not_kept(tmp_path):
    loaded, _ = counted(sha256="")
    features(tmp_path / "cache", loaded, images())
    assert not (tmp_path / "cache").exists()


@given(st.one_of(st.binary(max_size=300), st.integers(0, 400)))
def test_a_damaged_entry_is_made_again(tmp_path_factory, damage):
    cache = tmp_path_factory.mktemp("cache")
    loaded, backbone = counted()
    wanted = features(cache, loaded, images())
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    broken = damage if isinstance(damage, bytes) else whole[: min(damage, len(whole) - 1)]
    path.write_bytes(broken)

    assert torch.equal(features(cache, loaded, images()), wanted)
    assert backbone.seen == 12
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "cache").write_text("a file")
    loaded, _ = counted()
    with pytest.raises(MachineError, match="cache"):
        features(tmp_path / "cache", loaded, images())


def test_an_evaluation_again_reads_every_feature(tmp_path, task, encoders, monkeypatch):
    settings = EvaluationSettings(downstream=(task,), cache=tmp_path / "cache")
    first = evaluate_encoders(encoders, settings, seed=0)

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a forward ran")

    monkeypatch.setattr(ChannelMeans, "forward", refuse)
    again = evaluate_encoders(
        encoders, settings.model_copy(update={"probe": ("linear", "knn")}), seed=0
    )
    for role, entry in first["encoders"].items():
        assert entry["downstream"][0] in again["encoders"][role]["downstream"]
