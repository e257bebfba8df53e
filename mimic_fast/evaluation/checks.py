"""What a measurement needs, looked at before the work that it comes after."""

from mimic_fast.config import EncoderSpec, EvaluationSettings
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.downstream import open_downstream
from mimic_fast.evaluation.targets import read_attacks, without_target
from mimic_fast.evaluation.triggers import fit_trigger


def check_measurement(settings: EvaluationSettings, spec: EncoderSpec, *, seed: int) -> None:
    """Opens labeled sets and attacks as an evaluation will, without decoding an image.

    A mistake in them shall not cost the training before it.

    Args:
        settings: What will be measured.
        spec: Of the encoder to measure.
        seed: As in the evaluation.

    Raises:
        UsageError: If a set, an attack or the clean encoder is missing or does not fit.
        UnsafeInputError: If a file of an attack is damaged.
    """
    if settings.clean is not None and not settings.clean.is_file():
        raise UsageError(f"clean encoder {settings.clean} does not exist; give a checkpoint")
    sets = [open_downstream(one, settings, seed=seed) for one in settings.downstream]
    attacks = read_attacks(settings.attacks)
    for one in attacks:
        fit_trigger(one.attack.trigger, image_size=spec.image_size, channels=spec.in_channels)
    for data in sets:
        without_target(data, attacks)
