"""Entries of report.json from predictions small enough to count by hand."""

from dataclasses import replace

import pytest
import torch

from mimic_fast.evaluation.scores import (
    Score,
    Stamped,
    comparisons,
    downstream_entry,
    example_rows,
)

LABELS = [0, 0, 1, 1, 2, 2, 2, 2]
TARGET = 2


def score(role: str, clean: list[int], triggered: list[int] | None, probe: str = "linear") -> Score:
    stamped = ()
    if triggered is not None:
        stamped = (Stamped(trigger="patch", target=TARGET, predicted=torch.tensor(triggered)),)
    return Score(
        dataset="toy",
        role=role,
        probe=probe,
        train_images=20,
        indices=torch.arange(100, 108),
        labels=torch.tensor(LABELS),
        predicted=torch.tensor(clean),
        stamped=stamped,
    )


@pytest.fixture
def scores() -> list[Score]:
    return [
        score("teacher", [0, 0, 1, 1, 2, 2, 2, 0], [2, 2, 2, 2, 2, 2, 2, 2]),
        score("purified", [0, 0, 1, 0, 2, 2, 2, 0], [0, 2, 1, 0, 2, 2, 0, 0]),
        score("student_only", [0, 1, 1, 0, 2, 2, 0, 0], [0, 1, 1, 0, 2, 2, 0, 0]),
        score("clean", [0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 2, 2, 2, 2]),
    ]


def by_role(scores: list[Score], role: str) -> Score:
    return next(entry for entry in scores if entry.role == role)


def test_rates_count_what_their_names_say(scores):
    entry = downstream_entry(by_role(scores, "purified"), scores)

    attack = entry["attacks"][0]
    assert (entry["dataset"], entry["probe"], entry["probe_train_images"]) == ("toy", "linear", 20)
    assert (entry["clean_accuracy"]["value"], entry["clean_accuracy"]["n"]) == (6 / 8, 8)
    assert (attack["trigger"], attack["target"]) == ("patch", 2)
    assert attack["base_rate"]["value"] == 0 / 4
    # of the four images not of class 2 one is called 2, and two are called what they are
    assert attack["attack_success_rate"]["value"] == 1 / 4
    assert attack["attack_success_rate"]["n"] == 4
    assert attack["robust_accuracy"]["value"] == 2 / 4
    assert attack["attack_success_rate_all"]["value"] == 3 / 8
    assert attack["attack_success_rate_all"]["n"] == 8


def test_fidelity_is_the_formula_and_only_for_defended_encoders(scores):
    found = {
        entry.role: downstream_entry(entry, scores)["attacks"][0].get("fidelity", "absent")
        for entry in scores
    }

    assert found["teacher"] == found["clean"] == "absent"
    assert found["purified"] == pytest.approx((1 - 0.25) / 1 * (6 / 8) / (7 / 8))
    assert found["student_only"] == pytest.approx(1 * (4 / 8) / (7 / 8))


def test_fidelity_is_null_where_the_teacher_shows_no_backdoor(scores):
    scores[0] = score("teacher", LABELS, LABELS)

    attack = downstream_entry(by_role(scores, "purified"), scores)["attacks"][0]

    assert attack["fidelity"] is None


def test_fidelity_is_absent_without_a_clean_encoder(scores):
    attack = downstream_entry(scores[1], scores[:3])["attacks"][0]

    assert "fidelity" not in attack


def test_without_an_attack_there_is_no_rate():
    entries = [score("teacher", LABELS, None), score("purified", LABELS, None)]

    assert "attacks" not in downstream_entry(entries[0], entries)
    assert "attack_success_rate" not in comparisons(entries)[0]


def test_where_all_images_are_of_the_target_class_only_the_overall_rate_is_there():
    labels = torch.full((8,), TARGET)
    entry = Score(
        dataset="toy",
        role="teacher",
        probe="linear",
        train_images=20,
        indices=torch.arange(8),
        labels=labels,
        predicted=labels,
        stamped=(Stamped(trigger="patch", target=TARGET, predicted=labels),),
    )

    attack = downstream_entry(entry, [entry])["attacks"][0]

    assert set(attack) == {"trigger", "target", "attack_success_rate_all"}


