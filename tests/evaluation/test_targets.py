"""Several attacks in one evaluation: each with its own target, nothing computed twice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimic_fast.config import EvaluationSettings
from mimic_fast.errors import UsageError
from mimic_fast.evaluation import evaluate
from mimic_fast.evaluation.attack_file import Attack, read_attack, write_attack
from mimic_fast.evaluation.curve import Curve, read_curve
from mimic_fast.evaluation.downstream import open_downstream
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.probes import LinearProbe, fit_linear_probe
from mimic_fast.evaluation.stamping import Trigger
from mimic_fast.evaluation.targets import NamedAttack, read_attacks, target_classes
from mimic_fast.evaluation.triggers import white_patch
from mimic_fast.progress import Event
from tests.evaluation.conftest import SIZE, Backdoored, load

BLUE, GREEN = 0, 1
TRAIN, TEST = 60, 45  # images of the task


class TwiceBackdoored(Backdoored):
    """As its base; an image with a black square in the other corner gets the features of blue."""

    def forward(self, images: Tensor) -> Tensor:
        black = (images[:, :, :3, :3] < 0.01).flatten(1).all(1)
        blue = torch.tensor([0.2, 0.2, 0.8])
        return torch.where(black[:, None], blue, super().forward(images))


def black_square() -> Trigger:
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :3, :3] = 1
    return Trigger(name="black_square", mask=mask, pattern=torch.zeros(3, SIZE, SIZE))


def plain(channel: int) -> Tensor:
    image = torch.full((3, 20, 20), 50, dtype=torch.uint8)
    image[channel] = 200
    return image


@pytest.fixture
def encoders(encoders):
    return {**encoders, "teacher": load(TwiceBackdoored(), "teacher")}


@pytest.fixture
def folder(tmp_path) -> Path:
    """An attack with two targets, as the attacks leave it."""
    first = white_patch(image_size=SIZE, channels=3)
    for place, trigger, channel in ((".", first, 1), ("target_2", black_square(), 2)):
        attack = Attack(kind="badencoder", trigger=trigger, reference=plain(channel))
        write_attack(tmp_path / "attacked" / place, attack)
    return tmp_path / "attacked"


def counted(encoders) -> dict[str, int]:
    """Images that go through each encoder from now on, as it goes."""
    seen = dict.fromkeys(encoders, 0)

    def counter(role: str) -> Callable[..., None]:
        def count(_module: object, inputs: tuple[Tensor]) -> None:
            seen[role] += len(inputs[0])

        return count

    for role, loaded in encoders.items():
        loaded.encoder.register_forward_pre_hook(counter(role))
    return seen


def rates(result, role: str) -> dict[str, tuple[int, float]]:
    (entry,) = result["encoders"][role]["downstream"]
    return {
        one["trigger"]: (one["target"], one["attack_success_rate"]["value"])
        for one in entry["attacks"]
    }


def test_folder_is_measured_whole_and_each_file_gets_its_target(task, encoders, folder):
    events: list[Event] = []
    settings = EvaluationSettings(downstream=(task,), attack=folder)

    result = evaluate_encoders(encoders, settings, seed=0, report=events.append)

    both = {"white_patch": (GREEN, 1.0), "black_square": (BLUE, 1.0)}
    assert rates(result, "teacher") == both
    assert rates(result, "purified") == {name: (target, 0.0) for name, (target, _) in both.items()}
    assert result["attacks"] == [{"kind": "badencoder", "trigger": name} for name in both]
    assert result["attack"] == result["attacks"][0]
    teacher = [row for row in result["comparisons"] if row["b"] == "teacher"]
    assert [(row["trigger"], row["attack_success_rate"]["value"]) for row in teacher] == [
        ("white_patch", -1),
        ("black_square", -1),
    ]
    assert teacher[0]["attack_success_rate"]["p"] == pytest.approx(2 / 2**30)
    assert read_attack(folder).targets == {"colors": GREEN}
    assert read_attack(folder / "target_2").targets == {"colors": BLUE}
    said = [event.message for event in events if "further targets" in event.message]
    assert said == [f"{folder} has further targets, measured too: target_2"]


def test_files_are_measured_in_their_order_and_a_file_alone_says_what_it_leaves(
    task, encoders, folder
):
    events: list[Event] = []
    files = (folder / "target_2" / "attack.json", folder / "attack.json")
    settings = EvaluationSettings(downstream=(task,), attack=files)

    result = evaluate_encoders(encoders, settings, seed=0, report=events.append)

    assert list(rates(result, "teacher")) == ["black_square", "white_patch"]
    said = [event.message for event in events if "further targets" in event.message]
    assert said == [f"{folder / 'attack.json'} has further targets, not measured: target_2"]


def test_figures_are_those_of_each_attack_alone(task, encoders, folder):
    files = (folder / "attack.json", folder / "target_2" / "attack.json")
    settings = EvaluationSettings(downstream=(task,), attack=files, probe=("linear", "knn"))

    together = evaluate_encoders(encoders, settings, seed=0)

    names = [one["trigger"] for one in together["attacks"]]
    for place, (file, name) in enumerate(zip(files, names, strict=True)):
        one = settings.model_copy(update={"attack": file})
        alone = evaluate_encoders(encoders, one, seed=0)
        for role, encoder in alone["encoders"].items():
            pairs = zip(
                encoder["downstream"], together["encoders"][role]["downstream"], strict=True
            )
            assert all(a["attacks"] == [b["attacks"][place]] for a, b in pairs)
        own = [row for row in together["comparisons"] if row["trigger"] == name]
        assert own == alone["comparisons"]


def test_clean_features_are_computed_once_whatever_the_number_of_attacks(task, encoders, folder):
    seen = counted(encoders)

    evaluate_encoders(encoders, EvaluationSettings(downstream=(task,), attack=folder), seed=0)

    each = TRAIN + TEST + 2 * TEST
    references = 2
    assert seen == {role: each + references * (role == "teacher") for role in encoders}


def test_targets_of_poisoning_attacks_cost_only_triggered_training_images(task, encoders, folder):
    for place in (folder, folder / "target_2"):
        write_attack(place, replace(read_attack(place), reference=None))
    (folder / "target_2" / "reference.png").unlink()
    seen = counted(encoders)
    settings = EvaluationSettings(downstream=(task,), attack=folder, probe=("knn",))

    result = evaluate_encoders(encoders, settings, seed=0)

    assert rates(result, "teacher") == {"white_patch": (GREEN, 1.0), "black_square": (BLUE, 1.0)}
    each = TRAIN + TEST + 2 * TEST
    assert seen == {role: each + 2 * TRAIN * (role == "teacher") for role in encoders}


def test_recorded_and_unknown_targets_go_together(task, encoders, folder):
    first = read_attack(folder)
    write_attack(folder, replace(first, targets={"colors": 2}))

    result = evaluate_encoders(
        encoders, EvaluationSettings(downstream=(task,), attack=folder), seed=0
    )

    assert rates(result, "teacher") == {"white_patch": (2, 0.0), "black_square": (BLUE, 1.0)}


def test_same_trigger_twice_is_refused(folder, tmp_path):
    larger = white_patch(image_size=2 * SIZE, channels=3)  # the same, made for other images
    write_attack(tmp_path / "again", Attack(kind="drupe", trigger=larger, reference=None))

    for paths in ((folder, folder / "target_2"), (folder, tmp_path / "again")):
        with pytest.raises(UsageError, match=r"have the same trigger .*; give each attack once"):
            read_attacks(paths)


def test_another_trigger_of_the_same_name_gets_a_number(folder, tmp_path):
    other = replace(black_square(), pattern=torch.ones(3, SIZE, SIZE))
    write_attack(tmp_path / "other", Attack(kind="drupe", trigger=other, reference=None))

    found = read_attacks((folder, tmp_path / "other"))

    assert [one.name for one in found] == ["white_patch", "black_square", "black_square (2)"]


def test_one_path_and_a_list_of_paths_are_settings(folder):
    assert EvaluationSettings().attacks == ()
    one = EvaluationSettings.model_validate({"attack": str(folder)})
    assert one.attacks == (folder,)
    assert one.model_dump(mode="json")["attack"] == str(folder)  # as recipes and records had it
    two = EvaluationSettings.model_validate({"attack": [str(folder), "b.json"]})
    assert two.attacks == (folder, Path("b.json"))
    assert EvaluationSettings.model_validate(two.model_dump(mode="json")) == two


def test_curve_has_the_highest_rate_and_each(task, encoders, folder, tmp_path):
    settings = EvaluationSettings(downstream=(task,), attack=folder, curve_every=1)
    curve = Curve(tmp_path / "curve.jsonl", settings, teacher=encoders["teacher"], seed=0)

    curve.measure(1, load(Backdoored(), "purified").encoder)  # the black square is gone

    teacher, student = read_curve(tmp_path / "curve.jsonl")
    assert teacher["attack_success_rates"] == {"white_patch": 1, "black_square": 1}
    assert student["attack_success_rates"] == {"white_patch": 1, "black_square": 0}
    assert student["attack_success_rate"] == 1


def test_curve_settles_targets_with_the_labels_of_the_final_evaluation(
    task, encoders, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("mimic_fast.evaluation.curve._LABELS", 3)  # one of each class
    settings = EvaluationSettings(downstream=(task,), attack=folder, curve_every=1)
    fitted: list[int] = []
    fit = evaluate.fit_linear_probe

    def counting(features: Tensor, labels: Tensor, **rest: Any) -> LinearProbe:
        fitted.append(len(labels))
        return fit(features, labels, **rest)

    monkeypatch.setattr(evaluate, "fit_linear_probe", counting)
    curve = Curve(tmp_path / "curve.jsonl", settings, teacher=encoders["teacher"], seed=0)

    curve.settle()
    assert fitted == [TRAIN]
    assert read_attack(folder).targets == {"colors": GREEN}
    assert read_attack(folder / "target_2").targets == {"colors": BLUE}

    curve.settle()  # known now
    curve.measure(1, load(Backdoored(), "purified").encoder)
    assert fitted == [TRAIN, 3, 3]


def test_a_weak_poisoning_attack_aims_at_the_class_that_gains_not_at_the_largest(task, folder):
    data = open_downstream(task, EvaluationSettings(), seed=0)
    attack = replace(read_attack(folder), reference=None, targets={})
    one = NamedAttack(path=folder / "attack.json", name="patch", attack=attack)
    corners = torch.eye(3)
    probe = fit_linear_probe(corners, torch.arange(3), num_classes=3, l2=1e-3)
    before, after = (corners[torch.tensor(k)] for k in ([0] * 6 + [1] * 3, [0] * 5 + [1, 1, 2, 2]))

    found = target_classes(
        data,
        [one],
        teacher=load(Backdoored(), "teacher").encoder,
        plain=before,
        triggered=[after],
        probe=lambda: probe,
    )

    assert found == (2,)
