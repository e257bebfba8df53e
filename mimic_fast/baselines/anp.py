"""ANP: prunes the neurons whose small changes change the features the most.

Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021,
arXiv:2110.14430. Noise on the neurons, found by a signed gradient step to raise the loss, wakes a
backdoor without its trigger. Masks in [0, 1] are trained to keep the loss low under that noise and
without it; what they close is pruned. Mask and noise delta multiply a neuron's weight, (m + delta)
w, the noise xi its bias, (1 + xi) b.

Without labels the loss is the clone loss to the suspect's own features of the same images. It asks
what the mechanism asks, which neurons can move the features of clean images, and is lowest where
nothing is masked, so that a mask falls only for the sake of robustness. A contrastive loss would
need a head trained first, and can fall by moving all features alike.

Neurons are the channels of every BatchNorm, as in the authors' code; without any, those of
convolutions and linear layers, as in the paper's formula. Two departures: noise is held to the
paper's bound after its random start, and BatchNorm keeps its running statistics, with which the
encoder is used, so that the suspect's features can be computed once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from mimic_fast import ops
from mimic_fast.baselines.repair import (
    Repair,
    RepairSettings,
    leave_repaired,
    minimize,
    open_repair,
)
from mimic_fast.config import OptimSettings, Settings
from mimic_fast.encoders.build import Encoder
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.features import encode
from mimic_fast.progress import Reporter, silent

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AnpSettings(RepairSettings):
    """The paper's recipe for CIFAR-10."""

    optim: OptimSettings = Field(
        default_factory=lambda: OptimSettings(
            name="sgd", lr=0.2, momentum=0.9, weight_decay=0.0, schedule="constant",
            batch_size=128, warmup_epochs=0.0, clip_norm=0.0,
        ),
        description="how the masks are trained; epochs count only where iterations is none",
    )  # fmt: skip
    iterations: int | None = Field(
        default=2000, ge=1, description="updates of the masks; None: those of optim.epochs"
    )
    epsilon: float = Field(
        default=0.4, ge=0, description="largest noise, as a share of a neuron's weight or bias"
    )
    noise_steps: int = Field(default=1, ge=1, description="signed steps to the worst noise")
    alpha: float = Field(
        default=0.2, ge=0, le=1, description="weight of the loss without noise; 1 - alpha with it"
    )
    threshold: float = Field(
        default=0.2, ge=0, le=1, description="neurons with a mask below it are pruned"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Neurons:
    """The channels of one layer, by the names of its parameters in the encoder."""

    layer: str
    weight: str
    bias: str | None
    count: int


def anp(
    settings: Settings,
    options: AnpSettings,
    *,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Prunes a copy of the suspect; gives the encoder's file below ``run.out``.

    Raises:
        UsageError: If the encoder has no neurons to mask.
        MimicError: As :func:`mimic_fast.baselines.repair.open_repair` and ``minimize`` do.
    """
    repair = open_repair(
        settings, kind="anp", report=report, stop=stop, batch_size=options.optim.batch_size
    )
    encoder = repair.copy().requires_grad_(False)
    masks = Masks(encoder, neurons_of(encoder))
    train_masks(repair, masks, options)
    pruned = prune(encoder, masks, threshold=options.threshold)
    facts = {
        "neurons": len(masks.values),
        "pruned": sum(map(len, pruned.values())),
        "pruned_neurons": pruned,
    }
    return leave_repaired(repair, encoder, options, facts=facts)


def neurons_of(encoder: Encoder) -> list[Neurons]:
    """What can be masked: channels of BatchNorms, or else of convolutions and linear layers.

    Raises:
        UsageError: If there is neither.
    """
    found = list(_neurons(encoder, _BatchNorm)) or list(_neurons(encoder, LAYERS))
    if not found:
        raise UsageError(
            "anp masks channels of BatchNorm, convolution or linear layers, but "
            f"{encoder.spec.architecture} has none with weights; use another defense"
        )
    return found


class Masks(nn.Module):
    """One mask a neuron, in one vector, over an encoder that stays as it is.

    Args:
        encoder: In eval mode; none of its parameters wants a gradient.
        neurons: What is masked.
    """

    def __init__(self, encoder: Encoder, neurons: list[Neurons]) -> None:
        super().__init__()
        self.encoder, self.neurons = encoder, neurons
        self._sizes = [layer.count for layer in neurons]
        self._own = dict(encoder.named_parameters())
        self.values = nn.Parameter(encoder.mean.new_ones(sum(self._sizes)))

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "2 neuron"] | None = None,
    ) -> Float[Tensor, "batch feature"]:
        """Features of the masked encoder, in float32; under noise (delta, xi) if given."""
        scales = self.values if noise is None else self.values + noise[0]
        replaced = {
            layer.weight: _by_channel(self._own[layer.weight], scale)
            for layer, scale in zip(self.neurons, scales.split(self._sizes), strict=True)
        }
        if noise is not None:
            for layer, xi in zip(self.neurons, noise[1].split(self._sizes), strict=True):
                if layer.bias is not None:
                    replaced[layer.bias] = self._own[layer.bias] * (1 + xi)
        return functional_call(self.encoder, replaced, (images,)).float()

    def by_layer(self) -> dict[str, Tensor]:
        """The masks of every layer, without gradient."""
        parts = self.values.detach().split(self._sizes)
        return {layer.layer: part for layer, part in zip(self.neurons, parts, strict=True)}


def train_masks(repair: Repair, masks: Masks, options: AnpSettings) -> None:
    """Trains the masks in place against noise found anew in every step."""
    optim, alpha = options.optim, options.alpha
    goals = encode(repair.suspect.encoder, repair.images).to(repair.device)
    generator = torch.Generator(repair.device).manual_seed(repair.settings.seed)

    def losses(step: int) -> dict[str, Tensor]:
        ids = repair.batch(step, optim)
        images, goal = repair.images[ids], goals[ids]
        noise = worst_noise(masks, images, goal, options=options, generator=generator)
        robust = ops.clone_loss(masks(images, noise), goal)
        plain = ops.clone_loss(masks(images), goal)
        return {"robust": (1 - alpha) * robust, "clone": alpha * plain}

    @torch.no_grad()
    def into_range(step: int) -> None:
        masks.values.clamp_(0, 1)

    minimize(repair, masks, losses, optim=optim, after=into_range, steps=options.iterations)


def worst_noise(
    masks: Masks,
    images: Float[Tensor, "batch channel height width"],
    goal: Float[Tensor, "batch feature"],
    *,
    options: AnpSettings,
    generator: torch.Generator,
) -> Float[Tensor, "2 neuron"]:
    """Noise (delta, xi) within epsilon that moves features away from the goal.

    It starts at random: at zero noise and open masks the loss is at its minimum and has no slope.
    """
    epsilon = options.epsilon
    start = torch.rand(2, len(masks.values), generator=generator, device=images.device)
    noise = (2 * start - 1) * epsilon
    for _ in range(options.noise_steps):
        noise.requires_grad_(True)
        loss = ops.clone_loss(masks(images, noise), goal)
        (slope,) = torch.autograd.grad(loss, noise)
        with torch.no_grad():
            noise = (noise + epsilon / options.noise_steps * slope.sign()).clamp_(-epsilon, epsilon)
    return noise


@torch.no_grad()
def prune(encoder: Encoder, masks: Masks, *, threshold: float) -> dict[str, list[int]]:
    """Sets the weights of closed neurons to zero in place; gives them by layer.

    Their biases stay, and masks above the threshold have no effect, as in the paper.
    """
    pruned: dict[str, list[int]] = {}
    for layer, values in zip(masks.neurons, masks.by_layer().values(), strict=True):
        closed = (values < threshold).nonzero().flatten().tolist()
        if closed:
            encoder.get_parameter(layer.weight)[closed] = 0
            pruned[layer.layer] = closed
    return pruned


def _neurons(encoder: nn.Module, kinds: type | tuple[type, ...]) -> Iterator[Neurons]:
    for name, module in encoder.named_modules():
        if isinstance(module, kinds) and isinstance(module.weight, Tensor):
            biased = isinstance(module.bias, Tensor)
            yield Neurons(
                layer=name,
                weight=f"{name}.weight",
                bias=f"{name}.bias" if biased else None,
                count=len(module.weight),
            )


def _by_channel(weight: Tensor, scale: Float[Tensor, " channel"]) -> Tensor:
    return weight * scale.view(-1, *[1] * (weight.ndim - 1))
