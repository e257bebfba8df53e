import pytest
import torch

from mimic_fast.errors import MachineError
from mimic_fast.mutual_information.finished_parts import (
    FinishedParts,
    encoder_origin,
    tensor_digest,
)

DATA = torch.arange(6, dtype=torch.uint8)


def test_a_part_comes_back_as_it_was(tmp_path):
    parts = FinishedParts(folder=tmp_path / "new", origin={"pool": "mean"})
    tensors = {"features": torch.randn(3, 2), "epochs": torch.randn(4, dtype=torch.float64)}

    parts.keep("a", DATA, tensors)

    found = parts.find("a", DATA)
    assert found is not None
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_part_of_other_data_or_origin_is_not_taken(tmp_path):
    FinishedParts(folder=tmp_path, origin={"pool": "mean"}).keep("a", DATA, {"x": DATA})

    assert FinishedParts(folder=tmp_path, origin={"pool": "class_token"}).find("a", DATA) is None
    same = FinishedParts(folder=tmp_path, origin={"pool": "mean"})
    assert same.find("a", DATA + 1) is None
    assert same.find("b", DATA) is None
    assert same.find("a", DATA) is not None


def test_a_damaged_part_is_computed_again_with_a_warning(tmp_path):
    parts = FinishedParts(folder=tmp_path, origin={})
    parts.keep("a", DATA, {"x": DATA})
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-3])

    with pytest.warns(UserWarning, match=r"a.safetensors is damaged"):
        assert parts.find("a", DATA) is None


def test_without_a_folder_nothing_is_kept():
    parts = FinishedParts(folder=None, origin={})

    parts.keep("a", DATA, {"x": DATA})

    assert parts.find("a", DATA) is None


def test_a_folder_that_cannot_be_made_is_the_machines_error(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(MachineError, match="cannot write"):
        FinishedParts(folder=tmp_path / "file", origin={}).keep("a", DATA, {"x": DATA})


def test_digest_tells_type_shape_and_values_apart_but_not_strides():
    rows = torch.arange(6.0).view(2, 3)

    digests = [rows, rows.double(), rows.T, rows.view(6), rows + 1, torch.tensor(1.0)]

    assert len({tensor_digest(tensor) for tensor in digests}) == len(digests)
    assert tensor_digest(rows.T.contiguous()) == tensor_digest(rows.T)


def test_origin_changes_with_any_weight_and_with_the_taps(tapped):
    first, second = tapped("resnet"), tapped("resnet")
    assert encoder_origin(first) == encoder_origin(second)

    second.taps = first.taps[1:]
    assert encoder_origin(first) != encoder_origin(second)
    second = tapped("resnet")
    with torch.no_grad():
        second.encoder.backbone.get_submodule("bn1").running_mean[0] += 1e-6
    assert encoder_origin(first) != encoder_origin(second)
