"""SSL-Cleanse's detector: clusters, the smallest trigger of each, outliers."""

import pytest
import torch

from mimic_fast.baselines.cluster_triggers import (
    Clusters,
    Schedule,
    anomaly_indices,
    cluster,
    invert_clusters,
)
from mimic_fast.errors import UsageError

CPU = torch.device("cpu")
SIDE = 12
SCHEDULE = Schedule(steps=120, batch_size=8, success=0.9, penalty=1e-2, patience=5, seed=0)


def blobs():
    """Four well separated directions, 15 images each, in turn."""
    draw = torch.Generator().manual_seed(0)
    corners = torch.eye(4, 6) * 5 + 3
    truth = torch.arange(60) % 4
    return corners[truth] + 0.1 * torch.randn(60, 6, generator=draw), truth


def test_clusters_are_those_that_there_are():
    features, truth = blobs()

    found = cluster(features, 4, seed=0, device=CPU)

    pairs = set(zip(truth.tolist(), found.labels.tolist(), strict=True))
    assert len(pairs) == 4
    points = found.place(features)
    for label in range(4):
        torch.testing.assert_close(found.centers[label], points[found.labels == label].mean(0))


def test_no_cluster_is_empty_even_where_there_are_fewer_groups():
    features, _ = blobs()

    found = cluster(features, 9, seed=0, device=CPU)

    assert found.labels.unique().tolist() == list(range(9))


def test_too_few_different_images_are_refused():
    features, _ = blobs()

    with pytest.raises(UsageError, match="3 directions; give more images or fewer"):
        cluster(features[:3].repeat(20, 1), 4, seed=0, device=CPU)


def pixels():
    """Dark images in three tints, in turn."""
    draw = torch.Generator().manual_seed(1)
    images = 0.3 * torch.rand(48, 3, SIDE, SIDE, generator=draw)
    images[torch.arange(48), torch.arange(48) % 3] += 0.3
    return images


def tints(images):
    return images.mean((2, 3))


def backdoored(images):
    """As ``tints``, but a white square takes over with a strong feature of the first tint."""
    features = tints(images)
    gate = torch.sigmoid(6 * (images[:, :, 7:10, 7:10].mean((1, 2, 3)) - 0.6))[:, None]
    return features * (1 - gate) + torch.tensor([1.35, 0.45, 0.45]) * gate


def inverted(encoder):
    images = pixels()
    clusters = cluster(encoder(images), 3, seed=0, device=CPU)
    found = invert_clusters(encoder, images, clusters, SCHEDULE, tick=lambda step, terms: None)
    return found, int(clusters.labels[0])


def test_the_trigger_of_the_target_is_small_and_in_its_place():
    found, target = inverted(backdoored)

    indices = anomaly_indices(found.sizes)

    assert int(found.sizes.argmin()) == target
    assert (indices > 2).nonzero().flatten().tolist() == [target]
    mask = found.masks[target, 0]
    assert float(mask[7:10, 7:10].sum() / mask.sum()) > 0.4  # 6 % of the image


def test_of_a_clean_encoder_no_size_stands_out():
    found, _ = inverted(tints)

    assert bool((found.sizes < 1).all())  # all were reached
    assert float(found.sizes.max() / found.sizes.min()) < 2


def test_clusters_are_inverted_independently():
    images = pixels()
    clusters = cluster(tints(images), 3, seed=0, device=CPU)
    short = Schedule(steps=1, batch_size=4, success=0.5, penalty=2.0, patience=1, seed=3)
    seen = {}
    invert_clusters(tints, images, clusters, short, tick=lambda step, terms: seen.update(terms))

    draw = torch.Generator().manual_seed(3)
    masks, patterns = (torch.rand(3, n, SIDE, SIDE, generator=draw) for n in (1, 3))
    others = (clusters.labels[None] != torch.arange(3)[:, None]).double()
    ids = torch.multinomial(others, 4, replacement=True, generator=draw)
    distances = []
    for label in range(3):  # one cluster after the other, in float64
        mask, pattern = masks[label].double(), patterns[label].double()
        moved = tints(images[ids[label]].double() * (1 - mask) + pattern * mask) - clusters.mean
        units = moved / moved.norm(dim=1, keepdim=True)
        distances.append(((units - clusters.centers[label]) ** 2).sum(1).mean())
        assert bool((clusters.labels[ids[label]] != label).all())

    torch.testing.assert_close(seen["distance"].double(), torch.stack(distances).mean())
    torch.testing.assert_close(seen["size"].double(), masks.double().mean())


def test_a_cluster_that_is_not_reached_has_the_size_of_the_image():
    images = pixels()
    clusters = Clusters(
        mean=torch.zeros(3),
        labels=torch.arange(48) % 3,
        centers=torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, -1.0, -1.0]]),
    )

    found = invert_clusters(tints, images, clusters, SCHEDULE, tick=lambda step, terms: None)

    assert float(found.sizes[2]) == 1  # no pixel is negative
    assert float(anomaly_indices(found.sizes)[2]) == 0


def test_indices_are_deviations_below_the_median():
    sizes = torch.tensor([0.30, 0.34, 0.32, 0.28, 0.02, 0.90])
    # median 0.31; deviations 0.01 0.03 0.01 0.03 0.29 0.59, their median 0.03
    expected = torch.tensor([0.01, 0, 0, 0.03, 0.29, 0], dtype=torch.float64) / (1.4826 * 0.03)

    torch.testing.assert_close(anomaly_indices(sizes), expected, rtol=1e-5, atol=1e-6)


def test_one_that_differs_from_equals_stands_out_and_equals_do_not():
    assert anomaly_indices(torch.tensor([1.0, 1.0, 1.0, 0.2]))[3] > 2
    assert anomaly_indices(torch.ones(5)).tolist() == [0] * 5
