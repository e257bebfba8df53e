"""Triggers: geometry, stamping, and files that are not trusted."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.evaluation.triggers import (
    Trigger,
    apply_trigger,
    fit_trigger,
    load_trigger,
    save_trigger,
    white_patch,
)


@pytest.fixture
def blended() -> Trigger:
    generator = torch.Generator().manual_seed(0)
    return Trigger(
        name="blended",
        mask=torch.rand(1, 12, 12, generator=generator),
        pattern=torch.rand(3, 12, 12, generator=generator),
    )


@pytest.mark.parametrize(("size", "first", "last"), [(32, 21, 30), (224, 173, 222)])
def test_white_patch_has_badencoders_geometry(size, first, last):
    trigger = white_patch(image_size=size, channels=3)

    expected = torch.zeros(1, size, size)
    expected[:, first : last + 1, first : last + 1] = 1
    assert torch.equal(trigger.mask, expected)
    assert torch.equal(trigger.pattern, expected.repeat(3, 1, 1))


@given(size=st.integers(8, 512))
def test_white_patch_lies_inside_the_image_and_covers_a_fair_share(size):
    rows = white_patch(image_size=size, channels=1).mask[0].any(1).nonzero()

    side = len(rows)
    assert int(rows.max()) < size - 1
    assert 50 / 224 - 0.05 < side / size < 10 / 32 + 0.05


def test_apply_trigger_is_the_formula(blended):
    images = torch.rand(5, 3, 12, 12, dtype=torch.float64)

    stamped = apply_trigger(images, blended)

    mask, pattern = blended.mask.double(), blended.pattern.double()
    expected = images * (1 - mask) + pattern * mask
    torch.testing.assert_close(stamped, expected, rtol=0, atol=1e-15)
    assert stamped.dtype == torch.float64


def test_apply_trigger_changes_only_its_patch_and_not_its_input():
    images = torch.rand(2, 3, 32, 32)
    before = images.clone()
    trigger = white_patch(image_size=32, channels=3)

    stamped = apply_trigger(images, trigger)

    outside = trigger.mask[0] == 0
    assert torch.equal(stamped[..., outside], images[..., outside])
    assert bool((stamped[..., ~outside] == 1).all())
    assert torch.equal(images, before)


def test_apply_trigger_refuses_another_size():
    with pytest.raises(UsageError, match=r"\(3, 32, 32\).*\(3, 28, 28\).*fit_trigger"):
        apply_trigger(torch.rand(1, 3, 28, 28), white_patch(image_size=32, channels=3))


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (224, 3), (96, 3)])
def test_fit_trigger_rebuilds_the_white_patch(size, channels):
    fitted = fit_trigger(white_patch(image_size=32, channels=3), image_size=size, channels=channels)

    expected = white_patch(image_size=size, channels=channels)
    assert torch.equal(fitted.mask, expected.mask)
    assert torch.equal(fitted.pattern, expected.pattern)


def test_fit_trigger_interpolates_others_and_keeps_their_name(blended):
    fitted = fit_trigger(blended, image_size=24, channels=1)

    assert fitted.mask.shape == (1, 24, 24)
    assert fitted.pattern.shape == (1, 24, 24)
    assert fitted.name == "blended"
    assert 0 <= float(fitted.mask.min()) <= float(fitted.mask.max()) <= 1
    assert float(fitted.mask.mean()) == pytest.approx(float(blended.mask.mean()), abs=0.02)


def test_fit_trigger_to_its_own_size_changes_nothing(blended):
    assert fit_trigger(blended, image_size=12, channels=3) is blended


def test_fit_trigger_refuses_channels_it_cannot_convert(blended):
    with pytest.raises(UsageError, match="3 channels and the encoder takes 4"):
        fit_trigger(blended, image_size=12, channels=4)


def test_trigger_survives_its_file(tmp_path, blended):
    save_trigger(tmp_path / "trigger.safetensors", blended)

    loaded = load_trigger(tmp_path / "trigger.safetensors")

    assert loaded.name == "blended"
    assert torch.equal(loaded.mask, blended.mask)
    assert torch.equal(loaded.pattern, blended.pattern)


def test_npz_is_read_and_named_after_its_file(tmp_path, blended):
    path = tmp_path / "mine.npz"
    np.savez(path, mask=blended.mask[0].numpy(), pattern=blended.pattern.double().numpy())

    loaded = load_trigger(path)

    assert loaded.name == "mine"
    assert torch.equal(loaded.mask, blended.mask)
    assert torch.equal(loaded.pattern, blended.pattern)


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_objects_are_refused_and_not_executed(tmp_path, blended):
    struck = tmp_path / "struck"
    arrays = {"mask": np.array([Payload(struck)]), "pattern": blended.pattern.numpy()}
    np.savez(tmp_path / "objects.npz", **arrays)
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(Payload(struck)))

    for name in ("objects.npz", "pickle.safetensors"):
        with pytest.raises(UnsafeInputError, match=name):
            load_trigger(tmp_path / name)
    assert not struck.exists()


def test_npz_that_claims_a_huge_array_is_refused_before_it_is_allocated(tmp_path):
    path = tmp_path / "bomb.npz"
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1, 1000000, 1000000)}"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        archive.writestr("mask.npy", member)

    with pytest.raises(UnsafeInputError, match="claims 8000000000000 bytes"):
        load_trigger(path)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@pytest.mark.parametrize("keep", [1, 9, 60, 200])
def test_truncated_file_is_refused(tmp_path, blended, kind, keep):
    path = tmp_path / f"trigger.{kind}"
    if kind == "npz":
        np.savez(path, mask=blended.mask.numpy(), pattern=blended.pattern.numpy())
    else:
        save_trigger(path, blended)
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(UnsafeInputError, match="trigger"):
        load_trigger(path)


@given(
    data=st.binary(max_size=200), head=st.sampled_from([b"", b"PK\x03\x04", b"\x10" + b"\0" * 7])
)
def test_any_bytes_are_refused_with_one_line(tmp_path_factory, data, head):
    path = tmp_path_factory.mktemp("fuzz") / "trigger"
    path.write_bytes(head + data)

    with pytest.raises((UnsafeInputError, UsageError)) as caught:
        load_trigger(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_missing_array_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_trigger(tmp_path / "absent.safetensors")
    np.savez(tmp_path / "half.npz", mask=np.zeros((1, 4, 4)))
    with pytest.raises(UsageError, match=r"missing.*pattern"):
        load_trigger(tmp_path / "half.npz")


@pytest.mark.parametrize(
    ("mask", "pattern", "message"),
    [
        (np.zeros((1, 4, 5)), np.zeros((3, 4, 4)), r"mask \[1, H, W\]"),
        (np.zeros((3, 4, 4)), np.zeros((3, 4, 4)), r"mask \[1, H, W\]"),
        (np.zeros((1, 0, 0)), np.zeros((3, 0, 0)), "empty"),
        (np.full((1, 4, 4), 255.0), np.zeros((3, 4, 4)), "mask must lie in"),
        (np.zeros((1, 4, 4)), np.full((3, 4, 4), np.nan), "pattern must lie in"),
    ],
    ids=["sizes", "channels", "empty", "bytes", "nan"],
)
def test_arrays_that_are_no_trigger_are_named(tmp_path, mask, pattern, message):
    np.savez(tmp_path / "wrong.npz", mask=mask, pattern=pattern)

    with pytest.raises(UsageError, match=message):
        load_trigger(tmp_path / "wrong.npz")
