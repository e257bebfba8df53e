"""Reading an untrusted checkpoint: nothing in it runs, its numbers and claims are checked.

The file's first bytes decide its format, not its name. safetensors and ``torch.save`` files are
read; the latter through ``weights_only=True`` alone.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mimic_fast.config import EncoderSettings, EncoderSpec
from mimic_fast.encoders.build import Encoder, build_encoder, count_weights
from mimic_fast.encoders.names import match_keys
from mimic_fast.encoders.reasons import reason
from mimic_fast.encoders.recognise import recognise_spec
from mimic_fast.encoders.torch_file import read_torch_tensors
from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.files import sha256_file
from mimic_fast.progress import Event, Reporter

METADATA_KEY = "mimic_fast"

_SLACK = 2**27  # weights, half a gigabyte, that any file may lack before it counts as a bomb
_RECOGNISE = EncoderSettings()
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_LARGEST_CARD = 1_000_000  # bytes
_LONGEST_KEY = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a file holds, before anything is known about the architecture.

    Args:
        path: Where it was read from.
        format: By its content.
        sha256: Hex digest of the file.
        tensors: Every tensor by its original key, on the CPU; may be mapped from the file.
        card: Our card if there is one (it has a ``spec``); claims, not facts.
    """

    path: Path
    format: Literal["safetensors", "torch"]
    sha256: str
    tensors: dict[str, Tensor]
    card: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedEncoder:
    """An encoder with the weights of a checkpoint, and the facts needed to write one like it.

    Args:
        encoder: On the CPU, in evaluation mode.
        path: The checkpoint.
        format: Of the checkpoint.
        sha256: Of the checkpoint.
        key_map: Backbone key to the checkpoint's key.
        dtypes: Backbone key to the checkpoint's number type.
        unused: Keys of the checkpoint that are no part of the encoder (classifier, projector).
        assumed: Fields of the specification that rest on convention; see :class:`Recognised`.
    """

    encoder: Encoder
    path: Path
    format: Literal["safetensors", "torch"]
    sha256: str
    key_map: dict[str, str]
    dtypes: dict[str, torch.dtype]
    unused: tuple[str, ...]
    assumed: tuple[str, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads all tensors of a checkpoint, executing nothing.

    Raises:
        UsageError: If there is no such readable file.
        UnsafeInputError: If it is damaged, pretends to another format, holds code, inflates, or has
            numbers that are not finite.
    """
    kind = _format(path)
    digest = sha256_file(path)
    metadata: Mapping[str, str] = {}
    if kind == "safetensors":
        tensors, metadata = _read_safetensors(path)
    else:
        tensors = read_torch_tensors(path, zipped=kind == "zip")
    _check_numbers(path, tensors)
    return Checkpoint(
        path=path,
        format="safetensors" if kind == "safetensors" else "torch",
        sha256=digest,
        tensors=tensors,
        card=_read_card(path, digest, metadata),
    )


def load_encoder(path: Path, settings: EncoderSettings = _RECOGNISE) -> LoadedEncoder:
    """Builds the encoder of a checkpoint and fills it with its weights.

    Args:
        path: Checkpoint file.
        settings: What is given wins over the card and over what the keys show.

    Raises:
        UsageError: If the file is missing, the architecture cannot be told, or the weights do not
            fit it.
        UnsafeInputError: As in :func:`read_checkpoint`.
    """
    return fill_encoder(read_checkpoint(path), settings)


def report_assumed(loaded: LoadedEncoder, report: Reporter) -> None:
    """Says which fields of the specification rest on convention: wrong ones change the features."""
    if not loaded.assumed:
        return
    spec = loaded.encoder.spec.model_dump(mode="json")
    values = {**spec, **{f"arguments.{name}": v for name, v in spec["arguments"].items()}}
    facts = ", ".join(f"{name} {values[name]}" for name in loaded.assumed)
    report(Event(phase="start", message=f"assumed of {loaded.path.name}: {facts}; see encoder.*"))


def fill_encoder(checkpoint: Checkpoint, settings: EncoderSettings = _RECOGNISE) -> LoadedEncoder:
    """As :func:`load_encoder`, for a checkpoint that has been read.

    Raises:
        UsageError: If the architecture cannot be told, or the weights do not fit it.
        UnsafeInputError: If the card is not valid.
    """
    found = recognise_spec(checkpoint.tensors, settings, checkpoint.card)
    _check_size(found.spec, checkpoint)
    # Seeded, so that loading draws nothing from the global random state.
    encoder = build_encoder(found.spec, seed=0)
    own = encoder.backbone.state_dict()
    shapes = {key: tensor.shape for key, tensor in own.items()}
    match = match_keys(shapes, checkpoint.tensors, found.spec)
    with torch.no_grad():
        for key, name in match.keys.items():
            value = checkpoint.tensors[name]
            if value.is_floating_point() != own[key].is_floating_point():
                raise UsageError(
                    f"{checkpoint.path}: {name!r} has type {value.dtype}, needs {own[key].dtype}"
                )
            own[key].copy_(value)
    return LoadedEncoder(
        encoder=encoder.eval(),
        path=checkpoint.path,
        format=checkpoint.format,
        sha256=checkpoint.sha256,
        key_map=match.keys,
        dtypes={key: checkpoint.tensors[name].dtype for key, name in match.keys.items()},
        unused=match.unused,
        assumed=found.assumed,
    )


def _check_size(spec: EncoderSpec, checkpoint: Checkpoint) -> None:
    # A card may ask for an encoder that fills the memory, so the file must hold about as many
    # weights. Only about: what does not fit exactly is told key by key later.
    held = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    needed = count_weights(spec)
    if needed > 2 * held + _SLACK:
        raise UsageError(
            f"{checkpoint.path}: {spec.architecture} with these arguments needs {needed:,} "
            f"weights, the file holds {held:,}; give the encoder.* settings that fit it"
        )


def _format(path: Path) -> Literal["safetensors", "zip", "pickle"]:
    if path.exists() and not path.is_file():
        raise UsageError(f"checkpoint {path} is not a file; give the path of a checkpoint file")
    try:
        with path.open("rb") as file:
            head = file.read(9)
        size = path.stat().st_size
    except FileNotFoundError:
        raise UsageError(f"checkpoint {path} does not exist; give the path of a file") from None
    except OSError as error:
        raise UsageError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    torch_format = _torch_format(head)
    if torch_format and path.suffix == ".safetensors":
        raise UnsafeInputError(
            f"{path} is named .safetensors but holds a pickle, which can run code; refused"
        )
    if torch_format:
        return torch_format
    if len(head) < 9 or head[8:9] != b"{":
        raise UnsafeInputError(
            f"{path} is neither a safetensors nor a torch checkpoint (damaged, or another format)"
        )
    header = int.from_bytes(head[:8], "little")
    if header > _LARGEST_HEADER or 8 + header > size:
        raise UnsafeInputError(
            f"{path} claims a header of {header} bytes, has {size}; truncated or tampered with"
        )
    return "safetensors"


def _torch_format(head: bytes) -> Literal["zip", "pickle"] | None:
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    return "pickle" if head[:1] == b"\x80" and head[1:2] <= b"\x05" and head[8:9] != b"{" else None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise UnsafeInputError(f"{path} is a damaged safetensors file: {reason(error)}") from None
    if not tensors:
        raise UnsafeInputError(f"{path} holds no tensors; give an encoder's weights")
    return tensors, metadata


def _check_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not name.isprintable() or len(name) > _LONGEST_KEY:
            raise UnsafeInputError(f"{path} has a key that is no module path: {name[:40]!r}")
        if tensor.is_complex():
            raise UnsafeInputError(f"{path}: {name!r} holds complex numbers; no encoder has them")
        if not tensor.is_floating_point():
            continue
        # float8 has no isfinite; float64 must still be finite in the encoder's float32.
        narrow = tensor if tensor.element_size() in (2, 4) else tensor.float()
        if not bool(torch.isfinite(narrow).all()):
            raise UnsafeInputError(
                f"{path}: {name!r} holds values that are not finite; the checkpoint is damaged"
            )


def _read_card(path: Path, digest: str, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The card beside the file, else the one inside it; JSON without a ``spec`` is not ours."""
    beside = path.with_suffix(".json")
    card = None
    if beside.is_file():
        try:
            with beside.open("rb") as file:
                text = file.read(_LARGEST_CARD + 1)
        except OSError as error:
            raise UsageError(f"card {beside} cannot be read: {error.strerror}") from None
        card = _parse_card(text, beside)
    if card is None and METADATA_KEY in metadata:
        card = _parse_card(metadata[METADATA_KEY].encode(), path)
    if card is not None and card.get("sha256", digest) != digest:
        raise UnsafeInputError(
            f"{beside} names another file (sha256 {str(card['sha256'])[:12]}..., {path.name} has "
            f"{digest[:12]}...); one of the two was changed"
        )
    return card


def _parse_card(text: bytes, path: Path) -> dict[str, Any] | None:
    try:
        if len(text) > _LARGEST_CARD:
            raise ValueError("too large")
        card = json.loads(text)
    except (ValueError, RecursionError):
        warnings.warn(f"{path} is not a readable card and was ignored", stacklevel=4)
        return None
    return card if isinstance(card, dict) and isinstance(card.get("spec"), dict) else None
