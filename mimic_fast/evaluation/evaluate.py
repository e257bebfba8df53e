"""Step D where labels are at hand: clean accuracy, ASR and RA of every encoder, on the same images.

For one downstream set and one probe fitted on frozen features (or the encoder fine-tuned): clean
accuracy is the probe's top-1; ASR the share of triggered images *not of the target class* that it
calls the target (the demo counts those of the target class too: ``attack_success_rate_all``); RA
the share of the former still given their true class. The target is fixed once on the teacher and
kept for every encoder.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mimic_fast.config import EvaluationSettings
from mimic_fast.data.images import center_square, resized, with_channels
from mimic_fast.errors import MachineError, UsageError
from mimic_fast.evaluation.attack_file import Attack, read_attack, record_targets
from mimic_fast.evaluation.downstream import (
    DownstreamSet,
    EncodedSplit,
    encode_split,
    open_downstream,
)
from mimic_fast.evaluation.feature_cache import Measurable
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.fine_tuning import fine_tuned
from mimic_fast.evaluation.mlp_probe import fit_mlp_probe
from mimic_fast.evaluation.probes import Probe, fit_knn_probe, fit_linear_probe
from mimic_fast.evaluation.scores import (
    Score,
    Stamped,
    comparisons,
    downstream_entry,
    example_rows,
)
from mimic_fast.progress import Reporter, silent
from mimic_fast.watch import leave_if

Probes = Mapping[tuple[str, str], Probe]  # by role and probe name

_FINE_TUNE = "fine_tune"


def evaluate_encoders(
    encoders: Mapping[str, Measurable],
    settings: EvaluationSettings,
    *,
    seed: int,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measures encoders on every downstream set of the settings.

    Roles are ``teacher`` (the suspect), ``purified``, ``student_only``, ``clean``; others are
    measured alike but not compared. Targets worked out here are recorded in ``attack.json``.

    Args:
        encoders: By role; each as loaded from its file.
        settings: Downstream sets, attack, probes.
        seed: Draws the labeled subset and the test images.
        report: Told the number of images done and what was left out.
        stop: Polled between images, batches and fits; true leaves.

    Returns:
        ``encoders``, ``comparisons`` (paired differences, purified minus each of the others),
        ``attack``, ``datasets`` and ``examples`` (a few test images and what each encoder's probe
        says) of report.json. What was not measured is absent.

    Raises:
        UsageError: If a source has no labels, no teacher is there to work out the target with, or
            two sets share a name.
        UnsafeInputError: If an encoder gives features that are not finite.
        StoppedError: If ``stop`` told so.
    """
    attack = None if settings.attack is None else read_attack(settings.attack)
    names = [downstream.name for downstream in settings.downstream]
    if len(set(names)) != len(names):
        raise UsageError(f"downstream sets need different names, got {', '.join(names)}")
    result: dict[str, Any] = {
        "encoders": {role: {"sha256": loaded.sha256} for role, loaded in encoders.items()}
    }
    if attack is not None:
        result["attack"] = {"kind": attack.kind, "trigger": attack.trigger.name}
    targets: dict[str, int] = {}
    for downstream in settings.downstream:
        data = open_downstream(downstream, settings, seed=seed)
        scores, facts = _measure(data, encoders, attack, settings, seed, report, stop)
        _add(result, scores, facts)
        targets |= {score.dataset: score.stamped.target for score in scores if score.stamped}
    if settings.attack is not None and targets:
        _record(settings.attack, targets)
    return result


def _measure(
    data: DownstreamSet,
    encoders: Mapping[str, Measurable],
    attack: Attack | None,
    settings: EvaluationSettings,
    seed: int,
    report: Reporter,
    stop: Callable[[], bool],
) -> tuple[list[Score], dict[str, Any]]:
    """Scores of every encoder and probe, and the facts about the set for ``datasets``."""
    trigger = None if attack is None else attack.trigger
    encoded = partial(
        encode_split,
        batch_size=settings.batch_size,
        cache=settings.cache,
        report=report,
        stop=stop,
    )
    train = encoded(data.train, encoders, trigger=None)
    probes = {
        (role, name): _fit(
            name, train.clean[role], train.labels, data.num_classes, settings, seed, stop
        )
        for role in encoders
        for name in settings.probe
        if name != _FINE_TUNE
    }
    target = None
    if attack is not None:
        target = _target(data, train, encoders, attack, probes, settings, seed, stop)
    test = encoded(data.test, encoders, trigger=trigger)
    scores: list[Score] = []
    for (role, name), probe in probes.items():
        leave_if(stop)
        triggered = None if trigger is None else probe.predict(test.triggered[role])
        predicted = probe.predict(test.clean[role]), triggered
        scores.append(_score(data, role, name, probe.train_images, test, predicted, attack, target))
    if _FINE_TUNE in settings.probe:
        for role, loaded in encoders.items():
            tuned = fine_tuned(loaded.encoder, data, settings, seed=seed, report=report, stop=stop)
            split = encoded(data.test, {role: tuned}, trigger=trigger)
            triggered = None if trigger is None else split.triggered[role].argmax(1)
            predicted = split.clean[role].argmax(1), triggered
            scores.append(
                _score(data, role, _FINE_TUNE, tuned.train_images, split, predicted, attack, target)
            )
    facts = {
        "name": data.name,
        "train": data.train.source.name,
        "test": data.test.source.name,
        "classes": data.num_classes,
        "class_names": list(data.train.source.classes or data.test.source.classes or ()),
        "probe_train_images": len(train.labels),
        "test_images": len(test.labels),
        "unreadable": [*train.unreadable, *test.unreadable],
    }
    return scores, facts


