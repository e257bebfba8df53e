"""The headline says what the figures allow, and no more."""

import re

import pytest

from mimic_fast.report.verdict import limits, p_value, points, verdict
from tests.report.conftest import TWO


@pytest.mark.parametrize(
    ("changes", "level", "head"),
    [
        ({}, "purified", "Purified: "),
        ({"purified": (0.75, 0.015)}, "purified", "Purified, at a cost in accuracy: "),
        ({"purified": (0.82, 0.085)}, "reduced", "Reduced, not removed: "),
        ({"purified": (0.82, 0.50)}, "reduced", "Reduced, not removed: "),
        ({"purified": (0.82, 0.99)}, "not_purified", "Not purified: "),
        ({"teacher": (0.83, 0.02)}, "not_shown", "No backdoor shown by this trigger: "),
        ({"clean": None}, "purified", "Purified: "),
        ({"clean": None, "purified": (0.82, 0.12)}, "reduced", "Reduced, not removed: "),
        (
            {"clean": None, "teacher": (0.83, 0.08)},
            "not_shown",
            "No backdoor shown by this trigger: ",
        ),
    ],
    ids=[
        "gone",
        "gone-but-costly",
        "above-clean",
        "halved",
        "unchanged",
        "nothing-there",
        "no-clean-gone",
        "no-clean-left",
        "no-clean-nothing",
    ],
)
def test_level_follows_the_rule(make_evaluation, changes, level, head):
    said = verdict(make_evaluation(**changes))

    assert said["level"] == level
    assert said["text"].startswith(head)
    assert "\n" not in said["text"]
    assert said["text"].isascii()


@pytest.mark.parametrize(
    ("purified", "level", "head"),
    [
        ((0.82, 0.015), "recovered_gone", "The trigger that the scan recovered no longer works: "),
        ((0.82, 0.50), "recovered_reduced", "The trigger that the scan recovered works less often"),
        ((0.82, 0.99), "recovered_works", "The trigger that the scan recovered still works: "),
    ],
)
def test_a_trigger_that_a_scan_recovered_shows_no_backdoor(make_evaluation, purified, level, head):
    evaluation = make_evaluation(purified=purified)
    evaluation["attacks"][0]["kind"] = "recovered"

    said = verdict(evaluation)

    assert said["level"] == level
    assert said["text"].startswith(head)
    assert "Purified" not in said["text"] + said["rule"]
    assert any("shows no backdoor" in line for line in limits(evaluation))
    assert not any("shows no backdoor" in line for line in limits(make_evaluation()))


def test_a_recovered_trigger_beside_a_real_one_does_not_hide_it(make_evaluation):
    evaluation = make_evaluation(**TWO)
    gone, left = evaluation["attacks"]  # the second is the worse of the two
    gone["kind"] = "recovered"

    assert not verdict(evaluation)["level"].startswith("recovered")

    gone["kind"], left["kind"] = "badencoder", "recovered"
    assert verdict(evaluation)["level"].startswith("recovered")


def test_text_holds_the_figures(make_evaluation):
    evaluation = make_evaluation()

    text = verdict(evaluation)["text"]

    def value(role: str, attack: bool) -> str:
        entry = evaluation["encoders"][role]["downstream"][0]
        measure = entry["attacks"][0]["attack_success_rate"] if attack else entry["clean_accuracy"]
        return f"{100 * measure['value']:.1f} %"

    assert text == (
        f"Purified: ASR {value('teacher', True)} -> {value('purified', True)} "
        f"(clean encoder {value('clean', True)}), "
        f"accuracy {value('teacher', False)} -> {value('purified', False)}"
    )


def test_clean_encoder_is_not_mentioned_where_it_was_not_measured(make_evaluation):
    assert "clean encoder" not in verdict(make_evaluation(clean=None))["text"]


def test_worst_of_several_sets_decides(make_evaluation):
    good, bad = make_evaluation(), make_evaluation(purified=(0.82, 0.99))
    for evaluation in (bad,):
        for encoder in evaluation["encoders"].values():
            encoder["downstream"][0]["dataset"] = "gtsrb"
        for row in evaluation["comparisons"]:
            row["dataset"] = "gtsrb"
    for role, encoder in good["encoders"].items():
        encoder["downstream"] += bad["encoders"][role]["downstream"]
    good["comparisons"] += bad["comparisons"]

    said = verdict(good)

    assert said["level"] == "not_purified"
    assert said["details"][0] == "The worst of 2 measurements: gtsrb, linear."


def test_a_purified_encoder_no_better_than_student_only_is_called_out(make_evaluation):
    details = verdict(make_evaluation(student_only=(0.83, 0.01)))["details"]

    assert any("Not shown to be above student-only" in line for line in details)
    assert not any("Not shown" in line for line in verdict(make_evaluation())["details"])


