"""Intervals against statsmodels and scipy; rates against scikit-learn's confusion matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, confusion_matrix
from statsmodels.stats.proportion import proportion_confint

from mimic_fast.evaluation.metrics import mean_measure, share_of, t_quantile, wilson
from mimic_fast.evaluation.scores import Score, Stamped, comparisons, downstream_entry

ROLES = ("teacher", "purified", "clean")


@given(n=st.integers(1, 10**6), data=st.data())
def test_wilson_is_statsmodels(n, data):
    successes = data.draw(st.integers(0, n))

    measure = wilson(successes, n)

    low, high = proportion_confint(successes, n, alpha=0.05, method="wilson")
    assert measure.value == successes / n
    # Two ways to sum the same terms: 1e-15 apart at n = 1, and at 0 of n ours is exactly 0.
    assert measure.low == pytest.approx(low, abs=1e-12)
    assert measure.high == pytest.approx(high, abs=1e-12)


@given(degrees=st.integers(1, 100_000))
def test_t_quantile_is_scipys(degrees):
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-5)


@given(
    values=st.lists(st.floats(-100, 100), min_size=2, max_size=60),
    as_type=st.sampled_from([torch.float32, torch.float64]),
)
def test_mean_measure_is_scipys_t_interval(values, as_type):
    sample = torch.tensor(values, dtype=as_type)

    measure = mean_measure(sample)

    numbers = sample.double().numpy()
    error = stats.sem(numbers)
    assert measure.value == pytest.approx(numbers.mean(), abs=1e-10)
    half = stats.t.ppf(0.975, len(numbers) - 1) * error
    # The quantile is right to 1e-5 (it is tabulated with six digits), so the ends are to 1e-5 SE.
    assert measure.low == pytest.approx(numbers.mean() - half, abs=1e-5 * error + 1e-10)
    assert measure.high == pytest.approx(numbers.mean() + half, abs=1e-5 * error + 1e-10)


@st.composite
def said(draw):
    """Labels, a target, and by role what is said of clean and of triggered images."""
    classes, images = draw(st.integers(2, 6)), draw(st.integers(1, 80))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = generator.integers(0, classes, images)
    target = int(generator.integers(classes))
    answers = {}
    for role in ROLES:
        clean = np.where(
            generator.random(images) < generator.random(),
            labels,
            generator.integers(0, classes, images),
        )
        caught = generator.random(images) < generator.random()
        answers[role] = clean, np.where(caught, target, clean)
    return classes, labels, target, answers


def scores_of(labels, target, answers) -> dict[str, Score]:
    return {
        role: Score(
            dataset="toy",
            role=role,
            probe="linear",
            train_images=1,
            indices=torch.arange(len(labels)),
            labels=torch.from_numpy(labels),
            predicted=torch.from_numpy(clean),
            stamped=(Stamped(trigger="t", target=target, predicted=torch.from_numpy(triggered)),),
        )
        for role, (clean, triggered) in answers.items()
    }


def rates(classes, labels, target, clean, triggered) -> dict[str, float]:
    """The same figures from tables of true against given classes."""
    table = confusion_matrix(labels, triggered, labels=range(classes))
    before = confusion_matrix(labels, clean, labels=range(classes))
    victims = np.delete(table, target, axis=0)
    found = {"attack_success_rate_all": table[:, target].sum() / table.sum()}
    if victims.sum():
        found["attack_success_rate"] = victims[:, target].sum() / victims.sum()
        kept = np.trace(table) - table[target, target]
        found["robust_accuracy"] = kept / victims.sum()
        found["base_rate"] = np.delete(before, target, 0)[:, target].sum() / victims.sum()
    return found


@given(said())
def test_every_rate_is_that_of_the_confusion_matrix(drawn):
    classes, labels, target, answers = drawn
    scores = scores_of(labels, target, answers)

    for role, (clean, triggered) in answers.items():
        entry = downstream_entry(scores[role], list(scores.values()))

        accuracy = entry["clean_accuracy"]
        assert accuracy["value"] == pytest.approx(accuracy_score(labels, clean))
        assert accuracy["n"] == len(labels)
        attack = entry["attacks"][0]
        wanted = rates(classes, labels, target, clean, triggered)
        measured = {key for key, value in attack.items() if isinstance(value, dict)}
        assert measured == set(wanted)
        for name, value in wanted.items():
            n = attack[name]["n"]
            assert attack[name]["value"] == pytest.approx(value), name
            assert n == (len(labels) if name.endswith("_all") else (labels != target).sum()), name
            ends = proportion_confint(round(value * n), n, method="wilson")
            assert (attack[name]["low"], attack[name]["high"]) == pytest.approx(ends, abs=1e-12)


@given(said())
def test_fidelity_is_the_paper_formula_on_the_confusion_matrices(drawn):
    classes, labels, target, answers = drawn
    scores = scores_of(labels, target, answers)

    attack = downstream_entry(scores["purified"], list(scores.values()))["attacks"][0]

    by_role = {role: rates(classes, labels, target, *own) for role, own in answers.items()}
    accuracy = {role: accuracy_score(labels, clean) for role, (clean, _) in answers.items()}
    if "attack_success_rate" not in by_role["teacher"]:
        assert "fidelity" not in attack
        return
    rate = {role: found["attack_success_rate"] for role, found in by_role.items()}
    if rate["teacher"] <= rate["clean"] or accuracy["teacher"] == 0:
        assert attack["fidelity"] is None
    else:
        removed = (rate["teacher"] - rate["purified"]) / rate["teacher"]
        wanted = removed * accuracy["purified"] / accuracy["teacher"]
        assert attack["fidelity"] == pytest.approx(wanted)


@given(said())
def test_paired_rows_are_the_differences_of_the_rates(drawn):
    classes, labels, target, answers = drawn
    scores = scores_of(labels, target, answers)

    rows = {row["b"]: row for row in comparisons(list(scores.values()))}

    own = rates(classes, labels, target, *answers["purified"])
    for role in ("teacher", "clean"):
        other = rates(classes, labels, target, *answers[role])
        wanted = accuracy_score(labels, answers["purified"][0]) - accuracy_score(
            labels, answers[role][0]
        )
        assert rows[role]["clean_accuracy"]["value"] == pytest.approx(wanted)
        name = "attack_success_rate"
        assert (name in rows[role]) == (name in own)
        if name in own:
            assert rows[role][name]["value"] == pytest.approx(own[name] - other[name])


def test_share_of_counts_as_numpy():
    flags = torch.from_numpy(np.random.default_rng(0).random(997) < 0.3)

    assert share_of(flags).value == pytest.approx(flags.numpy().mean())
