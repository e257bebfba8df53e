"""Finished parts of step A on disk, so that a killed run goes on where it was.

Each part is one safetensors file, written whole or not at all, that names what it was computed
from: a part of other images, weights or settings is never taken for this run's.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimic_fast.distributed import whole
from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.files import write_atomic

_KEY = "computed_from"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedParts:
    """A folder of finished parts; without a folder nothing is kept.

    Args:
        folder: Where the files are.
        origin: What every part depends on: encoder, settings, software.
    """

    folder: Path | None
    origin: Mapping[str, Any]

    def find(self, name: str, data: Tensor) -> dict[str, Tensor] | None:
        """The part called ``name`` if it was computed from ``data`` and ``origin``, else None."""
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get(_KEY) != self._fingerprint(data):
                    return None
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            warnings.warn(f"{path} is damaged ({error}); computing it again", stacklevel=2)
            return None

    def keep(self, name: str, data: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Writes a part computed from ``data``.

        Raises:
            MachineError: If the folder cannot be written.
        """
        from safetensors.torch import save

        path = self._path(name)
        if path is None:
            return
        rows = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_atomic(path, save(rows, metadata={_KEY: self._fingerprint(data)}))

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def _fingerprint(self, data: Tensor) -> str:
        text = json.dumps({**self.origin, "data": tensor_digest(data)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def encoder_origin(tapped: TappedEncoder) -> dict[str, Any]:
    """What decides an encoder's activations on given images, as JSON values; collective."""
    state = tapped.encoder.state_dict()
    weights = hashlib.sha256()
    for key in sorted(state):
        weights.update(f"{key} {tensor_digest(whole(state[key]))}\n".encode())
    return {
        "weights": weights.hexdigest(),
        "spec": tapped.encoder.spec.model_dump(mode="json"),
        "taps": list(tapped.taps),
        "torch": torch.__version__,
        "device": tapped.encoder.mean.device.type,
    }


def tensor_digest(tensor: Tensor) -> str:
    """Hex SHA-256 of a tensor's type, shape and bytes."""
    rows = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{rows.dtype} {list(rows.shape)} ".encode())
    digest.update(rows.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
