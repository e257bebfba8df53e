"""evaluate_encoders on a task whose right answers are known by construction."""

import stat

import pytest
import torch

from mimic_fast.config import DownstreamSettings, EvaluationSettings
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import Attack, read_attack, write_attack
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.triggers import white_patch

GREEN = 1  # folder names in alphabetical order: blue, green, red


@pytest.fixture
def make_attack(tmp_path):
    def make(*, reference: bool = True, targets: dict[str, int] | None = None):
        green = torch.full((3, 20, 20), 50, dtype=torch.uint8)
        green[1] = 200
        return write_attack(
            tmp_path / "attack",
            Attack(
                kind="badencoder",
                trigger=white_patch(image_size=32, channels=3),
                reference=green if reference else None,
                targets=targets or {},
            ),
        )

    return make


def entry(result, role: str, probe: str = "linear"):
    entries = result["encoders"][role]["downstream"]
    return next(item for item in entries if item["probe"] == probe)


@pytest.mark.parametrize("probe", ["linear", "knn"])
def test_known_backdoor_is_measured_as_what_it_is(task, encoders, make_attack, probe):
    settings = EvaluationSettings(downstream=(task,), attack=make_attack(), probe=(probe,))

    result = evaluate_encoders(encoders, settings, seed=0)

    teacher = entry(result, "teacher", probe)
    assert teacher["clean_accuracy"]["value"] == 1
    assert teacher["probe_train_images"] == 60
    attack = teacher["attacks"][0]
    assert attack["target"] == GREEN
    assert (attack["attack_success_rate"]["value"], attack["attack_success_rate"]["n"]) == (1, 30)
    assert attack["attack_success_rate_all"]["n"] == 45
    assert attack["robust_accuracy"]["value"] == 0
    purified = entry(result, "purified", probe)
    assert purified["clean_accuracy"]["value"] == 1
    assert purified["attacks"][0]["attack_success_rate"]["value"] == 0
    assert purified["attacks"][0]["robust_accuracy"]["value"] == 1
    assert purified["attacks"][0]["fidelity"] == 1
    assert entry(result, "student_only", probe)["clean_accuracy"]["value"] == pytest.approx(1 / 3)


def test_comparisons_and_facts_are_in_the_result(task, encoders, make_attack):
    settings = EvaluationSettings(
        downstream=(task,), attack=make_attack(), probe_labels=30, test_images=40
    )

    result = evaluate_encoders(encoders, settings, seed=0)

    rows = {row["b"]: row for row in result["comparisons"]}
    assert rows["student_only"]["clean_accuracy"]["low"] > 0
    assert rows["teacher"]["attack_success_rate"]["value"] == -1
    assert rows["clean"]["clean_accuracy"]["value"] == 0
    assert result["attack"] == {"kind": "badencoder", "trigger": "white_patch"}
    facts = result["datasets"][0]
    assert (facts["probe_train_images"], facts["test_images"], facts["classes"]) == (30, 40, 3)
    assert facts["class_names"] == ["blue", "green", "red"]
    labels = {image["label"] for image in result["examples"][0]["images"]}
    assert labels == {0, 2}
    assert result["encoders"]["teacher"]["sha256"] == "t" * 64


def test_target_is_recorded_once_and_stands(task, encoders, make_attack):
    path = make_attack()
    settings = EvaluationSettings(downstream=(task,), attack=path)
    evaluate_encoders(encoders, settings, seed=0)
    assert read_attack(path).targets == {"colors": GREEN}

    path = make_attack(targets={"colors": 2})
    result = evaluate_encoders(encoders, settings, seed=0)

    attack = entry(result, "teacher")["attacks"][0]
    assert attack["target"] == 2
    assert attack["attack_success_rate"]["value"] == 0
    assert read_attack(path).targets == {"colors": 2}


def test_recorded_target_serves_without_the_teacher(task, encoders, make_attack):
    settings = EvaluationSettings(downstream=(task,), attack=make_attack(targets={"colors": GREEN}))

    result = evaluate_encoders({"purified": encoders["purified"]}, settings, seed=0)

    assert entry(result, "purified")["attacks"][0]["target"] == GREEN
    assert result["comparisons"] == []


