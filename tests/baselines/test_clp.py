"""CLP: bounds, the BatchNorm that belongs to a layer, and what is pruned."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from mimic_fast.baselines.clp import (
    ClpSettings,
    Layer,
    channel_bounds,
    clp,
    following_norms,
    layers_of,
    outliers,
    prune,
)
from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.encoders.build import Encoder, build_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import NothingSavedError, UnsafeInputError, UsageError
from mimic_fast.recipe import validated


def spec_of(architecture, **changes):
    values = {"image_size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3, **changes}
    return EncoderSpec(architecture=architecture, **values)


def settings_of(suspect, out):
    return validated(
        Settings, {"encoder": {"teacher": str(suspect)}, "run": {"out": str(out), "device": "cpu"}}
    )


def layer_of(module, norm=None):
    return Layer(name="layer", weight=module.weight, bias=module.bias, norm=norm)


class Chain(nn.Module):
    """Whatever is between images and features, for encoders that no library has."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._way = forward

    def forward(self, images):
        return self._way(self, images).mean((2, 3))


def encoder_of(forward, **parts):
    spec = spec_of("timm:resnet18", image_size=8)
    return Encoder(spec, Chain(forward, **parts), feature_dim=4).eval()


@pytest.mark.parametrize(
    ("shape", "groups"), [((5, 3, 3, 3), 1), ((6, 7, 1, 1), 1), ((6, 1, 5, 5), 6), ((4, 16, 2), 1)]
)
def test_bounds_are_the_largest_singular_values_times_the_factor(shape, groups):
    torch.manual_seed(0)
    make, norm_of = (nn.Conv2d, nn.BatchNorm2d) if len(shape) == 4 else (nn.Conv1d, nn.BatchNorm1d)
    conv = make(shape[1] * groups, shape[0], shape[2], groups=groups)
    norm = norm_of(shape[0], eps=1e-3)
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.running_var, 0.01, 3)

    bounds = channel_bounds(layer_of(conv, norm))

    expected = [
        torch.linalg.svdvals(kernel.reshape(shape[1], -1).double())[0]
        * (gamma.abs() / (variance + 1e-3).sqrt()).double()
        for kernel, gamma, variance in zip(
            conv.weight, norm.weight, norm.running_var, strict=True
        )
    ]  # fmt: skip
    torch.testing.assert_close(bounds, torch.stack(expected), rtol=1e-6, atol=0)


def test_a_linear_channel_is_bounded_by_its_rows_norm():
    linear = nn.Linear(7, 5)

    bounds = channel_bounds(layer_of(linear))

    torch.testing.assert_close(bounds, linear.weight.double().norm(dim=1))


def test_no_change_of_a_one_by_one_convolutions_input_moves_a_channel_more_than_its_bound():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 9, 1), nn.BatchNorm2d(9)
    nn.init.uniform_(norm.running_var, 0.1, 2)
    nn.init.normal_(norm.weight)
    layer, both = layer_of(conv, norm), nn.Sequential(conv, norm).eval()

    first, second = torch.randn(2, 500, 6, 1, 1)
    moved = (both(first) - both(second)).abs()[..., 0, 0]
    share = moved / (first - second).flatten(1).norm(dim=1)[:, None]
    along = F.normalize(conv.weight[:, :, 0, 0], dim=1)[:, :, None, None]
    reached = (both(along) - both(torch.zeros_like(along))).abs()[..., 0, 0].diagonal()

    assert (share <= channel_bounds(layer) * (1 + 1e-5)).all()
    torch.testing.assert_close(reached.double(), channel_bounds(layer), rtol=1e-5, atol=0)


def test_outliers_are_strictly_above_mean_and_u_deviations():
    bounds = torch.tensor([1.0] * 15 + [9.0])  # 3.75 deviations above the mean

    assert outliers(bounds, u=3.74) == [15]
    assert outliers(bounds, u=3.76) == []
    assert outliers(-bounds, u=0.1) == list(range(15))
    assert outliers(torch.ones(6), u=0.0) == []
    assert outliers(torch.ones(1), u=0.0) == []


@pytest.mark.parametrize(
    ("architecture", "changes", "paired", "alone"),
    [
        ("timm:resnet18", {"stem": "small_stride1"}, 20, 0),
        ("torchvision:resnet18", {}, 20, 0),
        ("timm:tf_efficientnet_lite0", {}, 49, 0),
        ("timm:resnet18", {"arguments": {"norm_layer": "groupnorm"}}, 0, 20),
        ("timm:vit_tiny_patch16_224", {"arguments": {"depth": 2}}, 0, 9),
    ],
    ids=["timm", "torchvision", "lite0", "groupnorm", "vit"],
)
def test_every_convolution_finds_its_batchnorm(architecture, changes, paired, alone):
    encoder = build_encoder(spec_of(architecture, **changes), seed=0).eval()

    layers = layers_of(encoder)

    norms = [layer.norm for layer in layers if layer.norm is not None]
    assert (len(norms), len(layers) - len(norms)) == (paired, alone)
    assert len({id(norm) for norm in norms}) == paired


def test_pairs_are_those_of_the_forward_and_not_of_the_names():
    # Declared in another order than they run in.
    encoder = encoder_of(
        lambda net, x: net.second_norm(net.second(net.first_norm(net.first(x)))),
        second_norm=nn.BatchNorm2d(4),
        first=nn.Conv2d(3, 4, 3),
        second=nn.Conv2d(4, 4, 3),
        first_norm=nn.BatchNorm2d(4),
    )
    net = encoder.backbone

    norms = following_norms(encoder)

    assert norms == {"backbone.first": net.first_norm, "backbone.second": net.second_norm}


