"""Trigger files: safetensors, ``.npz`` and pictures, read as untrusted data; no code in them runs.

Arrays are ``mask``, ``pattern`` and, for an added pattern, ``add`` (1). In a PNG with transparency
the alpha channel is the mask; any other picture is a blend.
"""

import io
import lzma
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from mimic_fast.encoders.reasons import reason
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.evaluation.stamping import Trigger
from mimic_fast.files import write_atomic

_MAX_BYTES = 64 * 2**20  # a trigger of 2048x2048 RGB in float32 is 48 MiB
_MAX_PIXELS = 2048 * 2048
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff")
_BLEND = 0.2  # opacity of a picture that brings no mask
# What reading a damaged archive raises; RuntimeError: encrypted, or packed in a way unknown here.
_NO_ARCHIVE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError),
    *(ValueError, TypeError, EOFError, OSError),
)


def save_trigger(path: Path, trigger: Trigger) -> None:
    """Writes mask, pattern, whether it is added, and name as safetensors.

    Raises:
        MachineError: If the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {"mask": trigger.mask.contiguous(), "pattern": trigger.pattern.contiguous()}
    if trigger.add:
        tensors["add"] = torch.ones(1, dtype=torch.uint8)
    write_atomic(path, save(tensors, metadata={"name": trigger.name}))


def load_trigger(path: Path) -> Trigger:
    """Reads a trigger from safetensors, from ``.npz`` or from a PNG or JPEG picture.

    The content decides the format, not the file's name. Nothing is ever unpickled. The trigger's
    name is the one recorded in the file, else the file's stem.

    Raises:
        UsageError: If the file is missing or its arrays are not a trigger.
        UnsafeInputError: If the file is damaged, too large or holds pickled objects.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UnsafeInputError(f"trigger {path} is over {_MAX_BYTES} bytes; give a smaller one")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"trigger {path} cannot be read: {error.strerror}") from None
    if data.startswith(_PICTURES):
        name, arrays = "", _read_picture(path, data)
    elif data.startswith(b"PK"):
        name, arrays = "", _read_npz(path)
    else:
        name, arrays = _read_safetensors(path, data)
    missing = sorted({"mask", "pattern"} - set(arrays))
    if missing:
        raise UsageError(f"trigger {path} needs arrays 'mask' and 'pattern'; missing {missing}")
    return _checked(name or path.stem, arrays, path)


def _read_safetensors(path: Path, data: bytes) -> tuple[str, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    try:
        tensors = load(data)
        with safe_open(path, framework="pt") as file:
            name = (file.metadata() or {}).get("name", "")
    except (SafetensorError, ValueError, KeyError) as error:
        raise UnsafeInputError(
            f"trigger {path} is neither safetensors, .npz nor a picture: {reason(error)}"
        ) from None
    return name, tensors


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    arrays: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for key in ("mask", "pattern", "add"):
                if f"{key}.npy" not in archive.namelist():
                    continue
                _check_declared_size(archive, f"{key}.npy", path)
                with archive.open(f"{key}.npy") as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
                if array.dtype.kind not in "biuf":
                    raise UsageError(f"trigger {path}: {key!r} must hold numbers, is {array.dtype}")
                with np.errstate(over="ignore"):  # becomes infinite, and is refused for that
                    arrays[key] = torch.from_numpy(np.array(array, dtype=np.float32))
    except (UnsafeInputError, UsageError):
        raise
    except _NO_ARCHIVE as error:
        raise UnsafeInputError(f"trigger {path} is not a plain .npz: {reason(error)}") from None
    return arrays


def _check_declared_size(archive: zipfile.ZipFile, member: str, path: Path) -> None:
    """Refuses before numpy allocates what the array's header claims."""
    import numpy as np

    with archive.open(member) as file:
        major, _ = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if major == 1
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    size = dtype.itemsize
    for length in shape:
        size *= length
    if max(size, archive.getinfo(member).file_size) > _MAX_BYTES:
        raise UnsafeInputError(f"trigger {path} claims {size} bytes; at most {_MAX_BYTES} are read")


def _read_picture(path: Path, data: bytes) -> dict[str, Tensor]:
    """Pattern and mask in [0, 1]; gray stays one channel."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise UnsafeInputError(f"trigger {path} is over {_MAX_PIXELS} pixels; shrink it")
            clear = image.has_transparency_data
            gray = image.mode in ("1", "L", "LA", "La")
            mode = ("LA" if clear else "L") if gray else ("RGBA" if clear else "RGB")
            values = np.array(image.convert(mode), dtype=np.float32) / 255
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnsafeInputError(f"trigger {path} cannot be decoded: {reason(error)}") from None
    pixels = torch.from_numpy(values.reshape(*values.shape[:2], -1)).permute(2, 0, 1).contiguous()
    if clear:
        return {"mask": pixels[-1:].contiguous(), "pattern": pixels[:-1].contiguous()}
    return {"mask": torch.full_like(pixels[:1], _BLEND), "pattern": pixels}


def _checked(name: str, arrays: dict[str, Tensor], path: Path) -> Trigger:
    if found := [key for key, values in arrays.items() if values.is_complex()]:
        raise UsageError(f"trigger {path}: {found[0]!r} must hold real numbers, is complex")
    mask, pattern = (_planes(arrays[key]) for key in ("mask", "pattern"))
    shapes = f"mask {tuple(mask.shape)}, pattern {tuple(pattern.shape)}"
    if mask.ndim != 3 or pattern.ndim != 3 or mask.shape != (1, *pattern.shape[1:]):
        raise UsageError(f"trigger {path} needs mask [1, H, W] and pattern [C, H, W]; got {shapes}")
    if 0 in pattern.shape:
        raise UsageError(f"trigger {path} is empty: {shapes}")
    flag = arrays.get("add", torch.zeros(1))
    if flag.numel() != 1 or flag.item() not in (0, 1):
        raise UsageError(f"trigger {path}: 'add' must be one number, 0 or 1")
    add = bool(flag.item())
    for what, values, low in (("mask", mask, 0), ("pattern", pattern, -1 if add else 0)):
        if not bool(((values >= low) & (values <= 1)).all()):  # also false for NaN
            raise UsageError(
                f"trigger {path}: {what} must lie in [{low}, 1]; divide 8-bit values by 255"
            )
    return Trigger(name=name, mask=mask, pattern=pattern, add=add)


def _planes(values: Tensor) -> Tensor:
    return values.float()[None] if values.ndim == 2 else values.float()
