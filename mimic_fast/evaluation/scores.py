"""From the classes a probe gives, image by image, to the entries of report.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int64
from torch import Tensor

from mimic_fast.evaluation.metrics import (
    Measure,
    mcnemar,
    measure_json,
    paired_difference,
    share_of,
)

_COMPARED = (("purified", "teacher"), ("purified", "student_only"), ("purified", "clean"))
_EXAMPLES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamped:
    """What a probe says of the images with the trigger of one attack.

    Args:
        trigger: The trigger's name, which tells the attacks of an evaluation apart.
        target: The class the attack aims at.
        predicted: Classes given to the triggered images.
    """

    trigger: str
    target: int
    predicted: Int64[Tensor, "image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one probe on one encoder says of one downstream set, image by image.

    Args:
        dataset: The downstream set.
        role: Which encoder.
        probe: Which probe.
        train_images: Labeled images the probe was fitted on.
        indices: The test images' places in their source.
        labels: Their true classes.
        predicted: Classes given to them untouched.
        stamped: The same images with each attack's trigger, in the order of the attacks.
    """

    dataset: str
    role: str
    probe: str
    train_images: int
    indices: Int64[Tensor, "image"]
    labels: Int64[Tensor, "image"]
    predicted: Int64[Tensor, "image"]
    stamped: tuple[Stamped, ...]

    @property
    def correct(self) -> Bool[Tensor, "image"]:
        """Clean images given their true class."""
        return self.predicted == self.labels

    def fooled(self, place: int) -> Bool[Tensor, "victim"]:
        """Which images not of an attack's target class are called the target once triggered.

        Args:
            place: Of the attack among ``stamped``.
        """
        stamped = self.stamped[place]
        victims = self.labels != stamped.target
        return stamped.predicted[victims] == stamped.target


def downstream_entry(score: Score, scores: Sequence[Score]) -> dict[str, Any]:
    """One row of ``encoders.ROLE.downstream``.

    Of an attack ``base_rate`` is the share of the same images that are called the target without
    the trigger: what an ASR must exceed to mean anything.

    Args:
        score: The encoder and probe.
        scores: All scores of this set, for fidelity.
    """
    entry: dict[str, Any] = {
        "dataset": score.dataset,
        "probe": score.probe,
        "probe_train_images": score.train_images,
        "clean_accuracy": measure_json(share_of(score.correct)),
    }
    if score.stamped:
        entry["attacks"] = [_attack_entry(score, at, scores) for at in range(len(score.stamped))]
    return entry


def comparisons(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Paired differences, purified minus each of the others, on the same test images.

    A row for each attack, named by ``trigger``; the clean accuracy of all of them is the same. One
    row without it where there is no attack. ``p`` beside each difference is McNemar's.
    """
    by_key = {(score.role, score.probe): score for score in scores}
    rows: list[dict[str, Any]] = []
    for probe in dict.fromkeys(score.probe for score in scores):
        for first, second in _COMPARED:
            a, b = by_key.get((first, probe)), by_key.get((second, probe))
            if a is None or b is None:
                continue
            row: dict[str, Any] = {"a": first, "b": second, "dataset": a.dataset, "probe": probe}
            row["clean_accuracy"] = _paired(a.correct, b.correct)
            rows += [_of_attack(row, a, b, at) for at in range(len(a.stamped))] or [row]
    return rows


def fidelity(
    *, rate_before: float, rate_after: float, accuracy_before: float, accuracy_after: float
) -> float:
    """(ASR0 - ASR1) / ASR0 * CA1 / CA0: 1 where the backdoor is gone at no cost in accuracy."""
    return (rate_before - rate_after) / rate_before * accuracy_after / accuracy_before


def example_rows(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The first test image of up to eight classes (not the target) and what each role says.

    Of several attacks the first is shown.
    """
    first = scores[0]
    target = first.stamped[0].target if first.stamped else None
    chosen: dict[int, int] = {}
    for position, label in enumerate(first.labels.tolist()):
        if label != target:
            chosen.setdefault(label, position)
    rows: list[dict[str, Any]] = []
    for label in sorted(chosen)[:_EXAMPLES]:
        position = chosen[label]
        said: dict[str, dict[str, int]] = {}
        for score in scores:
            if score.probe == first.probe:
                said[score.role] = {"clean": int(score.predicted[position])}
                if score.stamped:
                    said[score.role]["triggered"] = int(score.stamped[0].predicted[position])
        index = int(first.indices[position])
        rows.append({"index": index, "label": label, "predicted": said})
    return rows


def _of_attack(row: dict[str, Any], a: Score, b: Score, place: int) -> dict[str, Any]:
    own = {**row, "trigger": a.stamped[place].trigger}
    fooled = a.fooled(place), b.fooled(place)
    return {**own, "attack_success_rate": _paired(*fooled)} if len(fooled[0]) else own


def _paired(a: Bool[Tensor, "image"], b: Bool[Tensor, "image"]) -> dict[str, Any]:
    return {**measure_json(paired_difference(a, b)), "p": mcnemar(a, b)}


def _attack_entry(score: Score, place: int, scores: Sequence[Score]) -> dict[str, Any]:
    stamped = score.stamped[place]
    entry: dict[str, Any] = {"trigger": stamped.trigger, "target": stamped.target}
    victims = score.labels != stamped.target
    if bool(victims.any()):
        rate = share_of(stamped.predicted[victims] == stamped.target)
        robust = share_of(stamped.predicted[victims] == score.labels[victims])
        entry["attack_success_rate"] = measure_json(rate)
        entry["base_rate"] = measure_json(share_of(score.predicted[victims] == stamped.target))
        entry["robust_accuracy"] = measure_json(robust)
        entry.update(_fidelity_entry(score, place, rate, scores))
    entry["attack_success_rate_all"] = measure_json(share_of(stamped.predicted == stamped.target))
    return entry


def _fidelity_entry(
    score: Score, place: int, rate: Measure, scores: Sequence[Score]
) -> dict[str, float | None]:
    """``fidelity``; null where the teacher's ASR does not exceed the clean encoder's rate.

    Absent for the two references themselves, and where one of them was not measured.
    """
    same = {other.role: other for other in scores if other.probe == score.probe}
    if score.role in ("teacher", "clean") or not {"teacher", "clean"} <= set(same):
        return {}
    before, floor = (share_of(same[r].fooled(place)).value for r in ("teacher", "clean"))
    accuracy = share_of(same["teacher"].correct).value
    if before <= floor or accuracy == 0:
        return {"fidelity": None}
    return {
        "fidelity": fidelity(
            rate_before=before,
            rate_after=rate.value,
            accuracy_before=accuracy,
            accuracy_after=share_of(score.correct).value,
        )
    }
