"""The attacks of an evaluation: which there are, what each is called, which class each aims at.

An encoder may have several backdoors; each is an attack of its own with its own trigger. The target
class on a labeled set is fixed once, on the teacher, and kept for every encoder.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from torch import Tensor

from mimic_fast.data.images import center_square, resized, with_channels
from mimic_fast.encoders.build import Encoder
from mimic_fast.errors import MachineError, UsageError
from mimic_fast.evaluation.attack_file import (
    Attack,
    attack_files,
    further_targets,
    read_attack,
    record_targets,
)
from mimic_fast.evaluation.downstream import DownstreamSet
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.probes import Probe
from mimic_fast.evaluation.stamping import Trigger, same_trigger
from mimic_fast.evaluation.triggers import fit_trigger
from mimic_fast.progress import Event, Reporter, silent


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedAttack:
    """One attack of an evaluation.

    Args:
        path: Its ``attack.json``.
        name: What it is called in the report: its trigger's name, with a number behind it where an
            earlier one has that name already.
        attack: What the file says.
    """

    path: Path
    name: str
    attack: Attack


def read_attacks(paths: Sequence[Path], *, report: Reporter = silent) -> tuple[NamedAttack, ...]:
    """The attacks of files and folders, a folder's further targets included.

    Args:
        paths: ``attack.json`` files or folders with one.
        report: Told of further targets, whether they are measured or not.

    Raises:
        UsageError: If a file is missing or not of this form, or two have the same trigger.
        UnsafeInputError: If a file is damaged, oversized or named outside its folder.
    """
    found: list[NamedAttack] = []
    for path in paths:
        for file in attack_files(path):
            attack = read_attack(file)
            for other in found:
                if _same(other.attack.trigger, attack.trigger):
                    raise UsageError(
                        f"attacks {other.path} and {file} have the same trigger "
                        f"'{attack.trigger.name}'; give each attack once"
                    )
            name = _unused(attack.trigger.name, {other.name for other in found})
            found.append(NamedAttack(path=file, name=name, attack=attack))
        _tell_further(path, report)
    return tuple(found)


def without_target(data: DownstreamSet, attacks: Sequence[NamedAttack]) -> list[Attack]:
    """The attacks whose target class on this set is not recorded.

    Raises:
        UsageError: If a recorded one is not a class of the set.
    """
    for one in attacks:
        target = one.attack.targets.get(data.name, 0)
        if target >= data.num_classes:
            raise UsageError(
                f"{one.path}: target {target} of '{data.name}' is not one of its "
                f"{data.num_classes} classes; correct or remove it"
            )
    return [one.attack for one in attacks if data.name not in one.attack.targets]


def target_classes(
    data: DownstreamSet,
    attacks: Sequence[NamedAttack],
    *,
    teacher: Encoder | None,
    plain: Tensor | None,
    triggered: Sequence[Tensor],
    probe: Callable[[], Probe],
) -> tuple[int, ...]:
    """The class of each attack on a set: as recorded, else as the teacher's linear probe says.

    With a reference image, that image's class. Without, for poisoning attacks, the class that gains
    most images by the trigger: a weak trigger leaves the largest class the largest.

    Args:
        data: The set.
        attacks: In their order.
        teacher: The suspect encoder; None where every target is recorded.
        plain: The teacher's features of the training images.
        triggered: The same of triggered ones, for each poisoning attack (one without a reference)
            whose target is not recorded.
        probe: Gives the teacher's linear probe; called only if it is needed.
    """
    stamped = iter(triggered)
    targets: list[int] = []
    for one in attacks:
        if data.name in one.attack.targets:
            targets.append(one.attack.targets[data.name])
            continue
        assert teacher is not None
        reference = one.attack.reference
        if reference is None:
            assert plain is not None
            after, before = (_sizes(probe(), part, data) for part in (next(stamped), plain))
            targets.append(int((after - before).argmax()))
            continue
        image = with_channels(center_square(reference), teacher.spec.in_channels)
        features = encode(teacher, resized(image, teacher.spec.image_size)[None])
        targets.append(int(probe().predict(features)[0]))
    return tuple(targets)


def _sizes(probe: Probe, features: Tensor, data: DownstreamSet) -> Tensor:
    """Images given to each class."""
    return probe.predict(features).bincount(minlength=data.num_classes)


def record(attacks: Sequence[NamedAttack], targets: Mapping[str, Sequence[int]]) -> None:
    """Adds targets to each ``attack.json``; warns where one cannot be written.

    Args:
        attacks: In their order.
        targets: By downstream set, in the order of the attacks.

    Raises:
        UsageError: If a file has gone since or is no longer of this form.
    """
    for place, one in enumerate(attacks):
        try:
            record_targets(one.path, {name: classes[place] for name, classes in targets.items()})
        except MachineError as error:  # the figures stand, and report.json names the targets
            warnings.warn(f"targets not recorded: {error}", RuntimeWarning, stacklevel=3)


def _same(a: Trigger, b: Trigger) -> bool:
    """Whether two triggers have one name and do the same at the size of the first."""
    if a.name != b.name:
        return False
    channels, height, width = a.pattern.shape
    if a.pattern.shape != b.pattern.shape and height == width:
        b = fit_trigger(b, image_size=width, channels=channels)
    return same_trigger(a, b)


def _unused(name: str, taken: set[str]) -> str:
    names = (name if number == 1 else f"{name} ({number})" for number in count(1))
    return next(one for one in names if one not in taken)


def _tell_further(path: Path, report: Reporter) -> None:
    """Nobody shall take one target's figures for all, or wonder where the others come from."""
    whole = path.is_dir()
    if not whole and path.name != "attack.json":
        return
    names = ", ".join(further_targets(path if whole else path.parent))
    if names:
        said = "measured too" if whole else "not measured"
        report(Event(phase="evaluate", message=f"{path} has further targets, {said}: {names}"))
