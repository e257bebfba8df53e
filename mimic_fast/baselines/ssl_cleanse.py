"""SSL-Cleanse: one inverted trigger a cluster, outliers flagged and unlearned.

Zheng et al., "SSL-Cleanse: Trojan Detection and Mitigation in Self-Supervised Learning", ECCV 2024,
arXiv:2303.09079. Clusters of clean features stand for classes. For each, mask and pattern are
found that move images of the other clusters to its center; a mask much smaller than the others'
betrays a backdoor: a deviation from the median above 2 normalized median absolute deviations.
Flagged triggers are unlearned in the manner of BYOL: beside its own loss on two clean views, the
encoder's features of triggered views shall be what a slow average of it makes of the clean ones.

Adapted: the number of clusters is given, where the paper reads it off the inertia (Sliding Window
Kneedle). Distances are between unit vectors seen from the clean mean, so that weights mean the same
for every encoder. All clusters are inverted side by side; the penalty follows the last few steps,
not passes. BYOL's heads start anew, as the suspect comes without. If nothing is flagged the encoder
passes for clean and is left as it came, or, by ``unflagged = "smallest"``, the smallest trigger is
unlearned all the same.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mimic_fast import ops
from mimic_fast.baselines.cluster_triggers import (
    Schedule,
    anomaly_indices,
    cluster,
    invert_clusters,
)
from mimic_fast.baselines.repair import (
    Repair,
    ViewSettings,
    leave_repaired,
    minimize,
    open_repair,
    tell,
)
from mimic_fast.byol import byol_loss, mlp
from mimic_fast.config import OptimSettings, Settings
from mimic_fast.encoders.build import Encoder
from mimic_fast.evaluation.features import encode
from mimic_fast.optim import update_average
from mimic_fast.precision import autocast, autocast_dtype
from mimic_fast.progress import Reporter, silent


class SslCleanseSettings(ViewSettings):
    """Adam 0.001, decay 1e-6, 200 epochs, batch 512; K-means of 10, index above 2."""

    optim: OptimSettings = Field(
        default_factory=lambda: OptimSettings(
            name="adam", lr=1e-3, weight_decay=1e-6, epochs=200, batch_size=512, warmup_epochs=10.0
        ),
        description="how triggers are unlearned; epochs are passes over the clean images",
    )
    projection: int = Field(default=128, ge=2, description="output width of BYOL's heads")
    clusters: int = Field(default=10, ge=3, description="clusters of clean features")
    steps: int = Field(default=300, ge=1, description="steps of the inversions")
    inversion_batch: int = Field(default=32, ge=1, description="images of a step for each cluster")
    success: float = Field(
        default=0.98, gt=0, le=1, description="share of images to move to the cluster"
    )
    penalty: float = Field(default=0.01, gt=0, description="of the mask's mean, at the start")
    patience: int = Field(default=5, ge=1, description="steps between changes of the penalty")
    index: float = Field(default=2.0, gt=0, description="anomaly index above which: flagged")
    unflagged: Literal["leave", "smallest"] = Field(
        default="leave", description="where nothing is flagged: leave, or unlearn the smallest"
    )
    byol_weight: float = Field(default=1.0, ge=0, description="of BYOL's loss on clean views")
    unlearn_weight: float = Field(default=1.0, gt=0, description="of triggered against clean")
    momentum: float = Field(default=0.99, ge=0, lt=1, description="decay of the slow average")


def ssl_cleanse(
    settings: Settings,
    options: SslCleanseSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Detects and unlearns triggers; gives the encoder's file below ``run.out``.

    Raises:
        MimicError: As :func:`mimic_fast.baselines.repair.open_repair` and ``minimize`` do; if there
            are too few images, or too few different ones, to cluster.
    """
    batch = options.optim.batch_size
    repair = open_repair(settings, kind="ssl_cleanse", report=report, stop=stop, batch_size=batch)
    suspect, images = repair.suspect.encoder, repair.images
    features = encode(suspect, images, batch_size=batch)
    clusters = cluster(features, options.clusters, seed=settings.seed, device=repair.device)
    dtype = autocast_dtype(options.optim.precision)

    def under(batch: Tensor) -> Tensor:
        with autocast(dtype, repair.device):
            return suspect(batch)

    def tick(step: int, terms: Mapping[str, Tensor]) -> None:
        repair.leave()
        tell(repair, terms, step=step, total=options.steps, phase="ssl_cleanse: inversion")

    schedule = Schedule(
        steps=options.steps,
        batch_size=options.inversion_batch,
        success=options.success,
        penalty=options.penalty,
        patience=options.patience,
        seed=settings.seed,
    )
    found = invert_clusters(under, images, clusters, schedule, tick=tick)
    indices = anomaly_indices(found.sizes)
    flagged = (indices > options.index).nonzero().flatten().tolist()
    unlearned = flagged
    if not flagged and options.unflagged == "smallest" and bool((found.sizes < 1).any()):
        unlearned = [int(found.sizes.argmin())]
    encoder = repair.copy()
    if unlearned:
        triggers = [(found.masks[k], found.patterns[k]) for k in unlearned]
        unlearn(repair, encoder, options, triggers)
    facts = {
        "sizes": found.sizes.tolist(),
        "anomaly_indices": indices.tolist(),
        "flagged": flagged,
        "unlearned": unlearned,
    }
    return leave_repaired(repair, encoder, options, facts=facts)


def unlearn(
    repair: Repair,
    encoder: Encoder,
    options: SslCleanseSettings,
    triggers: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Trains the encoder in place against triggers, in turn, and leaves it in eval mode.

    Args:
        repair: Images, seed, whom to tell.
        encoder: To be trained.
        options: Optimizer, weights, decay.
        triggers: Mask ``[1, H, W]`` and pattern ``[C, H, W]`` of each, on the device.

    Raises:
        MimicError: As ``minimize`` does.
    """
    width = encoder.feature_dim
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(repair.settings.seed)
        heads = [mlp(size, 4 * width, options.projection) for size in (width, options.projection)]
    projector, predictor = (head.to(repair.device) for head in heads)
    online = nn.ModuleDict(OrderedDict(encoder=encoder, projector=projector, predictor=predictor))
    average = nn.ModuleDict(OrderedDict(encoder=encoder, projector=projector))
    average = copy.deepcopy(average).requires_grad_(False)
    averaged = average.state_dict()  # shares its tensors
    # Both in training mode, as in BYOL: were one normalized by its running statistics, features and
    # goals would differ by more than the trigger moves them.
    online.train()
    average.train()

    def losses(step: int) -> dict[str, Tensor]:
        views = torch.cat(repair.views(step, options))
        first = views[: len(views) // 2]
        mask, pattern = triggers[step % len(triggers)]
        # One forward, lest BatchNorm tell plain from triggered images by their own statistics.
        features = encoder(torch.cat([views, first * (1 - mask) + pattern * mask]))
        plain, triggered = features[: len(views)], features[len(views) :]
        with torch.no_grad():
            goal = average["encoder"](views)
            projected = average["projector"](goal)
            center = goal.mean(0)
        return {
            "byol": options.byol_weight * byol_loss(predictor(projector(plain)), projected),
            "unlearn": options.unlearn_weight
            * (2 + 2 * ops.clone_loss(triggered - center, goal[: len(first)] - center)),
        }

    def follow(step: int) -> None:
        update_average(averaged, online, decay=options.momentum)

    minimize(repair, online, losses, optim=options.optim, after=follow)
    encoder.eval()