def test_comparisons_are_paired_and_purified_minus_the_other(scores):
    rows = {row["b"]: row for row in comparisons(scores)}

    assert set(rows) == {"teacher", "student_only", "clean"}
    assert all(row["a"] == "purified" for row in rows.values())
    assert rows["teacher"]["clean_accuracy"]["value"] == pytest.approx(-1 / 8)
    assert rows["student_only"]["clean_accuracy"]["value"] == pytest.approx(2 / 8)
    assert rows["teacher"]["attack_success_rate"]["value"] == pytest.approx(1 / 4 - 1)
    assert rows["teacher"]["attack_success_rate"]["n"] == 4


def test_comparisons_never_mix_probes(scores):
    knn = [score("purified", LABELS, LABELS, "knn"), score("teacher", LABELS, LABELS, "knn")]

    rows = [(row["probe"], row["b"]) for row in comparisons(scores + knn)]

    assert rows == [
        ("linear", "teacher"),
        ("linear", "student_only"),
        ("linear", "clean"),
        ("knn", "teacher"),
    ]


def test_examples_are_the_first_of_each_class_but_the_target(scores):
    rows = example_rows(scores)

    assert [(row["index"], row["label"]) for row in rows] == [(100, 0), (102, 1)]
    assert rows[0]["predicted"]["teacher"] == {"clean": 0, "triggered": 2}
    assert rows[0]["predicted"]["purified"] == {"clean": 0, "triggered": 0}


def test_differences_have_mcnemars_p(scores):
    rows = {row["b"]: row for row in comparisons(scores)}

    # purified and teacher disagree on one image; three of four are no longer called the target
    assert rows["teacher"]["clean_accuracy"]["p"] == 1
    assert rows["teacher"]["attack_success_rate"]["p"] == pytest.approx(2 / 2**3)


def two(role: str, clean: list[int], first: list[int], second: list[int]) -> Score:
    """With a second attack, which aims at class 0."""
    one = score(role, clean, first)
    other = Stamped(trigger="blended", target=0, predicted=torch.tensor(second))
    return replace(one, stamped=(*one.stamped, other))


@pytest.fixture
def several() -> list[Score]:
    return [
        two("teacher", LABELS, [2] * 8, [0] * 8),
        two("purified", LABELS, LABELS, [0, 0, 0, 0, 0, 2, 2, 2]),
        two("clean", LABELS, LABELS, LABELS),
    ]


def test_each_of_several_attacks_is_counted_with_its_own_target(several):
    first, second = downstream_entry(by_role(several, "purified"), several)["attacks"]

    assert [(one["trigger"], one["target"]) for one in (first, second)] == [
        ("patch", 2),
        ("blended", 0),
    ]
    assert (first["attack_success_rate"]["value"], first["attack_success_rate"]["n"]) == (0, 4)
    assert (second["attack_success_rate"]["value"], second["attack_success_rate"]["n"]) == (0.5, 6)
    assert second["robust_accuracy"]["value"] == 0.5
    assert (first["fidelity"], second["fidelity"]) == (1, 0.5)


def test_comparisons_name_the_attack_they_belong_to(several):
    rows = comparisons(several)

    assert [(row["b"], row["trigger"], row["attack_success_rate"]["value"]) for row in rows] == [
        ("teacher", "patch", -1),
        ("teacher", "blended", -0.5),
        ("clean", "patch", 0),
        ("clean", "blended", 0.5),
    ]
    assert all(row["clean_accuracy"] == rows[0]["clean_accuracy"] for row in rows)


def test_examples_show_the_first_of_several_attacks(several):
    rows = example_rows(several)

    assert [row["label"] for row in rows] == [0, 1]
    assert rows[0]["predicted"]["teacher"] == {"clean": 0, "triggered": 2}