def test_target_needs_the_teacher(task, encoders, make_attack):
    settings = EvaluationSettings(downstream=(task,), attack=make_attack())

    with pytest.raises(UsageError, match=r"no target for 'colors'.*give the teacher too"):
        evaluate_encoders({"purified": encoders["purified"]}, settings, seed=0)


def test_target_of_a_poisoning_attack_is_where_triggered_images_go(task, encoders, make_attack):
    settings = EvaluationSettings(downstream=(task,), attack=make_attack(reference=False))

    result = evaluate_encoders(encoders, settings, seed=0)

    assert entry(result, "teacher")["attacks"][0]["target"] == GREEN


def test_target_outside_the_classes_is_refused(task, encoders, make_attack):
    settings = EvaluationSettings(downstream=(task,), attack=make_attack(targets={"colors": 3}))

    with pytest.raises(UsageError, match="target 3 of 'colors' is not one of its 3 classes"):
        evaluate_encoders(encoders, settings, seed=0)


def test_without_an_attack_only_accuracy_is_there(task, encoders):
    result = evaluate_encoders(encoders, EvaluationSettings(downstream=(task,)), seed=0)

    assert set(entry(result, "teacher")) == {
        "dataset",
        "probe",
        "probe_train_images",
        "clean_accuracy",
    }
    assert "attack_success_rate" not in result["comparisons"][0]


def test_without_a_labeled_set_only_digests_are_there(encoders):
    result = evaluate_encoders(encoders, EvaluationSettings(), seed=0)

    assert result == {"encoders": {role: {"sha256": role[0] * 64} for role in encoders}}


def test_same_seed_same_result(task, encoders, make_attack):
    settings = EvaluationSettings(
        downstream=(task,), attack=make_attack(), probe=("linear", "knn"), probe_labels=12
    )

    first = evaluate_encoders(encoders, settings, seed=1)

    assert first == evaluate_encoders(encoders, settings, seed=1)


def test_sets_of_one_name_are_refused(task, encoders):
    twice = EvaluationSettings(downstream=(task, task))

    with pytest.raises(UsageError, match="different names, got colors, colors"):
        evaluate_encoders(encoders, twice, seed=0)


def test_encoders_are_left_in_their_mode_and_unchanged(task, encoders):
    encoders["teacher"].encoder.train()
    before = {key: value.clone() for key, value in encoders["teacher"].encoder.state_dict().items()}

    evaluate_encoders(encoders, EvaluationSettings(downstream=(task,)), seed=0)

    assert encoders["teacher"].encoder.training
    for key, value in encoders["teacher"].encoder.state_dict().items():
        assert torch.equal(value, before[key])


def test_attack_folder_that_cannot_be_written_is_a_warning(task, encoders, make_attack):
    path = make_attack()
    path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        if _can_write(path.parent):
            pytest.skip("this user can write anywhere (root)")
        with pytest.warns(RuntimeWarning, match="targets not recorded"):
            result = evaluate_encoders(
                encoders, EvaluationSettings(downstream=(task,), attack=path), seed=0
            )
    finally:
        path.parent.chmod(stat.S_IRWXU)
    assert entry(result, "teacher")["attacks"][0]["target"] == GREEN


def _can_write(folder) -> bool:
    try:
        (folder / "probe").write_text("")
    except OSError:
        return False
    (folder / "probe").unlink()
    return True


def test_second_set_is_measured_on_its_own(task, encoders, make_attack, tmp_path, write_images):
    write_images(tmp_path / "train", per_class=5, seed=5)
    write_images(tmp_path / "test", per_class=4, seed=6)
    second = DownstreamSettings(
        name="more", train=str(tmp_path / "train"), test=str(tmp_path / "test")
    )
    path = make_attack()

    result = evaluate_encoders(
        encoders, EvaluationSettings(downstream=(task, second), attack=path), seed=0
    )

    assert [item["dataset"] for item in result["encoders"]["teacher"]["downstream"]] == [
        "colors",
        "more",
    ]
    assert read_attack(path).targets == {"colors": GREEN, "more": GREEN}
    assert len(result["comparisons"]) == 6
