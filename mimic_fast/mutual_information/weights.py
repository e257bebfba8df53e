"""From mutual information to the weight of each layer's attention loss, as in the authors' demo."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from mimic_fast.errors import SelfTestError
from mimic_fast.mutual_information.result import LayerEstimate, LayerInformation

Weighting = Literal["information", "uniform", "inverse"]


def layer_shares(values: Sequence[float]) -> tuple[float, ...]:
    """p_l = I_l / sum_k I_k; uniform, with a warning, where every I_l is 0.

    Args:
        values: Mutual information of each layer, nats, not negative.
    """
    total = math.fsum(values)
    if total == 0:
        warnings.warn(
            "no layer shows mutual information with the features; all layers get the same weight",
            stacklevel=2,
        )
        return (1 / len(values),) * len(values)
    return tuple(value / total for value in values)


def layer_weights(shares: Sequence[float], *, base: float, gain: float) -> tuple[float, ...]:
    """lambda_l = base + gain * p_l, computed once (base 1000 and gain 10000 in the demo)."""
    return tuple(base + gain * share for share in shares)


def weighted_by(shares: Sequence[float], weighting: Weighting) -> tuple[float, ...]:
    """What takes the place of p_l, adding up to 1: p_l itself, 1 / L, or (1 - p_l) / (L - 1)."""
    layers = len(shares)
    if weighting == "information" or layers == 1:
        return tuple(shares)
    if weighting == "uniform":
        return (1 / layers,) * layers
    return tuple((1 - share) / (layers - 1) for share in shares)


def weighted_layers(
    estimates: Sequence[LayerEstimate],
    *,
    base: float,
    gain: float,
    weighting: Weighting = "information",
) -> tuple[LayerInformation, ...]:
    """The estimates with their shares and weights; a layer's total is clamped at 0 here.

    Args:
        estimates: By layer.
        base: Of every weight.
        gain: Spread over the layers.
        weighting: By what; shares are those of the information in any case.

    Raises:
        SelfTestError: If an estimate is not finite; its layer is named.
    """
    for estimate in estimates:
        if not all(map(math.isfinite, (estimate.raw, estimate.low, estimate.high))):
            raise SelfTestError(
                f"mutual information of layer '{estimate.tap}' is {estimate.raw}, not a finite "
                "number; leave the layer out of encoder.taps or check the encoder"
            )
    values = [max(0.0, estimate.raw) for estimate in estimates]
    shares = layer_shares(values)
    weights = layer_weights(weighted_by(shares, weighting), base=base, gain=gain)
    return tuple(
        LayerInformation(**asdict(estimate), value=value, share=share, weight=weight)
        for estimate, value, share, weight in zip(estimates, values, shares, weights, strict=True)
    )
