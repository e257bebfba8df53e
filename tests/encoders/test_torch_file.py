import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mimic_fast.encoders.torch_file import read_torch_tensors
from mimic_fast.errors import UnsafeInputError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


class Payload:
    """Runs a shell command when it is unpickled freely."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def saved(path: Path, content: object, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def rezipped(path: Path, name: str, data: bytes, *, compression: int = zipfile.ZIP_STORED) -> Path:
    """The same archive written anew, with one more entry."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(entries)).split("/")[0]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
        archive.writestr(f"{folder}/{name}", data)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda weights: {"epoch": 1, "model": {"state_dict": weights}},
        lambda weights: {"student": {"x": torch.zeros(1)}, "teacher": weights},
        lambda weights: {k: nn.Parameter(v) for k, v in weights.items()},
    ],
    ids=["plain", "state_dict", "nested", "teacher-first", "parameters"],
)
def test_state_dicts_are_found(tmp_path, zipped, wrap):
    path = saved(tmp_path / "x.pt", wrap(WEIGHTS), zipped=zipped)

    tensors = read_torch_tensors(path, zipped=zipped)

    assert tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(tensors[key], WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.parametrize("force", [False, True], ids=["default", "forced-unsafe-by-environment"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_payload_is_refused_and_not_run(tmp_path, monkeypatch, zipped, force):
    marker = tmp_path / "executed"
    path = saved(tmp_path / "x.pt", {**WEIGHTS, "x": Payload(marker)}, zipped=zipped)
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    with pytest.raises(UnsafeInputError, match=r"asks to run \S*system.*nothing was executed"):
        read_torch_tensors(path, zipped=zipped)

    assert not marker.exists()
    # The payload is real: free unpickling runs it.
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def test_bare_pickle_with_payload_is_refused_and_not_run(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(UnsafeInputError):
        read_torch_tensors(path, zipped=False)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_module_is_refused(tmp_path, zipped):
    path = saved(tmp_path / "x.pt", nn.Linear(2, 2), zipped=zipped)
    with pytest.raises(UnsafeInputError, match=r"asks to run torch.nn.modules.linear.Linear"):
        read_torch_tensors(path, zipped=zipped)


def test_torchscript_is_refused(tmp_path):
    path = rezipped(saved(tmp_path / "x.pt", WEIGHTS), "constants.pkl", b"x")
    with pytest.raises(UnsafeInputError, match="TorchScript program"):
        read_torch_tensors(path, zipped=True)


def test_zip_bomb_is_refused_before_it_unpacks(tmp_path):
    bomb = bytes(50_000_000)
    path = saved(tmp_path / "x.pt", WEIGHTS)
    rezipped(path, "data/9", bomb, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(UnsafeInputError, match="possible zip bomb"):
        read_torch_tensors(path, zipped=True)


def test_archive_with_overlapping_entries_is_refused(tmp_path):
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(10_000)})
    with zipfile.ZipFile(path, "a") as archive:
        twin = archive.getinfo(next(n for n in archive.namelist() if n.endswith("data/0")))
        for number in range(5):
            copy = zipfile.ZipInfo(f"x/data/{number + 1}")
            copy.file_size, copy.compress_size = twin.file_size, twin.compress_size
            copy.CRC, copy.header_offset = twin.CRC, twin.header_offset
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
        archive.writestr("x/more", b"")  # makes the list of entries be written anew
    with pytest.raises(UnsafeInputError, match="possible zip bomb"):
        read_torch_tensors(path, zipped=True)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensor_larger_than_its_storage_is_refused(tmp_path, zipped):
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(1).expand(10**6, 10**6)}, zipped=zipped)
    assert path.stat().st_size < 10_000
    with pytest.raises(UnsafeInputError, match="'a' claims more numbers than the file holds"):
        read_torch_tensors(path, zipped=zipped)


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")], ids=["sparse", "meta"]
)
def test_tensors_that_are_not_dense_are_refused(tmp_path, tensor):
    path = saved(tmp_path / "x.pt", {"a": tensor})
    with pytest.raises(UnsafeInputError, match="'a' is not a plain dense tensor"):
        read_torch_tensors(path, zipped=True)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(2)], torch.zeros(2), "text"])
def test_file_without_a_state_dict_is_refused(tmp_path, content):
    with pytest.raises(UnsafeInputError, match="holds no state dict"):
        read_torch_tensors(saved(tmp_path / "x.pt", content), zipped=True)


def test_dict_that_contains_itself_is_refused(tmp_path):
    content: dict = {}
    content["model"] = content
    with pytest.raises(UnsafeInputError, match="holds no state dict"):
        read_torch_tensors(saved(tmp_path / "x.pt", content), zipped=True)


def refusal_of(path: Path, *, zipped: bool) -> str:
    """What reading was refused with; empty where tensors came. Anything else passes through."""
    try:
        tensors = read_torch_tensors(path, zipped=zipped)
    except UnsafeInputError as error:
        return str(error)
    assert all(tensor.isnan().shape == tensor.shape for tensor in tensors.values())
    return ""


@settings(deadline=None, max_examples=150)
@given(data=st.data(), zipped=st.booleans())
def test_damaged_bytes_give_tensors_or_one_clear_refusal(tmp_path_factory, data, zipped):
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer, _use_new_zipfile_serialization=zipped)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content[: data.draw(st.integers(16, len(content)))])

    refusal = refusal_of(path, zipped=zipped)

    assert refusal.isprintable()
