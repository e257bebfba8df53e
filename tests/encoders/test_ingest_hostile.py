import json
import pickle
import struct
import warnings
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from mimic_fast.encoders.ingest import load_encoder, read_checkpoint
from mimic_fast.errors import UnsafeInputError, UsageError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def write(path, tensors, how):
    if how == "safetensors":
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    else:
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=how == "torch")
    return path


def test_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")


def test_directory_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="is not a file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x"])
def test_content_decides_the_format(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(save(WEIGHTS))
    checkpoint = read_checkpoint(path)
    assert checkpoint.format == "safetensors"
    assert all(torch.equal(checkpoint.tensors[k], WEIGHTS[k]) for k in WEIGHTS)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w')",)


@pytest.mark.parametrize("name", ["teacher.pth", "teacher.safetensors"])
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_payload_is_refused_under_any_name_and_not_run(tmp_path, name, how):
    marker, path = tmp_path / "executed", tmp_path / name
    content = {"state_dict": {**WEIGHTS, "x": Payload(marker)}}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=4))
    else:
        # Written through a handle: torch.save would make safetensors of that name.
        with path.open("wb") as file:
            torch.save(content, file, _use_new_zipfile_serialization=how == "zip")

    with pytest.raises(UnsafeInputError) as caught:
        read_checkpoint(path)

    assert not marker.exists()
    assert "\n" not in str(caught.value)
    if name.endswith(".safetensors"):
        assert "holds a pickle, which can run code" in str(caught.value)


def refusal_of(path) -> str:
    """What reading a file was refused with; empty where it was read."""
    try:
        read_checkpoint(path)
    except UnsafeInputError as error:
        return str(error)
    return ""


def damaged_files() -> dict[str, bytes]:
    good = save(WEIGHTS)
    header = len(good) - 8 - 4 * 8
    return {
        "empty": b"",
        "text": b"#!/bin/sh\necho weights\n",
        "zeros": bytes(4096),
        "truncated-data": good[:-1],
        "truncated-header": good[:20],
        "trailing-bytes": good + b"x",
        "huge-header": struct.pack("<Q", 2**62) + good[8:],
        "header-beyond-file": struct.pack("<Q", header + 10**6) + good[8:],
        "header-not-json": struct.pack("<Q", 2) + b"{x" + bytes(8),
        "hole-in-data": _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8),
        "huge-shape": _header(
            {"a": {"dtype": "F32", "shape": [2**60, 2**60], "data_offsets": [0, 4]}}, 4
        ),
        "no-tensors": _header({}, 0),
        "truncated-zip": b"PK\x03\x04" + bytes(100),
        "old-pickle": b"(lp0\n.",
        "unfinished-pickle": b"\x80\x02}q\x00",
    }


def _header(entries: dict, size: int) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.mark.parametrize("kind", damaged_files())
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_damaged_file_is_refused_in_one_line(tmp_path, kind, name):
    path = tmp_path / name
    path.write_bytes(damaged_files()[kind])
    with pytest.raises(UnsafeInputError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["safetensors", "torch"])
@pytest.mark.parametrize(
    "values",
    [torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")]).half(),
     torch.tensor([float("nan")]).to(torch.float8_e4m3fn), torch.tensor([1e300]).double()],
    ids=["nan", "inf-fp16", "nan-fp8", "overflows-fp32"],
)  # fmt: skip
def test_numbers_that_are_not_finite_are_unsafe(tmp_path, how, values):
    path = write(tmp_path / "x.bin", {**WEIGHTS, "bad": values}, how)
    if values.dtype == torch.float64:
        path = write(tmp_path / "x.bin", {"bad": values * 1e0}, how)
    with pytest.raises(UnsafeInputError, match="'bad' holds values that are not finite"):
        read_checkpoint(path)


