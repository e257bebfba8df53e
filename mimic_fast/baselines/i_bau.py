"""I-BAU: unlearns the one perturbation that moves the features of all images the most.

Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022,
arXiv:2110.03735. A backdoor is a perturbation that fools on any image. Every round finds a
universal one within an L2 ball, then trains the weights to answer right in spite of it. As the best
perturbation depends on the weights, their gradient has an implicit part, which a few terms of a
Neumann series give: with the map Phi(delta, theta) = delta - a grad_delta inner,

    v = sum_k ((dPhi/ddelta)^T)^k (d outer/d delta)
    hypergradient = d outer/d theta + (dPhi/dtheta)^T v

Without labels, right is what the suspect itself answers to the clean image: both losses are minus
the cosine to its features, and clean images in the outer loss keep them. The suspect is at the very
minimum of that loss, where there is no slope, so the perturbation starts at random. It climbs by
steps of one length and is held to the ball, as cosines have other slopes than cross-entropy. As in
the authors' code BatchNorm stays in eval mode, the round's perturbation is not renewed in the
round, and pixels may leave [0, 1].
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimic_fast.baselines.repair import (
    Repair,
    RepairSettings,
    leave_repaired,
    minimize,
    open_repair,
    tell,
)
from mimic_fast.config import OptimSettings, Settings
from mimic_fast.encoders.build import Encoder
from mimic_fast.evaluation.features import encode
from mimic_fast.precision import autocast, autocast_dtype
from mimic_fast.progress import Reporter, silent

PIXELS = 32  # side of the images that the radius is stated for


class IBauSettings(RepairSettings):
    """The recipe of the authors' code."""

    optim: OptimSettings = Field(
        default_factory=lambda: OptimSettings(
            name="adam", lr=1e-3, weight_decay=0.0, schedule="constant", epochs=5, batch_size=100,
            warmup_epochs=0.0, clip_norm=0.0,
        ),
        description="how weights are trained; a pass over the clean images is a round",
    )  # fmt: skip
    radius: float = Field(
        default=10.0,
        gt=0,
        description="largest L2 norm of the perturbation of 32x32 images in [0, 1]; it grows with "
        "the side",
    )
    ascent_steps: int = Field(
        default=50, ge=1, description="batches that each round's perturbation is found on"
    )
    penalty: float = Field(
        default=0.001,
        ge=0,
        description="weight of the squared norm in the inner loss, for 32x32 images too",
    )
    terms: int = Field(default=5, ge=1, description="terms of the Neumann series")
    inner_lr: float = Field(default=0.1, gt=0, description="a, the step of the map Phi")
    share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of a batch that bears the perturbation in the outer loss; the paper's "
        "formula has all, the authors' code 0.01",
    )


