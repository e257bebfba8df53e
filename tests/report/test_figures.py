"""Figures on disk: what report.json names comes back, what is not ours does not."""

import pytest
import torch
from sklearn.decomposition import PCA

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.report.attention import attention_figure, attention_maps, attention_tap
from mimic_fast.report.feature_plot import feature_figure, principal_components
from mimic_fast.report.figures import Figure, load_figures, save_figures

FIGURE = Figure(name="one", title="One", caption="A caption", alt="A picture", svg=b"<svg/>")


def test_figures_come_back_as_they_were(tmp_path):
    entries = save_figures(tmp_path, [FIGURE])

    assert load_figures(tmp_path, entries) == (FIGURE,)
    assert (tmp_path / "figures" / "one.svg").read_bytes() == b"<svg/>"


@pytest.mark.parametrize(
    "change", [{"name": "../one"}, {"name": "gone"}, {"name": None}, {"title": ...}]
)
def test_figure_that_is_not_ours_is_left_out_and_said(tmp_path, change):
    (entry,) = save_figures(tmp_path, [FIGURE])
    (tmp_path / "one.svg").write_bytes(b"<svg/>")
    changed = {key: value for key, value in (entry | change).items() if value is not ...}

    with pytest.warns(UserWarning, match="left out of the report"):
        assert load_figures(tmp_path, [changed]) == ()


@pytest.fixture(scope="module")
def encoder():
    spec = EncoderSpec(
        architecture="timm:resnet18",
        arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
        stem="small_stride2",
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    return build_encoder(spec, seed=0)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (5, 3, 32, 32), generator=generator, dtype=torch.uint8)


def test_attention_maps_are_the_scaled_powers_of_the_tap(encoder, images):
    taps = default_taps(encoder)
    _, feature_maps = TappedEncoder(encoder.eval(), taps)(images.double().div(255).float())

    for tap, feature_map in zip(taps, feature_maps, strict=True):
        power = feature_map.detach().double().abs().pow(3).sum(1)
        expected = power / power.sum((1, 2), keepdim=True)
        got = attention_maps(encoder, images, tap=tap, power=3.0)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


def test_deepest_tap_with_places_is_shown(encoder):
    taps = default_taps(encoder)
    sides = {"layer1": 16, "layer2": 8, "layer3": 4, "layer4": 2}

    assert attention_tap(encoder, taps) == "layer3"
    assert attention_tap(encoder, ("layer4",)) is None
    assert set(taps) == set(sides)


def test_attention_figure_names_what_it_shows(encoder, images):
    roles = {"teacher": encoder, "purified": encoder}

    clean = attention_figure(roles, default_taps(encoder), images, None)
    both = attention_figure(roles, default_taps(encoder), images, images)

    assert clean is not None
    assert both is not None
    assert "layer3" in clean.caption
    assert "with the trigger" not in clean.alt
    assert "with the trigger" in both.alt
    assert len(both.svg) > len(clean.svg)
    assert attention_figure(roles, ("layer4",), images, None) is None


def test_principal_components_are_those_of_scikit_learn():
    features = torch.randn(40, 7, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 8)

    points, share = principal_components(features)

    oracle = PCA(2, svd_solver="full").fit(features.double().numpy())
    expected = torch.from_numpy(oracle.transform(features.double().numpy()))
    signs = (points * expected).sum(0).sign()
    torch.testing.assert_close(points, expected * signs)
    assert share == pytest.approx(oracle.explained_variance_ratio_.sum())


def test_features_without_an_attack_make_a_figure_too():
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))

    figure = feature_figure({"teacher": features}, {}, labels=torch.arange(9), target=None)

    assert figure.title == "Features of test images"
    assert b"with the trigger" not in figure.svg
