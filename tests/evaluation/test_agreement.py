"""Agreement measures against their definitions, written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mimic_fast.errors import UsageError
from mimic_fast.evaluation.agreement import agreement, knn_overlap, linear_cka


def random_features(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, dtype=torch.float64, generator=generator)


def u_statistic_hsic(a: torch.Tensor, b: torch.Tensor) -> float:
    """Unbiased HSIC as a mean over ordered 4-tuples (Gretton et al. 2005; Song et al. 2012)."""
    first, second = a @ a.T, b @ b.T
    terms = [
        float(first[i, j] * (second[i, j] + second[q, r] - 2 * second[i, q]))
        for i, j, q, r in itertools.permutations(range(len(a)), 4)
    ]
    return sum(terms) / len(terms)


def test_linear_cka_equals_the_u_statistic():
    a = random_features(9, 3)
    b = a @ random_features(3, 4, seed=1) + 0.5 * random_features(9, 4, seed=2)

    value = linear_cka(a, b).value

    norms = (u_statistic_hsic(a, a) * u_statistic_hsic(b, b)) ** 0.5
    assert value == pytest.approx(u_statistic_hsic(a, b) / norms, abs=1e-12)


def test_linear_cka_ignores_rotation_scale_and_shift():
    a, b = random_features(60, 8), random_features(60, 5, seed=1)
    b = b + a[:, :5]
    rotation = torch.linalg.qr(random_features(8, 8, seed=2)).Q

    moved = linear_cka(3 * a @ rotation + 7, 0.01 * b - 2)

    assert moved.value == pytest.approx(linear_cka(a, b).value, abs=1e-9)


def test_linear_cka_of_unrelated_wide_features_is_near_zero():
    # The plain (biased) CKA of these is about .9: more features than images.
    measures = [
        linear_cka(random_features(60, 512, seed), random_features(60, 512, seed + 100))
        for seed in range(20)
    ]

    assert sum(measure.low <= 0 for measure in measures) >= 18
    assert max(measure.value for measure in measures) < 0.1


def test_knn_overlap_equals_sets_written_out():
    a = random_features(40, 6)
    b = a + 0.7 * random_features(40, 6, seed=1)

    value = knn_overlap(a, b).value

    shares = []
    for row in range(40):
        named = []
        for features in (a, b):
            cosines = F.cosine_similarity(features[row][None], features)
            order = [i for i in cosines.argsort(descending=True).tolist() if i != row]
            named.append(set(order[:10]))
        shares.append(len(named[0] & named[1]) / 10)
    assert value == pytest.approx(sum(shares) / 40, abs=1e-12)


def test_equal_features_agree_fully():
    features = random_features(50, 16).float()

    measures = agreement(features, features.clone())

    assert set(measures) == {"cosine", "knn_overlap_10", "linear_cka"}
    for measure in measures.values():
        assert measure.value == pytest.approx(1.0, abs=1e-9)
        assert (measure.low, measure.high) == pytest.approx((1.0, 1.0), abs=1e-9)
        assert measure.n == 50


def test_cosine_is_the_mean_over_images():
    a, b = random_features(30, 4).float(), random_features(30, 4, seed=1).float()

    measure = agreement(a, b)["cosine"]

    cosines = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    assert measure.value == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert measure.low < measure.value < measure.high


def test_intervals_shrink_with_the_number_of_images():
    def width(name: str, n: int) -> float:
        a = random_features(n, 16)
        b = a + random_features(n, 16, seed=1)
        measure = agreement(a, b)[name]
        return measure.high - measure.low

    for name in ("cosine", "knn_overlap_10", "linear_cka"):
        assert width(name, 600) < 0.75 * width(name, 80), name


def test_jackknife_interval_of_cka_covers_the_value_of_a_large_sample():
    mixing = random_features(6, 6, seed=99)

    def pair(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        a = random_features(n, 6, seed)
        return a, a @ mixing + 2 * random_features(n, 6, seed + 1000)

    truth = linear_cka(*pair(1200, 0)).value
    covered = 0
    for seed in range(1, 41):
        measure = linear_cka(*pair(100, seed))
        covered += measure.low <= truth <= measure.high
    assert covered >= 35


def test_collapsed_student_has_no_alignment():
    measures = agreement(random_features(40, 8), torch.ones(40, 8, dtype=torch.float64))

    assert measures["linear_cka"].value == 0


@pytest.mark.parametrize(
    ("n", "names"),
    [
        (2, {"cosine"}),
        (8, {"cosine", "linear_cka"}),
        (11, {"cosine", "linear_cka"}),
        (12, {"cosine", "linear_cka", "knn_overlap_10"}),
    ],
)
def test_what_so_few_images_cannot_tell_is_absent(n, names):
    assert set(agreement(random_features(n, 4), random_features(n, 4, seed=1))) == names


def test_one_image_is_refused():
    with pytest.raises(UsageError, match=r"at least 2 held-out images; raise data\.hold_out"):
        agreement(random_features(1, 4), random_features(1, 4))