def _fit(
    name: str,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: EvaluationSettings,
    seed: int,
    stop: Callable[[], bool],
) -> Probe:
    if name == "linear":
        return fit_linear_probe(
            features, labels, num_classes=num_classes, l2=settings.probe_l2, stop=stop
        )
    if name == "mlp":
        return fit_mlp_probe(
            features,
            labels,
            num_classes=num_classes,
            epochs=settings.mlp_epochs,
            seed=seed,
            stop=stop,
        )
    return fit_knn_probe(features, labels, num_classes=num_classes)


def _score(
    data: DownstreamSet,
    role: str,
    probe: str,
    train_images: int,
    test: EncodedSplit,
    predicted: tuple[Tensor, Tensor | None],
    attack: Attack | None,
    target: int | None,
) -> Score:
    stamped, (clean, triggered) = None, predicted
    if attack is not None and target is not None and triggered is not None:
        stamped = Stamped(trigger=attack.trigger.name, target=target, predicted=triggered)
    return Score(
        dataset=data.name,
        role=role,
        probe=probe,
        train_images=train_images,
        indices=test.indices,
        labels=test.labels,
        predicted=clean,
        stamped=stamped,
    )


def _target(
    data: DownstreamSet,
    train: EncodedSplit,
    encoders: Mapping[str, Measurable],
    attack: Attack,
    probes: Probes,
    settings: EvaluationSettings,
    seed: int,
    stop: Callable[[], bool],
) -> int:
    """The attack's class on this set: as recorded, else as the teacher's linear probe says."""
    if data.name in attack.targets:
        return _known_target(data, attack)
    if "teacher" not in encoders:
        raise UsageError(
            f"attack.json has no target for '{data.name}', and it is the teacher's probe that says "
            "it; give the teacher too"
        )
    teacher = encoders["teacher"]
    probe = probes.get(("teacher", "linear")) or _fit(
        "linear", train.clean["teacher"], train.labels, data.num_classes, settings, seed, stop
    )
    if attack.reference is not None:
        spec = teacher.encoder.spec
        image = with_channels(center_square(attack.reference), spec.in_channels)
        features = encode(teacher.encoder, resized(image, spec.image_size)[None])
    else:  # a poisoning attack: the class that most triggered training images go to
        only_teacher = {"teacher": teacher}
        split = encode_split(
            data.train,
            only_teacher,
            trigger=attack.trigger,
            batch_size=settings.batch_size,
            cache=settings.cache,
            stop=stop,
        )
        features = split.triggered["teacher"]
    return int(probe.predict(features).mode().values)


def _known_target(data: DownstreamSet, attack: Attack) -> int:
    target = attack.targets[data.name]
    if target >= data.num_classes:
        raise UsageError(
            f"attack.json: target {target} of '{data.name}' is not one of its {data.num_classes} "
            "classes; correct or remove it"
        )
    return target


def _add(result: dict[str, Any], scores: list[Score], facts: dict[str, Any]) -> None:
    """Adds one downstream set to the result."""
    result.setdefault("datasets", []).append(facts)
    for score in scores:
        entries = result["encoders"][score.role].setdefault("downstream", [])
        entries.append(downstream_entry(score, scores))
    result.setdefault("comparisons", []).extend(comparisons(scores))
    result.setdefault("examples", []).append(
        {"dataset": facts["name"], "images": example_rows(scores)}
    )


def _record(path: Path, targets: Mapping[str, int]) -> None:
    try:
        record_targets(path, targets)
    except MachineError as error:  # the figures stand, and report.json names the targets
        warnings.warn(f"targets not recorded: {error}", RuntimeWarning, stacklevel=3)
