"""Step D where labels are at hand: clean accuracy, ASR and RA of every encoder, on the same images.

For one downstream set and one probe fitted on frozen features (or the encoder fine-tuned): clean
accuracy is the probe's top-1; ASR the share of triggered images *not of the target class* that it
calls the target (the demo counts those of the target class too: ``attack_success_rate_all``); RA
the share of the former still given their true class. The target is fixed once on the teacher and
kept for every encoder. Several attacks, such as the targets of one encoder, are measured together.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from torch import Tensor

from mimic_fast.config import EvaluationSettings
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.downstream import (
    DownstreamSet,
    EncodedSplit,
    encode_split,
    open_downstream,
)
from mimic_fast.evaluation.feature_cache import Measurable
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
from mimic_fast.evaluation.targets import (
    NamedAttack,
    read_attacks,
    record,
    target_classes,
    without_target,
)
from mimic_fast.progress import Reporter, silent
from mimic_fast.watch import leave_if

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
    measured alike but not compared. Targets worked out here are recorded in each ``attack.json``.

    Args:
        encoders: By role; each as loaded from its file.
        settings: Downstream sets, attacks, probes.
        seed: Draws the labeled subset and the test images.
        report: Told the number of images done, what was left out, and of further targets.
        stop: Polled between images, batches and fits; true leaves.

    Returns:
        ``encoders``, ``comparisons`` (paired differences, purified minus each of the others),
        ``attacks`` and ``attack`` (the first of them), ``datasets`` and ``examples`` (a few test
        images and what each encoder's probe says) of report.json. An attack is named by its
        ``trigger`` everywhere. What was not measured is absent.

    Raises:
        UsageError: If a source has no labels, no teacher is there to work out the target with, two
            sets share a name, or two attacks a trigger.
        UnsafeInputError: If an encoder gives features that are not finite.
        StoppedError: If ``stop`` told so.
    """
    attacks = read_attacks(settings.attacks, report=report)
    names = [downstream.name for downstream in settings.downstream]
    if len(set(names)) != len(names):
        raise UsageError(f"downstream sets need different names, got {', '.join(names)}")
    result: dict[str, Any] = {
        "encoders": {role: {"sha256": loaded.sha256} for role, loaded in encoders.items()}
    }
    if attacks:
        listed = [{"kind": one.attack.kind, "trigger": one.name} for one in attacks]
        result |= {"attack": listed[0], "attacks": listed}
    targets: dict[str, list[int]] = {}
    for downstream in settings.downstream:
        data = open_downstream(downstream, settings, seed=seed)
        scores, facts = _measure(data, encoders, attacks, settings, seed, report, stop)
        _add(result, scores, facts)
        targets |= {score.dataset: [one.target for one in score.stamped] for score in scores}
    record(attacks, targets)
    return result


def _measure(
    data: DownstreamSet,
    encoders: Mapping[str, Measurable],
    attacks: Sequence[NamedAttack],
    settings: EvaluationSettings,
    seed: int,
    report: Reporter,
    stop: Callable[[], bool],
) -> tuple[list[Score], dict[str, Any]]:
    """Scores of every encoder and probe, and the facts about the set for ``datasets``."""
    encoded = partial(
        encode_split,
        batch_size=settings.batch_size,
        cache=settings.cache,
        report=report,
        stop=stop,
    )
    unknown = without_target(data, attacks)
    if unknown and "teacher" not in encoders:
        raise UsageError(
            f"attack.json has no target for '{data.name}', and it is the teacher's probe that says "
            "it; give the teacher too"
        )
    poisoning = [attack.trigger for attack in unknown if attack.reference is None]
    train = encoded(data.train, encoders, triggers={"teacher": poisoning} if poisoning else {})
    fit = partial(_fit, train=train, data=data, settings=settings, seed=seed, stop=stop)
    frozen = [name for name in settings.probe if name != _FINE_TUNE]
    probes = {(role, name): fit(role, name) for role in encoders for name in frozen}
    targets = target_classes(
        data,
        attacks,
        teacher=encoders["teacher"].encoder if unknown else None,
        plain=train.clean.get("teacher"),
        triggered=train.triggered.get("teacher", ()),
        probe=cache(lambda: probes.get(("teacher", "linear")) or fit("teacher", "linear")),
    )
    aims = [(one.name, target) for one, target in zip(attacks, targets, strict=True)]
    triggers = [one.attack.trigger for one in attacks]
    test = encoded(data.test, encoders, triggers=dict.fromkeys(encoders, triggers))
    scores: list[Score] = []
    for (role, name), probe in probes.items():
        leave_if(stop)
        scores.append(_score(data, role, name, probe.train_images, test, probe.predict, aims))
    if _FINE_TUNE in settings.probe:
        for role, loaded in encoders.items():
            tuned = fine_tuned(loaded.encoder, data, settings, seed=seed, report=report, stop=stop)
            split = encoded(data.test, {role: tuned}, triggers={role: triggers})
            count = tuned.train_images
            scores.append(_score(data, role, _FINE_TUNE, count, split, _largest, aims))
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
    role: str,
    name: str,
    *,
    train: EncodedSplit,
    data: DownstreamSet,
    settings: EvaluationSettings,
    seed: int,
    stop: Callable[[], bool],
) -> Probe:
    features, labels, num_classes = train.clean[role], train.labels, data.num_classes
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


def _largest(logits: Tensor) -> Tensor:
    """Classes where the encoder itself was given a head."""
    return logits.argmax(1)


def _score(
    data: DownstreamSet,
    role: str,
    probe: str,
    train_images: int,
    test: EncodedSplit,
    predict: Callable[[Tensor], Tensor],
    aims: Sequence[tuple[str, int]],
) -> Score:
    """What a classifier of features says; ``aims`` are name and target of each attack."""
    triggered = test.triggered.get(role, ())
    return Score(
        dataset=data.name,
        role=role,
        probe=probe,
        train_images=train_images,
        indices=test.indices,
        labels=test.labels,
        predicted=predict(test.clean[role]),
        stamped=tuple(
            Stamped(trigger=name, target=target, predicted=predict(features))
            for (name, target), features in zip(aims, triggered, strict=True)
        ),
    )


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
