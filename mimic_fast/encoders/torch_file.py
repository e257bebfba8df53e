"""Tensors of an untrusted ``torch.save`` file, without running anything in it.

``torch.load(weights_only=True)`` refuses code; what it does not refuse is checked here: compressed
archives that unpack to more than the file, tensors larger than their storage, and tensors that are
not plain numbers.
"""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mimic_fast.encoders.reasons import reason
from mimic_fast.errors import UnsafeInputError

# What torch.load raises on damaged or hostile bytes.
DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError, OSError,
    ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError,
    MemoryError,
)  # fmt: skip

# Where training programs keep the weights inside their checkpoint, in order of preference.
_NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "teacher",
    "encoder",
    "backbone",
    "network",
    "net",
    "student",
)
_DEEPEST = 3


def read_torch_tensors(path: Path, *, zipped: bool) -> dict[str, Tensor]:
    """All tensors of the state dict in a ``torch.save`` file; nested ones are unwrapped.

    Args:
        path: An existing file.
        zipped: Whether it is a zip archive (torch 1.6 and later), which is mapped rather than read.

    Raises:
        UnsafeInputError: If the file is damaged, is an archive that inflates, or holds anything
            that would have to be executed.
    """
    if zipped:
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            # torch remarks on unusual files in many lines; what matters is checked below.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except DAMAGE as error:
        raise _refusal(path, error) from None
    tensors = _unwrap(content)
    if not tensors:
        raise UnsafeInputError(f"{path} holds no state dict of tensors; save model.state_dict()")
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    return tensors


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except DAMAGE as error:
        raise UnsafeInputError(f"{path} is a damaged torch archive: {reason(error)}") from None
    size = path.stat().st_size
    total = sum(entry.file_size for entry in entries)
    # torch.save stores without compression, so an honest archive is never smaller than its content.
    if total > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UnsafeInputError(
            f"{path} unpacks to {total} bytes from {size} (a compressed archive, which torch.save "
            "never writes); refused as a possible zip bomb"
        )
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UnsafeInputError(f"{path} is a TorchScript program, not weights; save the state dict")


def _unwrap(content: object, *, depth: int = 0) -> dict[str, Tensor]:
    # A pickle may hold a dict that contains itself.
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return {}
    for key in _NESTED:
        tensors = _unwrap(content.get(key), depth=depth + 1)
        if tensors:
            return tensors
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        raise UnsafeInputError(f"{path}: {name!r} is not a plain dense tensor; refused")
    # Zero strides let a few bytes pose as terabytes.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UnsafeInputError(f"{path}: {name!r} claims more numbers than the file holds; refused")


def _refusal(path: Path, error: BaseException) -> UnsafeInputError:
    text = str(error)
    culprit = re.search(r"GLOBAL (\S+)", text) or re.search(r"module (\S+) is blocked", text)
    if culprit:
        return UnsafeInputError(
            f"{path} holds more than tensors (it asks to run {ascii(culprit.group(1))[1:-1]}); "
            "nothing was executed; ask for the state dict as safetensors"
        )
    # torch puts the unpickler's own words last, behind advice to load the file unsafely.
    own_words = reason(error, line=-1 if "WeightsUnpickler" in text else 0)
    return UnsafeInputError(f"{path} is not a readable torch checkpoint: {own_words}")