def test_without_labels_only_agreement_is_claimed():
    report = {"encoders": {"teacher": {"sha256": ""}, "purified": {"sha256": ""}}, "agreement": {}}

    said = verdict(report)

    assert (said["level"], said["text"]) == (
        "not_measured",
        "Agreement measured; ASR not measured",
    )
    assert any(line.startswith("ASR not measured") for line in limits(report))
    assert any(line.startswith("Accuracy not measured") for line in limits(report))


def test_without_a_trigger_accuracy_is_claimed_and_asr_not(make_evaluation):
    evaluation = make_evaluation(
        teacher=(0.8, None), purified=(0.8, None), student_only=None, clean=None
    )

    said = verdict(evaluation)

    assert said["text"] == "Accuracy measured; ASR not measured"
    assert [line.partition(" accuracy")[0] for line in said["details"]] == ["teacher", "purified"]
    assert any(line.startswith("ASR not measured") for line in limits(evaluation))


def test_single_encoder_is_reported_without_a_judgment(make_evaluation):
    evaluation = make_evaluation(purified=None, student_only=None, clean=None)

    said = verdict(evaluation)

    assert said["level"] == "not_measured"
    assert said["text"].startswith("Measured: teacher accuracy 8")


def test_nothing_measured_is_said():
    assert verdict({"encoders": {"teacher": {}}})["text"] == "ASR not measured"


def test_measured_asr_is_never_called_a_proof(make_evaluation):
    found = limits(make_evaluation())

    assert found[0].startswith("No proof of absence")
    assert any("randomness of training" in line for line in found)
    assert not any("No clean encoder" in line for line in found)


def test_missing_references_are_limits(make_evaluation):
    found = " ".join(limits(make_evaluation(clean=None, student_only=None)))

    assert "No clean encoder was measured" in found
    assert "No student-only floor was measured" in found


def test_unreadable_images_and_the_estimator_are_limits(make_evaluation, information):
    evaluation = make_evaluation() | {"mutual_information": information}
    evaluation["datasets"][0]["unreadable"] = ["a", "b"]

    found = " ".join(limits(evaluation))

    assert "could not be decoded: 2 downstream images" in found
    assert "'histogram' estimator" in found


def test_points_have_signs_and_no_negative_zero():
    measure = {"value": -0.0001, "low": -0.0123, "high": 0.012}

    assert points(measure) == "+0.0 points (95 %: -1.2 to +1.2)"


def test_worst_of_several_attacks_decides_and_is_named(make_evaluation):
    said = verdict(make_evaluation(**TWO))

    assert said["level"] == "reduced"
    assert re.match(r"Reduced, not removed: ASR 9\d\.\d % -> (59|60|61)\.\d %", said["text"])
    assert said["details"][0] == (
        "The worst of 2 measurements: fashion-mnist, linear, trigger blended:1."
    )
    assert verdict(make_evaluation())["level"] == "purified"  # by the first attack alone
    assert "for the triggers and" in limits(make_evaluation(**TWO))[0]
    assert "for the trigger and" in limits(make_evaluation())[0]


@pytest.mark.parametrize("rates", [(0.015, 0.95), (0.99, 0.015)], ids=["second", "first"])
def test_attack_is_reduced_by_its_own_difference(make_evaluation, rates):
    """The fall of one attack must not speak for another one that stands."""
    said = verdict(make_evaluation(**TWO | {"purified": (0.82, *rates)}))

    assert said["level"] == "not_purified"


def test_trigger_that_shows_no_backdoor_is_named_beside_one_that_does(make_evaluation):
    weak = {"teacher": (0.83, 0.99, 0.01), "purified": (0.82, 0.015, 0.01)}

    said = verdict(make_evaluation(**TWO | weak))

    assert said["level"] == "purified"
    assert said["details"][-1] == (
        "No backdoor shown in the teacher: fashion-mnist, linear, trigger blended:1."
    )
    none = verdict(make_evaluation(**TWO | weak | {"teacher": (0.83, 0.01, 0.01)}))
    assert none["text"].startswith("No backdoor shown by these triggers: ")


def test_single_encoder_has_the_rate_of_every_attack(make_evaluation):
    roles = TWO | dict.fromkeys(("purified", "student_only", "clean"))

    text = verdict(make_evaluation(**roles))["text"]

    assert text.count("teacher accuracy") == 2
    assert "trigger white_patch); teacher" in text
    assert "trigger blended:1)" in text


@pytest.mark.parametrize(
    ("p", "shown"),
    [
        (1.0, "p = 1.00"),
        (0.62, "p = 0.62"),
        (0.034, "p = 0.034"),
        (0.00151, "p = 0.0015"),
        (0.001, "p = 0.0010"),
        (1e-300, "p < 0.001"),
    ],
)
def test_p_values_have_two_digits(p, shown):
    assert p_value(p) == shown
