"""Probes against scikit-learn's classifiers on the same features."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mimic_fast.evaluation.probes import fit_knn_probe, fit_linear_probe


def blobs(*, n: int, dim: int, classes: int, seed: int):
    """Features around a center for each class, and every class at least once."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(n) % classes
    return centers[labels] + 1.5 * torch.randn(n, dim, generator=generator), labels


def objective(weight, bias, x, labels, l2: float) -> float:
    """Mean cross-entropy + l2/2 ||weight||^2, in numpy."""
    logits = x @ weight.T + bias
    logits -= logits.max(1, keepdims=True)
    chances = np.exp(logits)
    chances /= chances.sum(1, keepdims=True)
    likely = log_loss(labels, chances, labels=range(len(weight)))
    return likely + l2 / 2 * float(np.square(weight).sum())


@given(
    n=st.integers(20, 200),
    dim=st.integers(2, 24),
    classes=st.integers(3, 5),
    l2=st.sampled_from([1e-3, 1e-2, 0.3]),
    seed=st.integers(0, 999),
)
@settings(max_examples=20)
def test_linear_probe_is_scikit_learns_logistic_regression(n, dim, classes, l2, seed):
    scales = torch.logspace(-2, 2, dim)
    features, labels = blobs(n=n, dim=dim, classes=classes, seed=seed)
    new, _ = blobs(n=500, dim=dim, classes=classes, seed=seed + 1)
    features, new = features * scales, new * scales

    probe = fit_linear_probe(features, labels, num_classes=classes, l2=l2)

    scaler = StandardScaler().fit(features.double().numpy())
    x = scaler.transform(features.double().numpy())
    # Its objective is C * (sum of cross-entropies) + ||weight||^2 / 2: ours over l2.
    peer = LogisticRegression(C=1 / (n * l2), tol=1e-10, max_iter=10_000).fit(x, labels.numpy())
    own = objective(probe.weight.numpy(), probe.bias.numpy(), x, labels.numpy(), l2)
    other = objective(peer.coef_, peer.intercept_, x, labels.numpy(), l2)
    # Measured over 120 draws: objectives to 2e-9, weights to 6e-5. Ours stops at gradients of 1e-7,
    # which at l2 = 1e-3 is as far as 1e-4 from the minimum.
    assert own == pytest.approx(other, rel=1e-8)
    np.testing.assert_allclose(probe.weight.numpy(), peer.coef_, rtol=0, atol=5e-4)
    wanted = peer.decision_function(scaler.transform(new.double().numpy()))
    told = probe.predict(new).numpy()
    first, second = np.sort(wanted, axis=1)[:, -1], np.sort(wanted, axis=1)[:, -2]
    clear = first - second > 1e-2  # what lies on the border may fall to either side
    assert clear.mean() > 0.95
    assert (told == wanted.argmax(1))[clear].all()


@given(
    n=st.integers(2, 300),
    dim=st.integers(4, 16),
    classes=st.integers(2, 6),
    seed=st.integers(0, 999),
)
@settings(max_examples=20)
def test_knn_probe_is_scikit_learns_with_its_weights(n, dim, classes, seed):
    features, labels = blobs(n=n, dim=dim, classes=classes, seed=seed)
    new, _ = blobs(n=200, dim=dim, classes=classes, seed=seed + 1)

    probe = fit_knn_probe(features, labels, num_classes=classes)

    peer = KNeighborsClassifier(
        n_neighbors=probe.neighbors,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / probe.temperature),  # pyright: ignore[reportArgumentType]
    ).fit(features.double().numpy(), labels.numpy())
    votes = peer.predict_proba(new.double().numpy())
    ordered = np.sort(votes, axis=1)
    # Ours is float32: neighbors and votes closer than its rounding may go either way.
    distance, _ = peer.kneighbors(new.double().numpy(), probe.neighbors + 1)
    clear = distance[:, -1] - distance[:, -2] > 1e-6
    if votes.shape[1] > 1:
        clear &= ordered[:, -1] - ordered[:, -2] > 1e-5
    assert clear.mean() > 0.9
    told = probe.predict(new).numpy()
    assert (told == peer.classes_[votes.argmax(1)])[clear].all()
