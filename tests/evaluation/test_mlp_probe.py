"""The MLP probe learns what no line separates, and depends on nothing but its arguments."""

import pytest
import torch

from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.evaluation.mlp_probe import fit_mlp_probe
from mimic_fast.evaluation.probes import fit_linear_probe


def rings(count: int, seed: int):
    """Two rings around each other, far from zero and stretched: no line separates them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    angle = torch.rand(count, generator=generator) * 2 * torch.pi
    radius = 1.0 + labels + 0.1 * torch.randn(count, generator=generator)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return points * torch.tensor([100.0, 0.01]) + 50, labels


def test_it_separates_rings_where_a_line_cannot():
    features, labels = rings(600, 0)
    new, wanted = rings(400, 1)

    probe = fit_mlp_probe(features, labels, num_classes=2, epochs=60, seed=0)

    assert float((probe.predict(new) == wanted).double().mean()) > 0.97
    line = fit_linear_probe(features, labels, num_classes=2, l2=1e-3)
    assert float((line.predict(new) == wanted).double().mean()) < 0.7
    assert probe.train_images == 600


def test_it_is_the_networks_of_the_authors():
    features, labels = rings(64, 0)
    network = fit_mlp_probe(features, labels, num_classes=5, epochs=1, seed=0).network
    shapes = [tuple(p.shape) for p in network.parameters() if p.ndim == 2]
    assert shapes == [(512, 2), (256, 512), (5, 256)]
    assert [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)] == [0.5]
    assert not network.training


def test_it_depends_on_its_seed_alone():
    features, labels = rings(200, 0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fit_mlp_probe(features, labels, num_classes=2, epochs=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with torch.no_grad():
        again = fit_mlp_probe(features, labels, num_classes=2, epochs=2, seed=3)
    other = fit_mlp_probe(features, labels, num_classes=2, epochs=2, seed=4)

    weights = [next(probe.network.parameters()) for probe in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_it_can_be_stopped_and_refuses_bad_labels():
    features, labels = rings(64, 0)
    with pytest.raises(StoppedError):
        fit_mlp_probe(features, labels, num_classes=2, epochs=2, seed=0, stop=lambda: True)
    with pytest.raises(UsageError, match=r"0\.\.1, got 0\.\.2"):
        fit_mlp_probe(features, labels * 2, num_classes=2, epochs=1, seed=0)
