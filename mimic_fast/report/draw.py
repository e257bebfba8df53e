"""The figures of a report that need encoders and images."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mimic_fast.config import EvaluationSettings
from mimic_fast.data.images import load_images
from mimic_fast.encoders.build import Encoder
from mimic_fast.encoders.taps import default_taps
from mimic_fast.evaluation.attack_file import read_attack
from mimic_fast.evaluation.downstream import open_downstream
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.triggers import apply_trigger, fit_trigger
from mimic_fast.report.attention import attention_figure
from mimic_fast.report.clean_sheet import clean_sample_figure
from mimic_fast.report.examples import first_of, target_of
from mimic_fast.report.feature_plot import feature_figure
from mimic_fast.report.figures import Figure
from mimic_fast.watch import leave_if

_POINTS = 300  # of each kind in a scatter plot: more hide each other
_SHOWN = ("teacher", "purified")


def draw_figures(
    encoders: Mapping[str, Encoder],
    evaluation: Mapping[str, Any],
    settings: EvaluationSettings,
    *,
    seed: int,
    taps: tuple[str, ...] | None = None,
    power: float = 2.0,
    pool: Tensor | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Figure]:
    """Attention maps, features and clean sample, as far as there is something to show.

    Of several attacks the first is shown, and the captions say so.

    Args:
        encoders: By role; teacher and purified are shown.
        evaluation: Result of ``evaluate_encoders``.
        settings: The settings it was called with.
        seed: The seed it was called with.
        taps: Of the run; None: the architecture's.
        power: p of the attention loss.
        pool: The clean set, decoded, uint8 ``[n, C, S, S]``.
        stop: Polled between batches; true leaves.

    Raises:
        UsageError: If data or attack have gone since.
        StoppedError: If ``stop`` told so.
    """
    shown = {role: encoders[role] for role in _SHOWN if role in encoders}
    figures: list[Figure] = []
    if shown and settings.downstream:
        figures += _with_labels(shown, evaluation, settings, seed, taps, power, stop)
    elif shown and pool is not None:
        drawn = attention_figure(shown, _taps(shown, taps), pool, None, power=power)
        figures += [] if drawn is None else [drawn]
    if pool is not None:
        figures.append(clean_sample_figure(pool))
    return figures


def _with_labels(
    shown: Mapping[str, Encoder],
    evaluation: Mapping[str, Any],
    settings: EvaluationSettings,
    seed: int,
    taps: tuple[str, ...] | None,
    power: float,
    stop: Callable[[], bool],
) -> list[Figure]:
    spec = next(iter(shown.values())).spec
    test = open_downstream(settings.downstream[0], settings, seed=seed).test
    # In their order images may come class by class.
    order = torch.randperm(len(test.indices), generator=torch.Generator().manual_seed(seed))
    indices = test.indices[order[:_POINTS]].tolist()
    images, kept = load_images(
        test.source,
        indices,
        image_size=spec.image_size,
        channels=spec.in_channels,
        evaluation=True,
    )
    by_index = dict(zip(test.indices.tolist(), test.labels.tolist(), strict=True))
    labels = torch.tensor([by_index[index] for index in kept])
    target = target_of(evaluation, settings.downstream[0].name)
    trigger = None
    if settings.attacks:
        trigger = read_attack(settings.attacks[0]).trigger
        trigger = fit_trigger(trigger, image_size=spec.image_size, channels=spec.in_channels)
    clean = {role: encode(encoder, images, stop=stop) for role, encoder in shown.items()}
    stamped: dict[str, Tensor] = {}
    if trigger is not None:
        stamped = {
            role: encode(encoder, images, trigger=trigger, stop=stop)[labels != target]
            for role, encoder in shown.items()
        }
    leave_if(stop)
    features = feature_figure(clean, stamped, labels=labels, target=target)
    others = images if target is None else images[labels != target]
    triggered = None
    if trigger is not None:
        pixels = apply_trigger(others.float() / 255, trigger)
        triggered = (pixels * 255).round().to(torch.uint8)
    drawn = attention_figure(shown, _taps(shown, taps), others, triggered, power=power)
    figures = [features] if drawn is None else [drawn, features]
    said = first_of(evaluation)
    return [replace(figure, caption=figure.caption + said) for figure in figures]


def _taps(shown: Mapping[str, Encoder], taps: tuple[str, ...] | None) -> tuple[str, ...]:
    return taps or default_taps(next(iter(shown.values())))
