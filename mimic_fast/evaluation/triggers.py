"""Triggers: a mask and a pattern, stamped on images; their files hold no code.

The white patch has BadEncoder's geometry (Jia et al., S&P 2022): 10x10 at rows and columns 21-30 of
32x32, 50x50 at 173-222 of 224x224.
"""

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.files import write_atomic

_MAX_BYTES = 64 * 2**20  # a trigger of 2048x2048 RGB in float32 is 48 MiB
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True, kw_only=True, slots=True)
class Trigger:
    """A pattern and where it goes.

    Args:
        name: Name in reports and files.
        mask: Opacity in [0, 1]: 0 keeps the image, 1 shows the pattern.
        pattern: Pixel values in [0, 1]; irrelevant where the mask is 0.
    """

    name: str
    mask: Float[Tensor, "1 height width"]
    pattern: Float[Tensor, "channel height width"]


def apply_trigger(
    images: Float[Tensor, "batch channel height width"], trigger: Trigger
) -> Float[Tensor, "batch channel height width"]:
    """``images * (1 - mask) + pattern * mask``, a new tensor of the images' type and device.

    Args:
        images: Pixel values in [0, 1].
        trigger: Of the images' size and channels; see :func:`fit_trigger`.

    Raises:
        UsageError: If sizes or channels differ.
    """
    if images.shape[1:] != trigger.pattern.shape:
        raise UsageError(
            f"trigger '{trigger.name}' is {tuple(trigger.pattern.shape)}, images are "
            f"{tuple(images.shape[1:])}; resize it with fit_trigger"
        )
    mask = trigger.mask.to(images)
    return images * (1 - mask) + trigger.pattern.to(images) * mask


def white_patch(*, image_size: int, channels: int) -> Trigger:
    """BadEncoder's white square near the lower right corner.

    The side is 10/32 of the image up to 32 pixels and 50/224 from 224 pixels on, linear in between;
    the margin is 1 pixel, scaled up from 224 pixels on.
    """
    small, large = 10 / 32, 50 / 224
    between = min(max((image_size - 32) / (224 - 32), 0.0), 1.0)
    side = max(1, round(image_size * (small + (large - small) * between)))
    stop = image_size - max(1, round(image_size / 224))
    mask = torch.zeros(1, image_size, image_size)
    mask[:, stop - side : stop, stop - side : stop] = 1
    return Trigger(name="white_patch", mask=mask, pattern=mask.repeat(channels, 1, 1))


def fit_trigger(trigger: Trigger, *, image_size: int, channels: int) -> Trigger:
    """The trigger for another input size or channel count.

    A white patch is rebuilt by its own geometry; anything else is interpolated bilinearly
    (antialiased); color becomes gray by ITU-R BT.601 luma, as Pillow does it.

    Raises:
        UsageError: If the channel counts cannot be converted.
    """
    own, height, width = trigger.pattern.shape
    if (own, height, width) == (channels, image_size, image_size):
        return trigger
    if height == width and _same(trigger, white_patch(image_size=height, channels=own)):
        return white_patch(image_size=image_size, channels=channels)
    mask, pattern = trigger.mask, _convert_channels(trigger.pattern, channels, trigger.name)
    if (height, width) != (image_size, image_size):
        mask, pattern = _resize(mask, image_size), _resize(pattern, image_size)
    return replace(trigger, mask=mask, pattern=pattern)


def save_trigger(path: Path, trigger: Trigger) -> None:
    """Writes mask, pattern and name as safetensors.

    Raises:
        MachineError: If the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {"mask": trigger.mask.contiguous(), "pattern": trigger.pattern.contiguous()}
    write_atomic(path, save(tensors, metadata={"name": trigger.name}))


def load_trigger(path: Path) -> Trigger:
    """Reads a trigger from safetensors or from ``.npz``, both with arrays ``mask`` and ``pattern``.

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
    name, arrays = _read_npz(path) if data[:2] == b"PK" else _read_safetensors(path, data)
    missing = sorted({"mask", "pattern"} - set(arrays))
    if missing:
        raise UsageError(f"trigger {path} needs arrays 'mask' and 'pattern'; missing {missing}")
    return _checked(name or path.stem, arrays["mask"], arrays["pattern"], path)


def _read_safetensors(path: Path, data: bytes) -> tuple[str, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    try:
        tensors = load(data)
        with safe_open(path, framework="pt") as file:
            name = (file.metadata() or {}).get("name", "")
    except (SafetensorError, ValueError, KeyError) as error:
        raise UnsafeInputError(
            f"trigger {path} is neither safetensors nor .npz: {str(error).splitlines()[0]}"
        ) from None
    return name, tensors


def _read_npz(path: Path) -> tuple[str, dict[str, Tensor]]:
    import numpy as np

    arrays: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for key in ("mask", "pattern"):
                if f"{key}.npy" not in archive.namelist():
                    continue
                _check_declared_size(archive, f"{key}.npy", path)
                with archive.open(f"{key}.npy") as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
                arrays[key] = torch.from_numpy(np.array(array, dtype=np.float32))
    except (zipfile.BadZipFile, ValueError, TypeError, EOFError, OSError) as error:
        raise UnsafeInputError(f"trigger {path} is not a plain .npz: {error}") from None
    return "", arrays


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


def _checked(name: str, mask: Tensor, pattern: Tensor, path: Path) -> Trigger:
    mask = mask.float()[None] if mask.ndim == 2 else mask.float()
    pattern = pattern.float()[None] if pattern.ndim == 2 else pattern.float()
    shapes = f"mask {tuple(mask.shape)}, pattern {tuple(pattern.shape)}"
    if mask.ndim != 3 or pattern.ndim != 3 or mask.shape != (1, *pattern.shape[1:]):
        raise UsageError(f"trigger {path} needs mask [1, H, W] and pattern [C, H, W]; got {shapes}")
    if 0 in pattern.shape:
        raise UsageError(f"trigger {path} is empty: {shapes}")
    for what, values in (("mask", mask), ("pattern", pattern)):
        if not bool(((values >= 0) & (values <= 1)).all()):  # also false for NaN
            raise UsageError(
                f"trigger {path}: {what} must lie in [0, 1]; divide 8-bit values by 255"
            )
    return Trigger(name=name, mask=mask, pattern=pattern)


def _convert_channels(pixels: Tensor, channels: int, name: str) -> Tensor:
    own = pixels.shape[0]
    if own == channels:
        return pixels
    if own == 1:
        return pixels.repeat(channels, 1, 1)
    if own == 3 and channels == 1:
        return (pixels * pixels.new_tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
    raise UsageError(
        f"{name} has {own} channels and the encoder takes {channels}; give one that fits"
    )


def _resize(pixels: Tensor, image_size: int) -> Tensor:
    size = (image_size, image_size)
    resized = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    return resized.clamp(0, 1)


def _same(a: Trigger, b: Trigger) -> bool:
    visible = a.mask * a.pattern, b.mask * b.pattern
    return torch.equal(a.mask, b.mask) and torch.equal(*visible)
