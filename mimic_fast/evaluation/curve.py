"""Accuracy and ASR of the student while it is trained: ``curve.jsonl``.

A share of the first labeled set is enough to see when the backdoor goes and the accuracy comes; the
figures of the report are measured at the end, on all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimic_fast.config import EvaluationSettings
from mimic_fast.encoders.build import Encoder
from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.evaluation.downstream import open_downstream
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.feature_cache import Measurable
from mimic_fast.evaluation.rows import read_rows, write_rows
from mimic_fast.evaluation.targets import read_attacks

# At most, unless there are more classes. With few labels a probe may call the attack's own
# reference image another class than the one on record: the ASR of a backdoor that works is then 0.
_LABELS = 5000
_IMAGES = 1000  # test images, at most


@dataclass(frozen=True, kw_only=True, slots=True)
class _Snapshot:
    """The student as it is now; it lies in no file, so it has no digest."""

    encoder: Encoder
    sha256: str = ""


class Curve:
    """Measures the student every few epochs and writes a row.

    Of several attacks ``attack_success_rate`` is the highest, ``attack_success_rates`` has each by
    its trigger.

    Args:
        path: ``curve.jsonl``. Rows of a run that is resumed stay; an epoch that comes again
            replaces its row.
        settings: Downstream sets (the first is used), attacks.
        teacher: Measured once, for comparison.
        seed: As in the evaluation at the end.

    Raises:
        UsageError: If the labeled set cannot be used.
    """

    def __init__(
        self, path: Path, settings: EvaluationSettings, *, teacher: Measurable, seed: int
    ) -> None:
        first = open_downstream(settings.downstream[0], settings, seed=seed)
        labels = max(_LABELS, first.num_classes)  # a probe needs one of each class
        share = {
            "downstream": settings.downstream[:1],
            "probe": ("linear",),
            "cache": None,  # every snapshot is measured once
            "probe_labels": min(settings.probe_labels or labels, labels),
            "test_images": min(settings.test_images or _IMAGES, _IMAGES),
        }
        self._path, self._seed, self._teacher = path, seed, teacher
        self._settings = settings.model_copy(update=share)
        whole = {**share, "probe_labels": settings.probe_labels, "cache": settings.cache}
        self._whole = settings.model_copy(update=whole)
        self._every = settings.curve_every or 1

    def settle(self, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Works out the target classes, before training, on all labels of the final evaluation.

        They are recorded for good, so the share that a row is measured on must not decide them.

        Raises:
            UsageError: As ``evaluate_encoders``, or if a target cannot be recorded.
        """
        if self._unsettled():
            evaluate_encoders({"teacher": self._teacher}, self._whole, seed=self._seed, stop=stop)
        if left := self._unsettled():
            raise UsageError(
                f"evaluation.curve_every needs the target class in {left[0]}, which cannot be "
                "written; make it writable or leave curve_every out"
            )

    def _unsettled(self) -> list[Path]:
        name = self._settings.downstream[0].name
        return [
            one.path
            for one in read_attacks(self._settings.attacks)
            if name not in one.attack.targets
        ]

    def measure(
        self, epoch: int, student: Encoder, *, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Adds the row of an epoch (from 1) where one is due; nothing if ``stop`` told so.

        Raises:
            MachineError: If the file cannot be written.
            UsageError: As ``evaluate_encoders``.
        """
        if epoch % self._every:
            return
        rows = {(row["role"], row["epoch"]): row for row in read_curve(self._path)}
        try:
            if ("teacher", 0) not in rows:
                rows["teacher", 0] = self._row("teacher", 0, self._teacher, stop)
            rows["purified", epoch] = self._row("purified", epoch, _Snapshot(encoder=student), stop)
        except StoppedError:
            return  # the training loop saves the state and leaves
        write_rows(self._path, rows.values())

    def _row(
        self, role: str, epoch: int, encoder: Measurable, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        measured = evaluate_encoders({role: encoder}, self._settings, seed=self._seed, stop=stop)
        (entry,) = measured["encoders"][role]["downstream"]
        rates = {
            attack["trigger"]: attack["attack_success_rate"]["value"]
            for attack in entry.get("attacks", ())
            if "attack_success_rate" in attack
        }
        return {
            "role": role,
            "epoch": epoch,
            "dataset": entry["dataset"],
            "test_images": self._settings.test_images,
            "clean_accuracy": entry["clean_accuracy"]["value"],
            "attack_success_rate": max(rates.values(), default=None),
            **({"attack_success_rates": rates} if len(rates) > 1 else {}),
        }


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Rows of ``curve.jsonl``; none if there is no such file. A damaged line is left out."""
    return read_rows(path, ("role", "epoch", "clean_accuracy"))
