"""Losses in the trunk: a tapped activation passes through an identity with losses beside it.

The backward receives the trunk's gradient and the losses' cotangent together and adds in one pass,
so that no gradient of the activation's size is ever made or accumulated. All layers of one shape
share one forward launch, made after the last tap. ``reference.layer_losses`` is the oracle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mimic_fast.kernels.distill import distill_losses
from mimic_fast.kernels.engine import (
    Engine,
    Layer,
    Target,
    Terms,
    accumulator,
    copy_uncounted,
    dense_activation,
    fill,
    matching,
    runs,
)
from mimic_fast.kernels.ownership import holders, sole_holder


@dataclass(kw_only=True, slots=True)
class LayerLosses:
    """Losses of the tapped layers of one forward pass, each in the trunk of its network.

    Give every tapped activation to :meth:`tap` and let the network go on with what it returns; call
    :meth:`losses` when the forward pass is over.

    Args:
        engine: Kernels.
        weights: Of attention and clone loss by layer, ``[2, layer]``, on the device; they hold
            whatever the losses are to be multiplied with.
        targets: The teacher's side, by layer; None: the layer has no losses.
        terms: By layer; the prefix is the tap's.
        images: The first images of the batch count.
        live: Layers whose activation the network changes in place after the tap: their losses are
            computed after the forward pass, from what is there then.
    """

    engine: Engine
    weights: Tensor
    targets: Sequence[Target | None]
    terms: Sequence[Terms]
    images: int
    live: frozenset[int] = frozenset()
    _late: dict[int, tuple[Tensor, Terms]] = field(default_factory=dict)
    _layers: dict[int, Layer] = field(default_factory=dict)
    _versions: dict[int, int] = field(default_factory=dict)
    _outputs: dict[int, Tensor] = field(default_factory=dict)
    _buffer: Tensor | None = None

    def tap(self, index: int, activation: Tensor, *, prefix: int = 0) -> Tensor:
        """Takes one activation; the network goes on with the tensor returned."""
        target = self.targets[index]
        if target is None:
            return activation
        terms = replace(self.terms[index], prefix=prefix)
        if index in self.live:
            self._late[index] = (activation, terms)
            return activation
        if self._buffer is None:
            shape = (len(self.terms), 2, self.images)
            self._buffer = activation.new_empty(shape, dtype=accumulator(activation))
        dense = dense_activation(activation, terms, self.images)
        layer = Layer(terms=terms, target=matching(target, dense), activation=dense.detach())
        self._versions[index] = dense._version
        trunk, losses = _Tap.apply(dense, self._buffer[index], self.engine, layer)
        self._layers[index], self._outputs[index] = layer, losses
        return trunk

    def losses(self) -> list[Tensor]:
        """Weighted losses of every layer that has any, ``[2, image]``: attention, clone."""
        order = sorted(self._layers)
        layers = [self._layers[index] for index in order]
        for index, layer in zip(order, layers, strict=True):
            if layer.activation is None or layer.activation._version != self._versions[index]:
                raise RuntimeError(
                    f"the activation of tap {index} was changed in place after the tap; name the "
                    "layer in 'live'"
                )
        for start, stop in runs(layers, order):
            rows = slice(order[start], order[stop - 1] + 1)
            assert self._buffer is not None
            fill(self.engine, layers[start:stop], self.weights[:, rows], self._buffer[rows])
        late = [
            distill_losses(
                self.engine, [activation[: self.images]], [target], self.weights[:, [n]], [terms]
            )[0]
            for n, (activation, terms) in self._late.items()
            if (target := self.targets[n]) is not None
        ]
        return [self._outputs[index] for index in order] + late


class _Tap(torch.autograd.Function):
    """Identity on the activation; beside it the losses of the layer, filled before they are read.

    dL/dS = G + g_0 dL_att/dS + g_1 dL_clone/dS, with the trunk's gradient G and the losses'
    cotangent g, in one pass over S, T and G.
    """

    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, losses: Tensor, engine: Engine, layer: Layer
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(activation, layer.target.teacher)
        ctx.engine, ctx.layer = engine, layer
        return activation.view_as(activation), losses.view_as(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> Any:
        trunk, cotangent = gradients
        held = None if trunk is None else holders(trunk)
        activation, teacher = ctx.saved_tensors
        layer = ctx.layer
        if cotangent is None:
            return trunk, None, None, None
        images = cotangent.shape[1]
        if trunk is not None and trunk.stride() != activation.stride():
            trunk = torch.empty_like(activation).copy_(trunk)
            in_place = True
        else:
            in_place = trunk is not None and held == sole_holder()
        out = trunk if trunk is not None and in_place else torch.empty_like(activation)
        if not in_place:
            copy_uncounted(out, trunk, layer.terms.prefix, images)
        ctx.engine.backward(
            activation,
            teacher,
            layer.coefficients,
            layer.weights,
            cotangent,
            trunk,
            out,
            **layer.terms.arguments(),
        )
        return out, None, None, None