def i_bau(
    settings: Settings,
    options: IBauSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Unlearns in a copy of the suspect; gives the encoder's file below ``run.out``.

    Raises:
        MimicError: As :func:`mimic_fast.baselines.repair.open_repair` and ``minimize`` do.
    """
    repair = open_repair(
        settings, kind="i_bau", report=report, stop=stop, batch_size=options.optim.batch_size
    )
    encoder = repair.copy()
    found = unlearn(repair, encoder, options)
    facts = {"rounds": len(found), "perturbation_cosines": found}
    return leave_repaired(repair, encoder, options, facts=facts)


def unlearn(repair: Repair, encoder: Encoder, options: IBauSettings) -> list[float]:
    """Runs all rounds, changing the encoder in place.

    Returns:
        By round, the mean cosine of perturbed images' features to the suspect's clean ones on the
        last batch of the search: how far the perturbation got before it was unlearned.
    """
    optim = options.optim
    goals = encode(repair.suspect.encoder, repair.images).to(repair.device)
    per_round = len(repair.pool) / optim.batch_size
    perturbed = max(1, round(options.share * optim.batch_size))
    _, penalty = ball(repair, options)
    found: list[float] = []
    delta = encoder.mean.new_zeros(())

    def losses(step: int) -> dict[str, Tensor]:
        nonlocal delta
        if int(step / per_round) == len(found):
            delta, cosine = universal_perturbation(
                repair, encoder, goals, options=options, number=len(found)
            )
            found.append(cosine)
        ids = repair.batch(step, optim)
        images, goal = repair.images[ids], goals[ids]
        moved = cosines(encoder, images[:perturbed] + delta, goal[:perturbed])
        share = perturbed / len(ids)
        terms = {"perturbed": -share * moved.mean()}
        inner = moved.mean() + penalty * delta.square().sum()
        terms["implicit"] = implicit_term(
            terms["perturbed"], inner, delta, lr=options.inner_lr, terms=options.terms
        )
        if perturbed < len(ids):
            kept = cosines(encoder, images[perturbed:], goal[perturbed:])
            terms["clean"] = -(1 - share) * kept.mean()
        return terms

    # Attention's fused kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        minimize(repair, encoder, losses, optim=optim)
    return found


def universal_perturbation(
    repair: Repair,
    encoder: Encoder,
    goals: Float[Tensor, "image feature"],
    *,
    options: IBauSettings,
    number: int,
) -> tuple[Float[Tensor, "channel height width"], float]:
    """One perturbation of all images that takes features away from their goals.

    Args:
        repair: Its clean images, one batch a step.
        encoder: Not changed.
        goals: The suspect's features of all clean images.
        options: Ball, number of steps.
        number: Of the round, from 0.

    Returns:
        The perturbation, which wants a gradient, and the mean cosine that it left.
    """
    steps, optim = options.ascent_steps, options.optim
    radius, penalty = ball(repair, options)
    stride = 2.5 * radius / steps  # as usual for steps of one length: enough to cross the ball
    generator = torch.Generator().manual_seed(repair.settings.seed + number)
    start = torch.randn(repair.images.shape[1:], generator=generator).to(repair.device)
    delta = within(start, radius=min(stride, radius))
    cosine = delta.new_zeros(())
    for step in range(steps):
        repair.leave()
        delta.requires_grad_(True)
        ids = repair.batch(number * steps + step, optim)
        with autocast(autocast_dtype(optim.precision), repair.device):
            cosine = cosines(encoder, repair.images[ids] + delta, goals[ids]).mean()
            inner = cosine + penalty * delta.square().sum()
        (slope,) = torch.autograd.grad(inner, delta)
        with torch.no_grad():
            pull = slope / slope.norm().clamp(min=torch.finfo(slope.dtype).tiny)
            delta = within(delta - stride * pull, radius=radius)
        tell(repair, {"cosine": cosine}, step=step, total=steps, phase="perturbation")
    return delta.requires_grad_(True), cosine.item()


def ball(repair: Repair, options: IBauSettings) -> tuple[float, float]:
    """Radius, and weight of the squared norm; a full ball costs the same at any image size."""
    scale = repair.image_size / PIXELS
    return options.radius * scale, options.penalty / scale**2


def cosines(
    encoder: Encoder,
    images: Float[Tensor, "batch channel height width"],
    goals: Float[Tensor, "batch feature"],
) -> Float[Tensor, " batch"]:
    """Cosine of every image's features to its goal; twice differentiable, unlike the fused op."""
    return F.cosine_similarity(encoder(images).float(), goals)


def implicit_term(
    outer: Float[Tensor, ""],
    inner: Float[Tensor, ""],
    delta: Float[Tensor, "..."],
    *,
    lr: float,
    terms: int,
) -> Float[Tensor, ""]:
    """A scalar of value 0 whose gradient by the weights is the implicit part of the hypergradient.

    The Neumann series is summed from within, v <- v - lr (d2 inner/d delta2) v + d outer/d delta,
    starting with its first term.

    Args:
        outer: What the weights minimize, of ``delta`` and the weights; its graph is kept.
        inner: What ``delta`` minimizes; its graph is kept.
        delta: At its minimum, or near.
        lr: a, the step of Phi; the series converges where it is below 2 / largest curvature.
        terms: How many terms are summed; with one, inner curvature is taken as 1 / lr.
    """
    (pull,) = torch.autograd.grad(outer, delta, retain_graph=True)
    (slope,) = torch.autograd.grad(inner, delta, create_graph=True)
    total = pull
    for _ in range(terms - 1):
        (curved,) = torch.autograd.grad(slope, delta, total, retain_graph=True)
        total = total - lr * curved + pull
    term = -lr * (slope * total).sum()
    return term - term.detach()


def within(delta: Float[Tensor, "..."], *, radius: float) -> Float[Tensor, "..."]:
    """``delta`` or, where it is outside the L2 ball, the nearest point of the ball."""
    return delta * (radius / delta.norm()).clamp(max=1)
