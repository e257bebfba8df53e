"""InfoNCE: a bound from telling each image's features among those of the batch.

Van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding",
arXiv:1807.03748, eq. (5). Critic and training are those of ``dv.py``: the two bounds differ in
nothing else. In expectation over fresh batches of B images the value is at most I(X;R) and at most
log B, 4.85 nats at 128: layers with more than that look alike. As with dv, a batch is evaluated by
a critic trained on it, which may pass I(X;R); log B holds always.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mimic_fast.mutual_information.dv import Critic


def info_nce(scores: Float[Tensor, "image image"]) -> Float[Tensor, ""]:
    """The bound from T(x_i, r_j), true pairs on the diagonal, nats; at most log of their number."""
    own = scores.diagonal()
    return (own - scores.logsumexp(dim=1)).mean() + math.log(len(scores))


def infonce_bound(
    critic: Critic,
    maps: Float[Tensor, "image value"],
    features: Float[Tensor, "image feature"],
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """The bound of one batch; all its pairs are compared and nothing is drawn."""
    return info_nce(all_pairs(critic, maps, features))


def all_pairs(
    critic: Critic, maps: Float[Tensor, "image value"], features: Float[Tensor, "image feature"]
) -> Float[Tensor, "image image"]:
    """T(x_i, r_j) of every pair: the first layer is linear, so each side passes through it once."""
    first, *rest = critic
    assert isinstance(first, nn.Linear)
    of_map, of_features = first.weight.split([maps.shape[1], features.shape[1]], dim=1)
    hidden = F.linear(maps, of_map, first.bias)[:, None] + F.linear(features, of_features)
    for part in rest:
        hidden = part(hidden)
    return hidden[..., 0]
