"""What step A found: the mutual information of every tapped layer with the features."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerEstimate:
    """Mutual information of one layer with the features, nats, under one estimator.

    Args:
        tap: Name of the tapped layer.
        raw: The estimate as it came, bias removed; may be below 0.
        low: Lower end of the 95 % interval around ``raw``; may be below 0.
        high: Upper end.
        noise_floor: What the same estimate stays below on shuffled pairings in 95 of 100 cases;
            None where it is not measured (dv, infonce).
        pairs: Pairs of directions measured; None where there are none (dv, infonce).
        bins: Bins per axis; None where there are none (dv, infonce, ksg).
        determines_features: Most pairs have a correlation above .99 and are capped at log K (of
            crossed ones, one pair for most directions): the features can be computed from this
            layer, and its information is unbounded. Slices do not show it.
    """

    tap: str
    raw: float
    low: float
    high: float
    noise_floor: float | None
    pairs: int | None
    bins: int | None
    determines_features: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerInformation(LayerEstimate):
    """A layer's estimate and what follows from it for distillation.

    Args:
        value: ``raw`` clamped at 0.
        share: p_l = I_l / sum_k I_k; the shares sum to 1.
        weight: lambda_l = base + gain * p_l.
    """

    value: float
    share: float
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MutualInformation:
    """Step A's result.

    Args:
        estimator: 'histogram', 'histogram, cross pairs', 'histogram, sliced', 'dv', 'infonce' or
            'ksg'. No number here means anything without it: a deterministic
            network's true mutual information is infinite.
        source: Whose activations were measured, 'teacher' or 'student'.
        images: Clean images used.
        bins: Bins per axis; None where there are none.
        layers: One entry per tap, shallow to deep.
        seconds: Wall time of step A.
    """

    estimator: str
    source: str
    images: int
    bins: int | None
    layers: tuple[LayerInformation, ...]
    seconds: float


def mutual_information_json(result: MutualInformation) -> dict[str, Any]:
    """The result as plain JSON values; what was not measured is absent."""
    body = {key: value for key, value in asdict(result).items() if value is not None}
    body["unit"] = "nats"
    body["layers"] = [
        {key: value for key, value in asdict(layer).items() if value is not None}
        for layer in result.layers
    ]
    return body
