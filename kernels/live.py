"""The reference form of the losses of tapped layers: plain autograd on the live activations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mimic_fast.kernels.engine import Target, Terms
from mimic_fast.kernels.reference import layer_losses


@dataclass(kw_only=True, slots=True)
class LiveLosses:
    """Same use as ``trunk.LayerLosses``; ``compute`` is the oracle or a compiled form of it."""

    weights: Tensor
    targets: Sequence[Target | None]
    terms: Sequence[Terms]
    images: int
    compute: Callable[..., Tensor] = layer_losses
    _live: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def tap(self, index: int, activation: Tensor, *, prefix: int = 0) -> Tensor:
        """Takes one activation and returns it."""
        if self.targets[index] is not None:
            self._live[index] = (activation, prefix)
        return activation

    def losses(self) -> list[Tensor]:
        """Weighted losses of every layer that has any, ``[2, image]``: attention, clone."""
        return [self._losses(index) for index in sorted(self._live)]

    def _losses(self, index: int) -> Tensor:
        activation, prefix = self._live[index]
        target, terms = self.targets[index], self.terms[index]
        assert target is not None
        return self.compute(
            activation[: self.images],
            target.teacher,
            target.power,
            self.weights[:, index],
            power=terms.power,
            clone=terms.clone,
            attention=terms.attention,
            prefix=prefix,
        )