@pytest.mark.parametrize(
    "between",
    [
        lambda made, x: made + x.mean(),
        lambda made, x: made.add_(x.mean()),
        lambda made, x: F.relu(made, inplace=True),
        lambda made, x: torch.cat([made, made])[:1],
        lambda made, x: made[:, :, :2],
    ],
    ids=["sum", "sum in place", "relu in place", "copy", "part"],
)
def test_a_batchnorm_behind_something_else_is_not_the_layers_own(between):
    encoder = encoder_of(
        lambda net, x: net.norm(between(net.conv(x), x)),
        conv=nn.Conv2d(3, 4, 3),
        norm=nn.BatchNorm2d(4),
    )

    assert following_norms(encoder) == {}


def test_a_batchnorm_over_rows_of_a_flattened_sequence_is_found():
    def forward(net, x):
        rows = net.linear(x.flatten(2).mT)  # [batch, position, channel]
        return net.norm(rows.flatten(0, 1)).reshape_as(rows).mT[..., None]

    encoder = encoder_of(forward, linear=nn.Linear(3, 4), norm=nn.BatchNorm1d(4))

    assert following_norms(encoder) == {"backbone.linear": encoder.backbone.norm}


def test_following_leaves_the_encoder_as_it_was(suspect):
    encoder = load_encoder(suspect).encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    following_norms(encoder)

    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())


def test_a_planted_channel_is_pruned_and_no_other(suspect, tmp_path):
    state = load_file(suspect)
    state["layer4.0.bn1.weight"][5] *= 12
    save_file(state, tmp_path / "planted.safetensors", metadata=metadata_of(suspect))

    path = clp(settings_of(tmp_path / "planted.safetensors", tmp_path / "out"), ClpSettings())

    pruned = load_file(path)
    changed = {name for name, value in pruned.items() if not torch.equal(value, state[name])}
    card = json.loads(path.with_suffix(".json").read_bytes())
    assert changed <= {"layer4.0.bn1.weight", "layer4.0.bn1.bias"}
    assert pruned["layer4.0.bn1.weight"].eq(0).nonzero().flatten().tolist() == [5]
    assert card["pruned_channels"] == {"backbone.layer4.0.conv1": [5]}
    assert (card["kind"], card["pruned"], card["clean_images"]) == ("clp", 1, 0)
    assert card["settings"] == {"u": 3.0}
    assert card["layers"] == card["layers_with_batchnorm"] == 13
    assert card["channels"] == sum(len(v) for n, v in state.items() if n.endswith("running_var"))


def test_a_pruned_channel_gives_zero_with_and_without_batchnorm():
    torch.manual_seed(0)
    conv, norm, linear = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16).eval(), nn.Linear(4, 16)
    with torch.no_grad():
        conv.weight[2] *= 30
        linear.weight[7] *= 30
        nn.init.normal_(norm.bias)

    pruned = prune([layer_of(conv, norm)], u=3.0), prune([layer_of(linear)], u=3.0)

    assert pruned == ({"layer": [2]}, {"layer": [7]})
    assert norm(conv(torch.rand(2, 3, 8, 8))).abs().amax((0, 2, 3)).eq(0).nonzero().tolist() == [[2]]
    assert linear(torch.rand(5, 4)).abs().amax(0).eq(0).nonzero().tolist() == [[7]]


def test_the_projections_of_torchs_attention_are_judged_too():
    def forward(net, x):
        tokens = x.flatten(2).mT
        return net.attention(tokens, tokens, tokens, need_weights=False)[0].mT[..., None]

    attention = nn.MultiheadAttention(3, 1, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.fill_(1)[4] *= 30
    layers = layers_of(encoder_of(forward, attention=attention))

    pruned = prune(layers, u=2.5)  # one of 9 channels can lie 2.67 deviations above the mean

    names = [layer.name for layer in layers]
    assert names == ["backbone.attention.in_proj", "backbone.attention.out_proj"]
    assert pruned == {"backbone.attention.in_proj": [4]}
    assert attention.in_proj_weight.any(dim=1).tolist() == [True] * 4 + [False] + [True] * 4


def test_weights_that_are_not_finite_are_refused(suspect, tmp_path):
    conv = nn.Conv2d(3, 4, 3)
    nn.init.constant_(conv.weight, torch.inf)

    with pytest.raises(UnsafeInputError, match="weights of layer are not finite"):
        channel_bounds(layer_of(conv))


def test_an_encoder_without_layers_to_judge_is_refused():
    encoder = encoder_of(lambda net, x: net.norm(x), norm=nn.BatchNorm2d(3))

    with pytest.raises(UsageError, match="has no convolution or linear layer of two channels"):
        layers_of(encoder)


def test_a_stopped_run_writes_nothing(suspect, tmp_path):
    with pytest.raises(NothingSavedError, match="clp keeps no state"):
        clp(settings_of(suspect, tmp_path / "out"), ClpSettings(), stop=lambda: True)
    assert not (tmp_path / "out").exists()


def test_without_an_encoder_it_says_what_is_missing(tmp_path):
    settings = validated(Settings, {"run": {"out": str(tmp_path)}})

    with pytest.raises(UsageError, match=r"clp needs encoder\.teacher and run\.out"):
        clp(settings, ClpSettings())


def metadata_of(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()
