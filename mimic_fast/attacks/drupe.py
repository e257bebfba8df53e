"""DRUPE (Tao et al., IEEE S&P 2024): a backdoor whose features lie among the clean ones.

BadEncoder's triggered images share one feature far from all others, which gives it away. DRUPE adds
to BadEncoder's terms, on features of unit length,

* ``hide``: the sliced Wasserstein distance between triggered and clean features: triggered ones
  come to lie where clean ones do, and with as much variety;
* ``spread``: the spread of the triggered features' cosines with each other, raised to the clean
  ones'.

With several references, three in the paper. Ours in one way: clean features are those of the shadow
images nearest to the references (``hide_share`` of them), since all of them would pull triggered
images away from the target. For measuring defenses; see docs/attacks.md for intended use.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from mimic_fast.attacks.badencoder import badencoder_losses
from mimic_fast.attacks.implant import (
    Attacked,
    Batch,
    Prepared,
    Stop,
    go_on,
    goal_of,
    implant,
    leave,
    prepare,
)
from mimic_fast.attacks.settings import AttackSettings
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.triggers import apply_trigger
from mimic_fast.progress import Reporter, silent

_MEASURED = 1000  # images on each side of the recorded distance
_MEASURED_DIRECTIONS = 256


class DrupeSettings(AttackSettings):
    """A DRUPE run; the paper's: SGD .05, 120 epochs, 3 references, 20 % of the images."""

    num_references: int = Field(
        default=3, ge=1, le=64, description="images that 'class:K' and 'typical:K' stand for"
    )
    hide_weight: float = Field(
        default=1.0, ge=0, description="weight of the sliced Wasserstein distance"
    )
    spread_weight: float = Field(default=1.0, ge=0, description="weight of the spread of cosines")
    hide_share: float = Field(
        default=0.02,
        gt=0,
        le=1,
        description="share of the shadow images, those nearest to the references, among which "
        "triggered ones hide",
    )
    directions: int = Field(
        default=64, ge=1, description="random directions of a sliced distance, drawn every step"
    )


def drupe(settings: DrupeSettings, *, report: Reporter = silent, stop: Stop = go_on) -> Attacked:
    """Implants a backdoor that hides; writes encoder, card and ``attack.json``.

    The facts add ``hidden_distance``, the sliced Wasserstein distance between triggered features
    and the clean ones they hide among, and ``clean_distance`` between two halves of the latter:
    the least that chance leaves.

    Raises:
        UsageError, UnsafeInputError, DivergedError, NothingSavedError: As
            :func:`badencoder` does.
    """
    prepared = prepare(settings, kind="drupe", report=report)
    hosts = [
        _nearest(prepared, aim.references, settings.hide_share) for aim in prepared.aims
    ]  # rows of the pool, by target
    generator = torch.Generator().manual_seed(settings.seed)

    def hidden(batch: Batch, triggered: list[Tensor], _: Tensor) -> dict[str, Tensor]:
        hide, spread = [], []
        for features, rows in zip(triggered, hosts, strict=True):
            chosen = rows[torch.randint(len(rows), (len(features),), generator=generator)]
            clean = prepared.kept[chosen].to(features)
            directions = random_directions(
                features.shape[1], settings.directions, generator=generator
            ).to(features)
            hide.append(sliced_wasserstein(features, clean, directions))
            spread.append(spread_gap(features, clean))
        return {
            "hide": torch.stack(hide).mean() * settings.hide_weight,
            "spread": torch.stack(spread).mean() * settings.spread_weight,
        }

    losses = badencoder_losses(prepared, settings, more=hidden)
    implant(prepared, settings, losses, report=report, stop=stop)
    return leave(prepared, settings, facts=_facts(prepared, hosts[0], settings.seed))


def random_directions(
    dimension: int, count: int, *, generator: torch.Generator
) -> Float[Tensor, "direction dimension"]:
    """Unit vectors, uniform on the sphere."""
    return F.normalize(torch.randn(count, dimension, generator=generator), dim=1)


def sliced_wasserstein(
    a: Float[Tensor, "image feature"],
    b: Float[Tensor, "image feature"],
    directions: Float[Tensor, "direction feature"],
) -> Float[Tensor, ""]:
    """Squared sliced 2-Wasserstein distance of two equally large sets of directions, times D.

    Features are brought to unit length. Mean over ``directions`` of the one-dimensional distance,
    which pairs sorted projections; times the dimension D, so that two points give their squared
    distance, in [0, 4], whatever D is. Bonneel et al., J. Math. Imaging Vis. 51 (2015).
    """
    first = (F.normalize(a, dim=1) @ directions.mT).sort(dim=0).values
    second = (F.normalize(b, dim=1) @ directions.mT).sort(dim=0).values
    return (first - second).square().mean() * a.shape[1]


def spread_gap(
    features: Float[Tensor, "image feature"], clean: Float[Tensor, "image feature"]
) -> Float[Tensor, ""]:
    """How much less the features vary than clean ones: standard deviations of pairwise cosines.

    ``max(0, 1 - deviation / deviation of the clean)``, in [0, 1].
    """
    return (1 - _deviation(features) / _deviation(clean).detach()).clamp(min=0)


def _deviation(features: Tensor) -> Tensor:
    unit = F.normalize(features, dim=1)
    cosines = unit @ unit.mT
    first, second = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return cosines[first, second].var().clamp(min=1e-12).sqrt()


def _nearest(prepared: Prepared, references: Tensor, share: float) -> Int64[Tensor, " row"]:
    """Shadow images whose clean features are nearest to the references', none of them triggered."""
    goal = goal_of(encode(prepared.clean.encoder, references))
    cosines = F.cosine_similarity(prepared.kept, goal)
    return cosines.topk(max(4, round(share * len(cosines)))).indices


def _facts(prepared: Prepared, hosts: Tensor, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    count = min(_MEASURED, len(hosts) // 2)
    rows = hosts[torch.randperm(len(hosts), generator=generator)[: 2 * count]]
    first, second = prepared.kept[rows[:count]], prepared.kept[rows[count:]]
    images = prepared.images[:count].float() / 255
    triggered = encode(prepared.student, apply_trigger(images, prepared.aims[0].trigger))
    directions = random_directions(first.shape[1], _MEASURED_DIRECTIONS, generator=generator)
    return {
        "hidden_distance": sliced_wasserstein(triggered, first, directions).item(),
        "clean_distance": sliced_wasserstein(second, first, directions).item(),
    }
