"""What a measurement needs, looked at before the work that it comes after."""

from mimic_fast.config import EncoderSpec, EvaluationSettings
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import read_attack
from mimic_fast.evaluation.downstream import open_downstream
from mimic_fast.evaluation.triggers import fit_trigger


def check_measurement(settings: EvaluationSettings, spec: EncoderSpec, *, seed: int) -> None:
    """Opens labeled sets and attack as an evaluation will, without decoding an image.

    A mistake in them shall not cost the training before it.

    Args:
        settings: What will be measured.
        spec: Of the encoder to measure.
        seed: As in the evaluation.

    Raises:
        UsageError: If a set, the attack or the clean encoder is missing or does not fit.
        UnsafeInputError: If a file of the attack is damaged.
    """
    if settings.clean is not None and not settings.clean.is_file():
        raise UsageError(f"clean encoder {settings.clean} does not exist; give a checkpoint")
    sets = [open_downstream(one, settings, seed=seed) for one in settings.downstream]
    if settings.attack is None:
        return
    attack = read_attack(settings.attack)
    fit_trigger(attack.trigger, image_size=spec.image_size, channels=spec.in_channels)
    for data in sets:
        target = attack.targets.get(data.name, 0)
        if target >= data.num_classes:
            raise UsageError(
                f"attack.json: target {target} of '{data.name}' is not one of its "
                f"{data.num_classes} classes; correct or remove it"
            )
