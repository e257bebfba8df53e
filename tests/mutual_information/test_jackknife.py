import pytest
import torch

from mimic_fast.mutual_information.jackknife import jackknife_variance, student_quantile


def test_variance_of_a_mean_is_the_textbook_one():
    values = torch.randn(20, dtype=torch.float64)
    without = (values.sum() - values) / 19

    assert jackknife_variance(without) == pytest.approx(float(values.var()) / 20)


def test_a_shift_of_all_replicates_cancels():
    replicates = torch.randn(20, dtype=torch.float64)

    assert jackknife_variance(replicates + 5) == pytest.approx(jackknife_variance(replicates))


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (9, 2.2622), (19, 2.0930), (38, 2.0244), (10_000, 1.9602)],
)
def test_quantiles_are_those_of_the_tables(degrees, expected):
    assert student_quantile(degrees) == pytest.approx(expected, abs=1e-3)