def test_complex_numbers_are_unsafe(tmp_path):
    path = write(tmp_path / "x.bin", {"bad": torch.ones(2, dtype=torch.complex64)}, "torch")
    with pytest.raises(UnsafeInputError, match="'bad' holds complex numbers"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "key", ["a\x1b[2Jb", "line\nbreak", "x" * 1000], ids=["escape", "line", "long"]
)
def test_keys_that_are_no_names_are_unsafe(tmp_path, key):
    path = write(tmp_path / "x.bin", {key: torch.ones(2)}, "torch")
    with pytest.raises(UnsafeInputError, match="has a key that is no module path") as caught:
        read_checkpoint(path)
    assert str(caught.value).isprintable()


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_damaged_safetensors_give_tensors_or_one_clear_refusal(tmp_path_factory, data):
    content = bytearray(save(WEIGHTS, metadata={"mimic_fast": '{"spec": {}}'}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unreadable card inside is only remarked on
        refusal = refusal_of(path)
    assert refusal.isprintable()


class TestCard:
    """The card beside the file or inside it: claims that are checked."""

    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "teacher.safetensors"
        path.write_bytes(save(WEIGHTS, metadata={"mimic_fast": '{"spec": {"image_size": 1}}'}))
        return path

    def test_inside_is_read(self, path):
        assert read_checkpoint(path).card == {"spec": {"image_size": 1}}

    def test_beside_is_preferred(self, path):
        path.with_suffix(".json").write_text('{"spec": {"image_size": 2}, "note": "x"}')
        assert read_checkpoint(path).card == {"spec": {"image_size": 2}, "note": "x"}

    def test_with_the_digest_of_another_file_is_unsafe(self, path):
        path.with_suffix(".json").write_text('{"spec": {}, "sha256": "00ff"}')
        with pytest.raises(UnsafeInputError, match=r"names another file \(sha256 00ff"):
            read_checkpoint(path)

    @pytest.mark.parametrize("text", ['{"epochs": 3}', "[1, 2]", '{"spec": "resnet"}'])
    def test_of_another_program_is_ignored(self, path, text):
        path.with_suffix(".json").write_text(text)
        assert read_checkpoint(path).card == {"spec": {"image_size": 1}}

    @pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": "\\ud800'], ids=len)
    def test_that_is_not_json_is_ignored_with_a_warning(self, path, text):
        path.with_suffix(".json").write_text(text)
        with pytest.warns(UserWarning, match=r"teacher.json is not a readable card"):
            assert read_checkpoint(path).card == {"spec": {"image_size": 1}}

    def test_that_is_too_large_is_ignored_with_a_warning(self, path):
        path.with_suffix(".json").write_text('{"spec": {}}' + " " * 1_000_000)
        with pytest.warns(UserWarning, match=r"teacher.json is not a readable card"):
            assert read_checkpoint(path).card == {"spec": {"image_size": 1}}

    def test_that_would_download_is_refused(self, tmp_path, resnet_spec):
        spec = resnet_spec.model_dump(mode="json") | {"architecture": "timm:hf-hub:evil/x"}
        path = tmp_path / "x.pth"
        torch.save(WEIGHTS, path)
        path.with_suffix(".json").write_text(json.dumps({"spec": spec}))
        with pytest.raises(UsageError, match="would be downloaded"):
            load_encoder(path)

    def test_that_asks_for_far_more_than_the_file_holds_is_refused(self, tmp_path, resnet_spec):
        huge = {"layers": [1, 1, 1, 1], "channels": [16384] * 4}  # 19 billion weights
        spec = resnet_spec.model_dump(mode="json") | {"arguments": huge}
        path = tmp_path / "x.pth"
        torch.save(WEIGHTS, path)
        path.with_suffix(".json").write_text(json.dumps({"spec": spec}))
        with pytest.raises(UsageError, match=r"needs \d[\d,]+ weights, the file holds"):
            load_encoder(path)

    def test_that_does_not_fit_the_weights_is_refused(self, tmp_path, resnet_spec, trained):
        wide = resnet_spec.model_copy(update={"arguments": {"layers": [2, 2, 2, 2]}})
        path = tmp_path / "x.pth"
        torch.save(OrderedDict(trained(resnet_spec).backbone.state_dict()), path)
        path.with_suffix(".json").write_text(json.dumps({"spec": wide.model_dump(mode="json")}))
        with pytest.raises(UsageError, match="lacks"):
            load_encoder(path)
