"""Writing an encoder: safetensors under the teacher's key names, and a card of its provenance."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.ingest import METADATA_KEY
from mimic_fast.errors import UsageError
from mimic_fast.files import machine_errors, write_atomic
from mimic_fast.version import VERSION

STORED = {"fp32": torch.float32, "fp16": torch.float16}  # number types by their setting


def export_encoder(
    encoder: Encoder,
    directory: Path,
    *,
    name: str = "encoder",
    key_map: Mapping[str, str] | None,
    card: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes ``NAME.safetensors`` and ``NAME.json``; each is whole or absent.

    Without ``dtype`` weights keep their number type, so ``load_encoder`` gives them back exactly.
    The specification also stands in the safetensors metadata: the file alone is enough.

    Args:
        encoder: What to write; its normalization goes into the card.
        directory: Made if absent.
        name: File name without suffix.
        key_map: Backbone key to the key to write, as in ``LoadedEncoder``; None keeps the library's
            keys. Counters that the teacher's file lacked (``num_batches_tracked``) are left out.
        card: Provenance, JSON values only; ``spec``, ``sha256`` and ``version`` are added.
        dtype: Number type of the written weights; None keeps the encoder's.

    Returns:
        Path of the safetensors file.

    Raises:
        UsageError: If ``key_map`` does not cover the weights, or the card is not JSON.
        MachineError: If the directory cannot be written.
    """
    from safetensors.torch import save

    state = encoder.backbone.state_dict()
    names = {key: key for key in state} if key_map is None else dict(key_map)
    missing = [k for k in state if k not in names and not k.endswith("num_batches_tracked")]
    if missing or len(set(names.values())) != len(names) or not names.keys() <= state.keys():
        raise UsageError(
            f"key_map must name every weight of {encoder.spec.architecture} once; it does not fit "
            f"at {(missing or list(names))[0]!r}"
        )
    tensors = {names[key]: _stored(tensor, dtype) for key, tensor in state.items() if key in names}
    spec = encoder.spec.model_dump(mode="json")
    inside = _json({"spec": spec, "version": VERSION}, indent=None)
    path = directory / f"{name}.safetensors"
    data = save(tensors, metadata={METADATA_KEY: inside})
    text = _json(
        {**card, "spec": spec, "sha256": hashlib.sha256(data).hexdigest(), "version": VERSION},
        indent=2,
    )
    card_path = path.with_suffix(".json")
    with machine_errors(card_path):
        card_path.unlink(missing_ok=True)  # an old card must never stand beside new weights
    write_atomic(path, data)
    write_atomic(card_path, (text + "\n").encode())
    return path


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    # Cloned: safetensors takes row-major CPU tensors that share no memory.
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", wanted, copy=True).contiguous()


def _json(value: Mapping[str, Any], *, indent: int | None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the card must hold JSON values only: {error}") from None
