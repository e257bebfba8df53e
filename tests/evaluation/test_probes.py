"""Probes against the conditions that define them."""

import pytest
import torch
import torch.nn.functional as F

from mimic_fast.errors import UsageError
from mimic_fast.evaluation.probes import fit_knn_probe, fit_linear_probe


def blobs(*, n: int = 300, dim: int = 12, classes: int = 4, spread: float = 1.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(n) % classes
    noise = torch.randn(n, dim, generator=generator)
    return centers[labels] + spread * noise, labels


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_linear_probe_minimizes_its_objective(l2):
    features, labels = blobs()

    probe = fit_linear_probe(features, labels, num_classes=4, l2=l2)

    # The objective is convex: a vanishing gradient, computed here anew, is the minimum.
    x = features.double()
    x = (x - x.mean(0)) / x.var(0, correction=0).sqrt()
    weight = probe.weight.clone().requires_grad_()
    bias = probe.bias.clone().requires_grad_()
    log_p = (x @ weight.T + bias).log_softmax(1)
    loss = -log_p[torch.arange(len(x)), labels].mean() + l2 / 2 * weight.pow(2).sum()
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        assert float(gradient.abs().max()) < 1e-6


def test_linear_probe_predicts_the_largest_logit_on_new_images():
    features, labels = blobs()
    new, _ = blobs(seed=1, n=5000)
    probe = fit_linear_probe(features, labels, num_classes=4, l2=1e-3)

    logits = (new.double() - probe.mean) / probe.scale @ probe.weight.T + probe.bias

    assert torch.equal(probe.predict(new), logits.argmax(1))
    assert probe.train_images == 300


def test_linear_probe_separates_what_is_separable_and_is_at_chance_on_noise():
    features, labels = blobs(spread=0.1)
    assert torch.equal(
        fit_linear_probe(features, labels, num_classes=4, l2=1e-3).predict(features), labels
    )
    noise = torch.randn(4000, 12, generator=torch.Generator().manual_seed(2))
    fitted = fit_linear_probe(noise[:2000], torch.arange(2000) % 4, num_classes=4, l2=1e-3)
    hits = fitted.predict(noise[2000:]) == torch.arange(2000) % 4
    assert float(hits.double().mean()) == pytest.approx(0.25, abs=0.04)


def test_linear_probe_depends_on_nothing_but_its_input():
    features, labels = blobs()
    torch.manual_seed(1)
    first = fit_linear_probe(features, labels, num_classes=4, l2=1e-3)
    torch.manual_seed(2)
    with torch.no_grad():
        second = fit_linear_probe(features, labels, num_classes=4, l2=1e-3)

    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_linear_probe_is_invariant_to_scale_and_shift_of_features():
    features, labels = blobs()
    new, _ = blobs(seed=1)
    scale, shift = torch.logspace(-3, 3, 12), torch.linspace(-9, 9, 12)

    plain = fit_linear_probe(features, labels, num_classes=4, l2=1e-2)
    moved = fit_linear_probe(features * scale + shift, labels, num_classes=4, l2=1e-2)

    same = plain.predict(new) == moved.predict(new * scale + shift)
    assert float(same.double().mean()) > 0.99


def test_constant_feature_has_no_say_even_where_it_varies_later():
    features, labels = blobs()
    features[:, 3] = 7.0
    new, _ = blobs(seed=1)
    probe = fit_linear_probe(features, labels, num_classes=4, l2=1e-3)

    loud = new.clone()
    loud[:, 3] = 1e6

    new[:, 3] = 7.0
    assert torch.equal(probe.predict(loud), probe.predict(new))


def test_class_without_images_is_not_predicted():
    features, labels = blobs(classes=3)

    probe = fit_linear_probe(features, labels, num_classes=5, l2=1e-3)

    assert set(probe.predict(features).tolist()) <= {0, 1, 2}


def test_knn_probe_votes_as_written_out():
    features, labels = blobs(n=60, dim=5, classes=3)
    new, _ = blobs(n=40, dim=5, classes=3, seed=3)

    predicted = fit_knn_probe(features, labels, num_classes=3).predict(new)

    expected = []
    for row in new:
        cosines = F.cosine_similarity(row[None], features)
        nearest = cosines.argsort(descending=True)[:30]  # k = n / 2
        votes = [0.0, 0.0, 0.0]
        for index in nearest.tolist():
            votes[int(labels[index])] += float(torch.exp(cosines[index] / 0.5))
        expected.append(votes.index(max(votes)))
    assert predicted.tolist() == expected


@pytest.mark.parametrize(("n", "neighbors"), [(1, 1), (3, 1), (10, 5), (399, 199), (1000, 200)])
def test_knn_probe_uses_at_most_200_and_at_most_half(n, neighbors):
    features, labels = blobs(n=n, classes=2)

    assert fit_knn_probe(features, labels, num_classes=2).neighbors == neighbors


@pytest.mark.parametrize("labels", [[0, 1, 3], [0, -1, 2]])
def test_labels_out_of_range_are_refused(labels):
    for fit in (
        lambda: fit_linear_probe(torch.rand(3, 2), torch.tensor(labels), num_classes=3, l2=0.0),
        lambda: fit_knn_probe(torch.rand(3, 2), torch.tensor(labels), num_classes=3),
    ):
        with pytest.raises(UsageError, match=r"labels must lie in 0\.\.2"):
            fit()


def test_no_images_are_refused():
    with pytest.raises(UsageError, match="got none"):
        fit_linear_probe(torch.rand(0, 2), torch.zeros(0, dtype=torch.int64), num_classes=2, l2=0.0)


def test_linear_probe_finds_the_minimum_where_features_are_nearly_one():
    """Strong correlation makes plain descent slow; wider than images makes it singular."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(200) % 4
    common = torch.randn(200, 1, generator=generator)
    for width, l2 in ((30, 1e-3), (30, 1e-6), (300, 1e-3)):
        own = torch.randn(200, width, generator=generator) + labels[:, None] * 0.1
        features = common * 50 + own

        probe = fit_linear_probe(features, labels, num_classes=4, l2=l2)

        x = (features.double() - probe.mean) / probe.scale
        weight = probe.weight.clone().requires_grad_()
        loss = F.cross_entropy(x @ weight.T + probe.bias, labels) + l2 / 2 * weight.pow(2).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        assert float(gradient.abs().max()) < 3e-6
